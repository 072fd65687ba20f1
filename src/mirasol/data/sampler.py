"""Which clips and which questions a step trains on: a pure function of (recipe, examples, step)."""

import copy
import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mirasol.config.recipe import Recipe, Stage
from mirasol.data.clip_cache import BadWindow
from mirasol.data.epochs import EpochOrder
from mirasol.data.example import ClipExamples, Example
from mirasol.data.example_table import ClipTable, ExampleTable
from mirasol.data.mixture import Mixture
from mirasol.data.randomness import draw_uniform, hash64
from mirasol.errors import UserError


@dataclass(frozen=True)
class Batch:
    """What one step trains on: clips and, for each of them, the same number of examples.

    repeated: how many rows repeat another row of their clip because the clip has too few questions
    dropped: for each clip the modality it is shown without, "video", "audio" or none; a clip that has no other keeps
        it all the same
    stage: name of the stage the step belongs to
    epochs: for each clip, how often its stage has been through all its clips before
    positions: for each clip, its place in the order that its stage walks through, over all epochs
    data_sets: for each clip, the name of its data set in `data.mixture`; "" without a mixture
    partners: for each clip, the examples of the one that is mixed into it; none where nothing is mixed
    shares: for each clip, how much of its mix is its own
    counted: for each clip, which of its text rows count in the text loss; empty where all do. Nothing of a clip
        without any counts: it only fills the batch
    replaced: clips that turned out to be bad while they were loaded, and others took the place of
    shifted: for each clip, whether its sound is shifted by half a clip; empty where no clip's is
    """

    step: int
    clips: tuple[ClipExamples, ...]
    examples: tuple[tuple[Example, ...], ...]
    repeated: int
    dropped: tuple[str | None, ...] = ()
    stage: str = ""
    epochs: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    data_sets: tuple[str, ...] = ()
    partners: tuple[tuple[Example, ...], ...] = ()
    shares: tuple[float, ...] = ()
    counted: tuple[tuple[bool, ...], ...] = ()
    replaced: tuple[BadWindow, ...] = ()
    shifted: tuple[bool, ...] = ()

    def select_rows(self, rows: Sequence[int]) -> "Batch":
        """The batch of these rows alone, in this order; `repeated` stays the whole batch's."""

        def chosen(values: tuple) -> tuple:
            return tuple(values[row] for row in rows) if values else ()

        return replace(
            self,
            clips=chosen(self.clips),
            examples=chosen(self.examples),
            dropped=chosen(self.dropped),
            shifted=chosen(self.shifted),
            epochs=chosen(self.epochs),
            positions=chosen(self.positions),
            data_sets=chosen(self.data_sets),
            partners=chosen(self.partners),
            shares=chosen(self.shares),
            counted=chosen(self.counted),
        )

    @property
    def text_rows(self) -> list[tuple[Example, ...]]:
        """The examples asked of each clip: its own, then those of the clip that is mixed into it."""
        if not self.partners:
            return list(self.examples)
        return [own + other for own, other in zip(self.examples, self.partners, strict=True)]

    @property
    def prompts(self) -> list[list[str]]:
        """Prompts by clip."""
        return [[example.prompt for example in row] for row in self.text_rows]

    @property
    def targets(self) -> list[list[str]]:
        """Targets by clip."""
        return [[example.target for example in row] for row in self.text_rows]

    @property
    def uncounted_rows(self) -> list[int]:
        """The text rows that do not count in the text loss, by their place among all of the batch."""
        rows = (counts for row in self.counted for counts in row)
        return [place for place, counts in enumerate(rows) if not counts]

    @property
    def fillers(self) -> list[int]:
        """The clips that only fill the batch."""
        return [place for place, row in enumerate(self.counted) if not any(row)]

    @property
    def row_weights(self) -> list[float] | None:
        """How much each text row counts in the text loss; None where all count the same."""
        if not self.partners:
            return None
        rows = zip(self.examples, self.partners, self.shares, strict=True)
        return [w for own, other, share in rows for w in [share] * len(own) + [1 - share] * len(other)]


def concatenate_samples(parts: Sequence[Batch]) -> Batch:
    """The clips and examples of several parts of a step's batch."""
    if len(parts) == 1:
        return parts[0]
    clips, examples = ([entry for part in parts for entry in getattr(part, name)] for name in ("clips", "examples"))
    return Batch(parts[0].step, tuple(clips), tuple(examples), parts[0].repeated, stage=parts[0].stage)


def compute_clip_seed(seed: int, batch: Batch, row: int) -> int:
    """What all random changes of a row's clip in this epoch follow from."""
    clip = batch.clips[row]
    return hash64(seed, "augment", batch.stage, batch.epochs[row], clip.video_name, str(clip.start), str(clip.end))


def mentions_any(clip: ClipExamples, words: Sequence[str]) -> bool:
    """Whether an example of the clip has one of the words, as a whole word, in its prompt, answers or candidates."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    texts = (text for e in clip.examples for text in (e.prompt, e.target, *e.references, *e.candidates))
    return any(pattern.search(text) for text in texts)


KINDS = {"image": "images", "clip": "about whole clips", "segment": "with a start and an end"}


def select_kind(examples: ExampleTable, kind: str) -> np.ndarray:
    """Which examples are about an "image", a whole "clip" or a "segment" of one: bool [example]."""
    if kind == "image":
        return examples.image
    return ~examples.image & (examples.windowed == (kind == "segment"))


def list_kinds(stage: Stage) -> tuple[str, ...]:
    """The kinds of examples that a stage trains on."""
    if stage.objective == "image_text":
        return ("image",)
    return ("clip", "segment") if stage.span == "any" else (stage.span,)


def select_clips(
    examples: Iterable[Example], kinds: Collection[str], question_types: Sequence[str] | None
) -> ClipTable:
    """The clips (segments, images) with the examples that a stage may draw from, in the order of the examples."""
    table = ExampleTable.of(examples)
    wanted = np.logical_or.reduce([select_kind(table, kind) for kind in kinds])
    if question_types is not None:
        wanted &= np.isin(table.type, [place for place, name in enumerate(table.types) if name in question_types])
    return table.clips(wanted)


def draw_questions(clip: ClipExamples, stage: Stage, *key: int | str) -> tuple[tuple[Example, ...], int]:
    """`questions_per_clip` of the clip's examples by hash(key, example), and how many rows are repeats.

    Without replacement, by exponential races (Efraimidis & Spirakis, 2006): a question wins with a chance in
    proportion to its weight.
    """
    per_type = Counter(example.question_type for example in clip.examples)

    def arrival(numbered: tuple[int, Example]) -> float:
        place, example = numbered
        weight = 1.0
        if stage.type_weights:
            weight = stage.type_weights.get(example.question_type, 1.0) / per_type[example.question_type]
        return -math.log(draw_uniform(*key, "question", place, example.id)) / weight

    ordered = [example for _, example in sorted(enumerate(clip.examples), key=arrival)]
    wanted = stage.questions_per_clip
    drawn = tuple(ordered[place % len(ordered)] for place in range(wanted))
    return drawn, max(0, wanted - len(ordered))


def pick_target(example: Example, *key: int | str) -> Example:
    """The example with the target that this step teaches: one of its references by hash(key), where it is random."""
    if not example.random_target:
        return example
    texts = example.references
    return replace(example, target=texts[int(draw_uniform(*key, "target", example.id) * len(texts))])


def drop_modality(stage: Stage, *key: int | str) -> str | None:
    """The modality a clip is shown without, by the stage's shares and hash(key)."""
    draw = draw_uniform(*key, "drop")
    if draw < stage.drop_video:
        return "video"
    return "audio" if draw < stage.drop_video + stage.drop_audio else None


def choose_shifted(share: float, positions: Sequence[int], *key: int | str) -> tuple[bool, ...]:
    """For each position whether its clip's sound is shifted, by hash(key, position); empty where none is."""
    return tuple(draw_uniform(*key, place, "shift_audio") < share for place in positions) if share else ()


class BatchPlan:
    """All batches of a run, none of them computed before it is asked for.

    Every stage walks through its own clips, epoch after epoch, each epoch in the order of its own permutation; a
    batch may span two epochs. Of several data sets each has its share of the clips (see `Mixture`). A stage that has
    `epochs` walks through the questions instead, each once an epoch (see `EpochOrder`); `recipe` then says in how many
    steps.

    `examples` are those of the only data set, or of each data set by name. `unused` counts those, by kind, that are of
    a kind that no stage trains on.

    Raises:
        UserError: a stage that names a question type the examples do not have, or that finds no example.
    """

    def __init__(self, recipe: Recipe, examples: Sequence[Example] | Mapping[str, Sequence[Example]]):
        by_name = examples if isinstance(examples, Mapping) else {"": examples}
        tables = {name: ExampleTable.of(some) for name, some in by_name.items()}
        taken = {kind for stage in recipe.stages.values() for kind in list_kinds(stage)}
        counts = {
            kind: sum(int(select_kind(table, kind).sum()) for table in tables.values())
            for kind in KINDS
            if kind not in taken
        }
        self.unused = {kind: count for kind, count in counts.items() if count}
        self.mixtures = {name: _make_order(recipe, name, tables) for name in recipe.stages}
        orders = {name: order for name, order in self.mixtures.items() if isinstance(order, EpochOrder)}
        self.recipe = recipe.count_epochs({name: order.steps for name, order in orders.items()})

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0 over all stages."""
        name, step_in_stage = self.recipe.find_stage(step)
        first = step_in_stage * self.recipe.stages[name].clips_per_step
        positions = tuple(range(first, first + self.recipe.stages[name].clips_per_step))
        rows = zip(*(self._draw_row(name, place) for place in positions), strict=True)
        clips, examples, dropped, epochs, repeats, data_sets, counted = rows
        counted = () if self.recipe.stages[name].epochs is None else counted
        return Batch(
            step, clips, examples, sum(repeats), dropped, name, epochs, positions, data_sets, counted=counted,
            shifted=choose_shifted(self.recipe.stages[name].shift_audio, positions, self.recipe.seed, name),
        )  # fmt: skip

    def _draw_row(self, name: str, position: int, attempt: int = 0):
        """(clip, examples, dropped, epoch, repeats, data set, which examples count) of a stage's `position`; `attempt`
        counts the clips that turned out to be bad in its place."""
        stage, seed, order = self.recipe.stages[name], self.recipe.seed, self.mixtures[name]
        if isinstance(order, EpochOrder):
            (data_set, clip, epoch, drawn, counted), repeats = order.at(position, attempt), 0
        else:
            data_set, clip, epoch = order.at(position, attempt)
            drawn, repeats = draw_questions(clip, stage, seed, name, position)
            counted = len(drawn)
        examples = tuple(pick_target(example, seed, name, position) for example in drawn)
        counts = tuple(row < counted for row in range(len(drawn)))
        return clip, examples, drop_modality(stage, seed, name, position), epoch, repeats, data_set, counts

    def replace_clip(self, batch: Batch, row: int, attempt: int, bad: BadWindow) -> Batch:
        """The batch with another clip in place of a row's, which is `bad`; `attempt` counts from 1.

        Which one follows from the row's position and the attempt alone: a resumed run draws the same.
        """
        clip, examples, *_, counts = self._draw_row(batch.stage, batch.positions[row], attempt)
        counted = (*batch.counted[:row], counts, *batch.counted[row + 1 :]) if batch.counted else ()
        return replace(
            batch,
            counted=counted,
            clips=(*batch.clips[:row], clip, *batch.clips[row + 1 :]),
            examples=(*batch.examples[:row], examples, *batch.examples[row + 1 :]),
            replaced=(*batch.replaced, bad),
        )

    def store(self, folder: Path) -> "BatchPlan":
        """The same plan, its examples in files of `folder`: processes share them, and they need not be in memory."""
        tables = {
            id(clips.examples): clips.examples for each in self.mixtures.values() for clips in each.clips.values()
        }
        stored = {key: tables[key].store(folder / f"table-{number}") for number, key in enumerate(tables)}
        plan = copy.copy(self)
        plan.mixtures = {name: copy.copy(mixture) for name, mixture in self.mixtures.items()}
        for number, (name, mixture) in enumerate(plan.mixtures.items()):
            if isinstance(mixture, EpochOrder):
                mixture = plan.mixtures[name] = mixture.store(folder / f"stage-{number}-order")
            mixture.clips = {
                data_set: clips.store(folder / f"stage-{number}-{place}", stored[id(clips.examples)])
                for place, (data_set, clips) in enumerate(mixture.clips.items())
            }
        return plan

    def compute_noise_seed(self, step: int, part: int = 0, rank: int = 0) -> int:
        """Seed of PyTorch's random numbers (dropout) in a microbatch of step `step` on a process."""
        place = () if part == rank == 0 else (part, rank)
        return hash64(self.recipe.seed, "noise", step, *place) >> 1

    def compute_row_seeds(self, batch: Batch) -> list[int]:
        """A seed for each clip of a batch, or of a part of it, for the masking of x and layer drop."""
        return [hash64(self.recipe.seed, "row", batch.stage, position) >> 1 for position in batch.positions]

    def list_used_clips(self, stages: Iterable[str] | None = None) -> list[tuple[str, float | None, float | None]]:
        """Every (media, start, end) that some step, or some step of these stages, may ask for."""
        names = self.mixtures if stages is None else stages
        tables = (clips for name in names for clips in self.mixtures[name].clips.values())
        return list(dict.fromkeys(window for clips in tables for window in clips.windows()))

    @property
    def clips(self) -> dict[str, Sequence[ClipExamples]]:
        """The clips of each stage, those of several data sets one after the other."""
        tables = {name: list(mixture.clips.values()) for name, mixture in self.mixtures.items()}
        return {
            name: own[0] if len(own) == 1 else [clip for table in own for clip in table] for name, own in tables.items()
        }


def _make_order(recipe: Recipe, stage_name: str, tables: Mapping[str, ExampleTable]) -> Mixture | EpochOrder:
    """The order in which a stage walks through its clips. Raises UserError as `BatchPlan`."""
    stage = recipe.stages[stage_name]
    data_sets = {name: tables[name] for name in stage.data_sets or tables}
    known, place = sorted({name for table in data_sets.values() for name in table.types}), f"stages.{stage_name}"
    roots = ", ".join(recipe.data.data_sets[name].root for name in data_sets)
    for key, types in (("question_types", stage.question_types or ()), ("type_weights", stage.type_weights)):
        _check_types(types, known, f"{place}.{key}", roots)
    clips = {}
    for name, table in data_sets.items():
        clips[name] = select_clips(table, list_kinds(stage), stage.question_types)
        if not clips[name]:
            types = "any type" if stage.question_types is None else f"types {', '.join(stage.question_types)}"
            kinds = " or ".join(KINDS[kind] for kind in list_kinds(stage))
            raise UserError(f"{place}: no examples {kinds} of {types} in {recipe.data.data_sets[name].root}")
    weights = {name: recipe.data.data_sets[name].weight for name in clips}
    if stage.epochs is not None:
        return EpochOrder(clips, stage, (recipe.seed, stage_name))
    return Mixture(clips, weights, (recipe.seed, stage_name))


def _check_types(types: Iterable[str], known: Sequence[str], key: str, root: str) -> None:
    for wanted in types:
        if wanted not in known:
            close = difflib.get_close_matches(wanted, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"they have {', '.join(map(repr, known))}"
            raise UserError(f"{key}: no training example in {root} is of type {wanted!r}: {hint}")
