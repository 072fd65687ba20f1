"""The order of a stage that has epochs: every question exactly once in each of them, at any position at once."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mirasol.config.recipe import Stage
from mirasol.data.example import ClipExamples, Example
from mirasol.data.example_table import Arrays, ClipTable
from mirasol.data.randomness import draw_uniform, permute_index


class EpochOrder:
    """Clips of one or several data sets, each as often in an epoch as its questions need.

    A position is a clip with up to `questions_per_clip` of its questions; a clip with more of them has several
    positions. An epoch is a permutation of all positions, and each time a clip's questions are dealt to its positions
    in another order: both follow from (seed, stage, epoch). Batches go on from one epoch to the next; in the last one,
    positions behind the last epoch stand in for what is missing, and do not count.

    clips: by name of the data set
    key: the run's seed and the stage's name
    """

    def __init__(self, clips: Mapping[str, ClipTable], stage: Stage, key: tuple[int, str]):
        assert stage.epochs is not None
        self.clips, self.key, self.epochs, self.most = dict(clips), key, stage.epochs, stage.questions_per_clip
        counts = np.concatenate([table.question_counts for table in self.clips.values()])
        self.clips_per_step = stage.clips_per_step
        # Where each clip's positions end, the clips of all data sets one after the other.
        self._ends = Arrays({"ends": np.cumsum(-(-counts // self.most), dtype=np.int64)})
        self.steps = -(-self.epochs * self.size // self.clips_per_step)

    def describe(self) -> str:
        """What the epochs amount to, on one line."""
        questions = sum(int(table.question_counts.sum()) for table in self.clips.values())
        clips = sum(map(len, self.clips.values()))
        empty = self.size * self.most - questions
        padding = f", with {empty:,} rows that do not count" if empty else ""
        last = self.steps * self.clips_per_step - self.epochs * self.size
        return (
            f"{self.epochs} epochs of {questions:,} questions on {clips:,} clips are {self.steps:,} steps: an epoch "
            f"has {self.size:,} times a clip{padding}" + (f", the last step {last} that do not count" if last else "")
        )

    @property
    def size(self) -> int:
        """Positions of an epoch."""
        return int(self._ends["ends"][-1])

    def at(self, position: int, attempt: int = 0) -> tuple[str, ClipExamples, int, tuple[Example, ...], int]:
        """Data set, clip, epoch, the questions asked, and how many of them count: the rest, and those of a position
        behind the last epoch, do not.

        `attempt` counts the clips that turned out to be bad there: another one takes the place, and does not count.
        """
        epoch, place = divmod(position, self.size)
        seed, stage = self.key
        index = permute_index(place, self.size, seed, "order", stage, "epoch", epoch)
        if attempt:
            index = int(draw_uniform(seed, "instead", stage, position, attempt) * self.size)
        ends = self._ends["ends"]
        number = int(np.searchsorted(ends, index, side="right"))
        part = index - (int(ends[number - 1]) if number else 0)
        data_set, clip = self._find_clip(number)
        asked = self._deal_questions(clip, part, (seed, "questions", stage, epoch, number))
        counted = 0 if attempt or epoch >= self.epochs else len(asked)
        return data_set, clip, epoch, tuple(asked[row % len(asked)] for row in range(self.most)), counted

    def _find_clip(self, number: int) -> tuple[str, ClipExamples]:
        for name, table in self.clips.items():
            if number < len(table):
                return name, table[number]
            number -= len(table)
        raise AssertionError(number)

    def _deal_questions(self, clip: ClipExamples, part: int, key: tuple[int | str, ...]) -> list[Example]:
        """The questions of the clip's position `part`: its share of a permutation of all of them."""
        total = len(clip.examples)
        places = range(part * self.most, min((part + 1) * self.most, total))
        return [clip.examples[permute_index(place, total, *key)] for place in places]

    def store(self, folder: Path) -> "EpochOrder":
        """The same order, what it keeps for each clip in files of `folder`; the clips are stored by the plan."""
        stored = copy.copy(self)
        stored._ends = self._ends.store(folder)
        return stored
