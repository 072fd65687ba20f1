"""Validation during training on a small, fixed set: text loss and teacher-forced exact match by question type."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mirasol.config.parts import IGNORED_LABEL
from mirasol.config.recipe import Recipe, Stage
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import ClipExamples, Example
from mirasol.data.loader import load_media
from mirasol.data.randomness import permute_index
from mirasol.data.sampler import draw_questions, list_kinds, select_clips
from mirasol.evaluation.answer import eval_mode
from mirasol.evaluation.metrics import average_by_type
from mirasol.media.processor import MirasolProcessor
from mirasol.training.features import FeatureEncoder
from mirasol.training.weights.stages import compute_stage_losses


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
            for kind in dict.fromkeys(map(_name_kind, own)):
                part = f"{data_set}_{kind}" if data_set else kind
                stages = [stage for stage in own if _name_kind(stage) == kind]
                self._wanted.append(part)
                rows = self._rows(some, part, stages)
                if rows:
                    self.parts[part], self.stage_of[part] = rows, stages[0]

    def _rows(self, examples: Sequence[Example], part: str, stages: Sequence[Stage]):
        types: list[str] | None = []
        for stage in stages:
            types = None if types is None or stage.question_types is None else [*types, *stage.question_types]
        clips = select_clips(examples, list_kinds(stages[0]), types)
        count, seed = min(self.recipe.validation_clips, len(clips)), self.recipe.seed
        # Segments keep their former name in the hash, so that every version validates on the same ones.
        key = f"{part.removesuffix('segment')}slot" if part.endswith("segment") else part
        chosen = [clips[permute_index(place, len(clips), seed, "validation", key)] for place in range(count)]
        most = max(stage.questions_per_clip for stage in stages)
        # A segment often has a single description: more questions would only repeat it.
        most = min(most, max((len(clip.examples) for clip in chosen), default=1))
        drawing = Stage(steps=1, questions_per_clip=most)
        return [(clip, draw_questions(clip, drawing, seed, "validation", clip.video_name)[0]) for clip in chosen]

    @property
    def absent(self) -> list[str]:
        """Parts that stages train on and the validation splits have no usable example of."""
        return [part for part in self._wanted if part not in self.parts]

    def list_windows(self) -> list[tuple[str, float | None, float | None]]:
        """Every (media, start, end) that is validated on."""
        return list(dict.fromkeys((c.media, c.start, c.end) for part in self.parts.values() for c, _ in part))

    def leave_out(self, bad: set[tuple[str, float | None, float | None]]) -> None:
        """Leaves out clips that cannot be decoded."""
        self.parts = {
            name: [row for row in part if (row[0].media, row[0].start, row[0].end) not in bad]
            for name, part in self.parts.items()
        }
        self.parts = {name: part for name, part in self.parts.items() if part}

    @torch.no_grad()
    def run(
        self,
        model: nn.Module,
        processor: MirasolProcessor,
        cache: ClipCache,
        device: torch.device,
        encoder: FeatureEncoder | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Validates `model`, on features of `encoder` in place of media if there is one, and leaves it in the mode it
        came in. Returns what `RunLog.validation` takes."""
        with eval_mode(model):
            return {name: self._run_part(name, model, processor, cache, device, encoder) for name in self.parts}

    def _run_part(
        self,
        name: str,
        model: nn.Module,
        processor: MirasolProcessor,
        cache: ClipCache,
        device: torch.device,
        encoder: FeatureEncoder | None,
    ) -> dict[str, Any]:
        part, stage = self.parts[name], self.stage_of[name]
        most = max(stage.clips_per_step for stage in self.recipe.stages.values())
        size = self.recipe.validation_batch or most // self.recipe.accumulation
        judged: list[JudgedRow] = []
        dense: dict[str, float] = defaultdict(float)
        for first in range(0, len(part), size):
            batch_rows = part[first : first + size]
            windows = [(clip.media, clip.start, clip.end) for clip, _ in batch_rows]
            if encoder is not None and stage.objective == "clips":
                media = encoder.load(windows, cache, processor.feature_extractor, device)
            else:
                media = load_media(cache, processor.feature_extractor, windows)
            examples = [example for _, own in batch_rows for example in own]
            text = processor.encode_text([e.prompt for e in examples], [e.target for e in examples])
            batch = {name: value.to(device) for name, value in {**media, **text}.items()}
            output = compute_stage_losses(model, stage, batch)
            for loss_name, loss in output.items():
                if loss_name.endswith("_loss") and loss_name != "text_loss":
                    dense[loss_name] += float(loss) * len(batch_rows) / len(part)
            columns = [values.tolist() for values in judge_rows(output.logits, batch["labels"])]
            types = [example.type_name for example in examples]
            judged += [JudgedRow(*values) for values in zip(types, *columns, strict=True)]
        return summarize_rows(judged, dense)


def _name_kind(stage: Stage) -> str:
    """What a stage is validated on: its span, or "image"."""
    return "image" if stage.objective == "image_text" else stage.span


@dataclass(frozen=True)
class JudgedRow:
    """One question under teacher forcing: summed cross-entropy of its target tokens (nats), their number, and whether
    all of them are the most likely ones."""

    type_name: str
    loss: float
    tokens: int
    is_right: bool


def judge_rows(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"], Bool[Tensor, " row"]]:
    """Per row: summed cross-entropy of its target tokens, their number, and whether all are the most likely ones."""
    predicted, wanted = logits[:, :-1].float(), labels[:, 1:]
    is_target = wanted != IGNORED_LABEL
    losses = nn.functional.cross_entropy(
        predicted.transpose(1, 2), wanted, ignore_index=IGNORED_LABEL, reduction="none"
    )
    right = (predicted.argmax(-1) == wanted) | ~is_target
    return losses.sum(1), is_target.sum(1), right.all(1)


def summarize_rows(judged: Sequence[JudgedRow], dense: Mapping[str, float]) -> dict[str, Any]:
    """The part of a validation line on these rows; `dense` are the mean losses other than the text loss."""
    score = average_by_type((row.type_name, float(row.is_right)) for row in judged)
    groups = {name: [row for row in judged if row.type_name == name] for name in score.by_type}
    losses = {name: sum(row.loss for row in own) for name, own in groups.items()}
    return {
        "text_loss": sum(losses.values()) / sum(row.tokens for row in judged),
        **dense,
        "accuracy": score.accuracy,
        "by_type": {
            name: {
                "text_loss": losses[name] / sum(row.tokens for row in groups[name]),
                "accuracy": score.by_type[name],
                "rows": len(groups[name]),
            }
            for name in sorted(groups)
        },
    }
