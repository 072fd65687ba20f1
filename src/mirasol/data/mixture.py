"""In which order a stage walks through the clips of its data sets: any position at once, without counting up to it."""

import math
from collections.abc import Mapping
from fractions import Fraction

from mirasol.data.example import ClipExamples
from mirasol.data.example_table import ClipTable
from mirasol.data.randomness import draw_uniform, permute_index
from mirasol.errors import UserError

# Of so many positions each data set has its exact share, to within one clip.
BLOCK = 1024


class Mixture:
    """Clips of one or several data sets, each with its share of the positions of a stage.

    Every data set is walked through epoch after epoch, each epoch in the order of its own permutation. Which data set a
    position belongs to follows from a hash, block by block: among the 1,024 positions of a block each has its share,
    in an order of chance; how often it came in the blocks before is known without counting.

    clips, weights: by name of the data set; weights are relative
    key: what the order depends on besides the position: the run's seed and the stage's name

    Raises:
        UserError: a share below 1 in 1,024.
    """

    def __init__(self, clips: Mapping[str, ClipTable], weights: Mapping[str, float], key: tuple[int, str]):
        self.clips, self.key = dict(clips), key
        exact = {name: Fraction(weights[name]) for name in clips}
        total = sum(exact.values())
        self.names, self.edges, edge = list(clips), [Fraction(0)], Fraction(0)
        for name, weight in exact.items():
            if weight / total * BLOCK < 1:
                raise UserError(
                    f"data.mixture.{name}.weight={weights[name]} is less than 1 in {BLOCK} of all: raise it, or leave "
                    "the data set out"
                )
            edge += weight / total
            self.edges.append(edge)
        self._blocks: dict[int, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.clips.values()))

    def place(self, position: int) -> tuple[str, int]:
        """The data set that a position belongs to, and how many positions before it in that data set's own order."""
        if len(self.names) == 1:
            return self.names[0], position
        block, index = divmod(position, BLOCK)
        number, before = self._draw_block(block)[index]
        return self.names[number], before

    def _draw_block(self, block: int) -> list[tuple[int, int]]:
        """(number of its data set, place in that data set's order) of every position of a block."""
        if block not in self._blocks:
            firsts = [self._count_clips_before(number, block) for number in range(len(self.names))]
            counts = [self._count_clips_before(number, block + 1) - first for number, first in enumerate(firsts)]
            chosen = [number for number, count in enumerate(counts) for _ in range(count)]
            places, passed = [], list(firsts)
            for index in range(BLOCK):
                number = chosen[permute_index(index, BLOCK, *self.key, "mixture", block)]
                places.append((number, passed[number]))
                passed[number] += 1
            # A batch is in one block or two: a few are enough, and a run of any length keeps no more.
            self._blocks = {**dict(list(self._blocks.items())[-3:]), block: places}
        return self._blocks[block]

    def _count_clips_before(self, number: int, block: int) -> int:
        """How many positions before the block belong to data set `number`."""
        return math.floor(self.edges[number + 1] * block * BLOCK) - math.floor(self.edges[number] * block * BLOCK)

    def at(self, position: int, attempt: int = 0) -> tuple[str, ClipExamples, int]:
        """Data set, clip and that data set's epoch at a position.

        `attempt` counts the clips that turned out to be bad there: each time another one is drawn.
        """
        name, own = self.place(position)
        clips = self.clips[name]
        epoch, index = divmod(own, len(clips))
        seed, stage = self.key
        if attempt:
            index = int(draw_uniform(seed, "instead", stage, position, attempt) * len(clips))
        order = (seed, "order", stage, epoch) if len(self.names) == 1 else (seed, "order", stage, epoch, name)
        return name, clips[permute_index(index, len(clips), *order)], epoch
