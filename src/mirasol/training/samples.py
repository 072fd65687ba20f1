"""Samples of a model in training: answers to a few fixed questions, and chunks it reconstructs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import ClipExamples, Example
from mirasol.data.loader import load_media
from mirasol.data.media_files import is_image
from mirasol.evaluation.answer import eval_mode, generate_answers
from mirasol.media.processor import MirasolProcessor
from mirasol.training.validation import Validation

CHUNKS_SHOWN = 8


@dataclass(frozen=True)
class SampleAnswer:
    """A generated answer and its target."""

    id: str
    media: str
    prompt: str
    target: str
    answer: str


@dataclass(frozen=True)
class Taken:
    """The samples of one step.

    picture: for each clip a row with the first frame of each chunk, and below it a row with the same frames
        reconstructed from the chunk before (the first chunk has none and is left out); None where no clip has two
        chunks of video
    """

    answers: tuple[SampleAnswer, ...]
    picture: UInt8[Tensor, "3 height width_px"] | None


class Samples:
    """The first `count` clips of the validation, each with its first question; images are left out."""

    def __init__(self, validation: Validation, count: int):
        rows = [row for part in validation.parts.values() for row in part if not is_image(row[0].media)]
        # Of each question type in turn, so that few samples still show several.
        seen: dict[str, int] = {}
        ranks = []
        for row in rows:
            kind = row[1][0].type_name
            ranks.append(seen.setdefault(kind, 0))
            seen[kind] += 1
        ordered = sorted(range(len(rows)), key=lambda place: (ranks[place], place))
        self.rows: list[tuple[ClipExamples, Example]] = [(rows[p][0], rows[p][1][0]) for p in ordered[:count]]

    @torch.no_grad()
    def take(self, model: nn.Module, processor: MirasolProcessor, cache: ClipCache, device: torch.device) -> Taken:
        """Answers and reconstructs with `model`, left in the mode it came in. All processes of a run take part."""
        windows = [(clip.media, clip.start, clip.end) for clip, _ in self.rows]
        media = {
            name: value.to(device) for name, value in load_media(cache, processor.feature_extractor, windows).items()
        }
        examples = [example for _, example in self.rows]
        with eval_mode(model):
            answers = generate_answers(model, processor, media, [example.prompt for example in examples], device)
            picture = self._draw_picture(model, processor, media, examples)
        samples = [
            SampleAnswer(example.id, example.media, example.prompt, example.target, answer)
            for example, answer in zip(examples, answers, strict=True)
        ]
        return Taken(tuple(samples), picture)

    def _draw_picture(
        self, model: Any, processor: MirasolProcessor, media: dict[str, Tensor], examples: Sequence[Example]
    ) -> Tensor | None:
        text = processor.encode_text([e.prompt for e in examples], [e.target for e in examples])
        output = model(**media, **text.to(media["chunk_mask"].device))
        reconstruction = model.reconstruction
        true = reconstruction.video(reconstruction.video_target(media["video"].float()))
        made, has_video = output.reconstruction.float(), media["video_mask"] & media["chunk_mask"]
        if model.config.reconstruction.step == "next":
            true, made, has_video = true[:, 1:], made[:, :-1], has_video[:, 1:]
        shown = [place for place in range(len(true)) if has_video[place].any()]
        if not shown:
            return None
        pixels = processor.feature_extractor.pixels
        rows = []
        for frames in (true, made):
            # Padding and chunks without video stay black.
            first = pixels(frames[:, :CHUNKS_SHOWN, 0]) * has_video[:, :CHUNKS_SHOWN, None, None, None]
            rows.append(torch.cat(list(first.unbind(1)), dim=-1))
        return torch.cat([row[place] for place in shown for row in rows], dim=-2).cpu()
