"""A small, fixed validation: text loss and teacher-forced exact match for each question type."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mirasol.config.parts import IGNORED_LABEL
from mirasol.config.recipe import Recipe, Stage
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import ClipExamples, Example
from mirasol.data.loader import load_media
from mirasol.data.randomness import permuted
from mirasol.data.sampler import draw_questions, kinds_taken, stage_clips
from mirasol.training.stages import stage_losses


class Validation:
    """The same `validation_clips` clips (and as many segments or images, where a stage trains on them) of each data set
    every time."""

    def __init__(self, recipe: Recipe, examples: Sequence[Example] | Mapping[str, Sequence[Example]]):
        self.recipe = recipe
        self.parts: dict[str, list[tuple[ClipExamples, tuple[Example, ...]]]] = {}
        self.stage_of: dict[str, Stage] = {}
        self._wanted: list[str] = []
        for data_set, some in (examples if isinstance(examples, Mapping) else {"": examples}).items():
            own = [stage for stage in recipe.stages.values() if data_set in (stage.data_sets or (data_set,))]
            for kind in dict.fromkeys(map(_kind, own)):
                part = f"{data_set}_{kind}" if data_set else kind
                stages = [stage for stage in own if _kind(stage) == kind]
                self._wanted.append(part)
                rows = self._rows(some, part, stages)
                if rows:
                    self.parts[part], self.stage_of[part] = rows, stages[0]

    def _rows(self, examples: Sequence[Example], part: str, stages: Sequence[Stage]):
        types: list[str] | None = []
        for stage in stages:
            types = None if types is None or stage.question_types is None else [*types, *stage.question_types]
        clips = stage_clips(examples, kinds_taken(stages[0]), types)
        count, seed = min(self.recipe.validation_clips, len(clips)), self.recipe.seed
        # Segments keep their former name in the hash, so that every version validates on the same ones.
        key = f"{part.removesuffix('segment')}slot" if part.endswith("segment") else part
        chosen = [clips[permuted(place, len(clips), seed, "validation", key)] for place in range(count)]
        most = max(stage.questions_per_clip for stage in stages)
        # A segment often has a single description: more questions would only repeat it.
        most = min(most, max((len(clip.examples) for clip in chosen), default=1))
        drawing = Stage(steps=1, questions_per_clip=most)
        return [(clip, draw_questions(clip, drawing, seed, "validation", clip.video_name)[0]) for clip in chosen]

    @property
    def absent(self) -> list[str]:
        """Parts that stages train on and that the validation splits hold no usable example for."""
        return [part for part in self._wanted if part not in self.parts]

    def windows(self) -> list[tuple[str, float | None, float | None]]:
        """Every (media, start, end) looked at."""
        return list(dict.fromkeys((c.media, c.start, c.end) for part in self.parts.values() for c, _ in part))

    def without(self, bad: set[tuple[str, float | None, float | None]]) -> None:
        """Leaves out clips that cannot be decoded."""
        self.parts = {
            name: [row for row in part if (row[0].media, row[0].start, row[0].end) not in bad]
            for name, part in self.parts.items()
        }
        self.parts = {name: part for name, part in self.parts.items() if part}

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, cache: ClipCache, device: torch.device) -> dict[str, Any]:
        """Validates `model` (left in the mode it came in). Returns what `RunLog.validation` takes."""
        was_training = model.training
        model.eval()
        results = {name: self._part(name, model, processor, cache, device) for name in self.parts}
        model.train(was_training)
        return results

    def _part(self, name, model, processor, cache, device) -> dict[str, Any]:
        part = self.parts[name]
        stage = self.stage_of[name]
        most = max(stage.clips_per_step for stage in self.recipe.stages.values())
        size = self.recipe.validation_batch or most // self.recipe.accumulation
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])
        dense: dict[str, float] = defaultdict(float)
        for first in range(0, len(part), size):
            some = part[first : first + size]
            media = load_media(cache, processor.feature_extractor, [(c.media, c.start, c.end) for c, _ in some])
            rows = [example for _, examples in some for example in examples]
            text = processor.encode_text([row.prompt for row in rows], [row.target for row in rows])
            batch = {name: value.to(device) for name, value in {**media, **text}.items()}
            output = stage_losses(model, stage, batch)
            for name, loss in output.items():
                if name.endswith("_loss") and name != "text_loss":
                    dense[name] += float(loss) * len(some) / len(part)
            losses, tokens, right = judge_rows(output.logits, batch["labels"])
            for row, loss, count, exact in zip(rows, losses.tolist(), tokens.tolist(), right.tolist(), strict=True):
                for total, value in enumerate((loss, count, int(exact), 1)):
                    sums[row.type_name][total] += value
        return _summary(sums, dense)


def _kind(stage: Stage) -> str:
    """What a stage is validated on: its span, or "image"."""
    return "image" if stage.objective == "image_text" else stage.span


def judge_rows(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"], Tensor]:
    """Per row: summed cross-entropy of its target tokens, their number, and whether all are the most likely ones."""
    predicted, wanted = logits[:, :-1].float(), labels[:, 1:]
    is_target = wanted != IGNORED_LABEL
    losses = nn.functional.cross_entropy(
        predicted.transpose(1, 2), wanted, ignore_index=IGNORED_LABEL, reduction="none"
    )
    right = (predicted.argmax(-1) == wanted) | ~is_target
    return losses.sum(1), is_target.sum(1), right.all(1)


def _summary(sums: dict[str, list[float]], dense: dict[str, float]) -> dict[str, Any]:
    loss, tokens, exact, rows = (sum(entry[place] for entry in sums.values()) for place in range(4))
    return {
        "text_loss": loss / tokens,
        **dense,
        "accuracy": exact / rows,
        "by_type": {
            name: {"text_loss": sums[name][0] / sums[name][1], "accuracy": sums[name][2] / sums[name][3],
                   "rows": sums[name][3]}
            for name in sorted(sums)
        },
    }  # fmt: skip
