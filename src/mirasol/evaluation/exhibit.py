"""One clip looked at closely: what went in, what was predicted of it, what was asked, and where the model looked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirasol.evaluation.answer import attention_by_chunk
from mirasol.evaluation.metrics import Answered
from mirasol.media.clip import Clip
from mirasol.media.processor import MirasolProcessor
from mirasol.model.mirasol import MirasolForConditionalGeneration


@dataclass(frozen=True)
class Exhibit:
    """A clip of T chunks and the model's view of it.

    edges: T + 1 chunk edges, seconds
    frames: uint8 [T, F, height, width, 3]; None without video
    reconstruction: uint8 [chunk, F, height, width, 3], the model's pictures of the clip's last chunks: of all but the
        first, each expected from the chunks before it, or of all T where it reconstructs the chunk itself
    spectrogram: float [T * S, mel]; None without audio
    attention: float [question, T], the share of cross-attention on each chunk while the answer was written
    """

    media: str
    edges: tuple[float, ...]
    frames: np.ndarray | None
    reconstruction: np.ndarray
    spectrogram: np.ndarray | None
    answered: tuple[Answered, ...]
    attention: np.ndarray


@torch.inference_mode()
def look_closely(
    model: MirasolForConditionalGeneration,
    processor: MirasolProcessor,
    clip: Clip,
    media: str,
    answered: Sequence[Answered],
) -> Exhibit:
    """Runs the clip through the model once more and keeps what there is to see. `answered` are questions about it."""
    tensors = processor.feature_extractor.tensors(clip)
    batch = processor.feature_extractor.collate([tensors]).to(model.device)
    patches, _ = model.reconstruction(model.encode(**batch).latents)
    settings, frames = model.config.reconstruction, model.config.video.frames_per_chunk
    predicted = model.reconstruction.video(patches)[0]
    if settings.step == "next":
        predicted = predicted[:-1]
    if settings.frames is not None:
        # Each predicted frame stands for several of the chunk's.
        predicted = predicted.repeat_interleave(frames // settings.frames, dim=1)
    prompts = [item.example.prompt for item in answered]
    attention = attention_by_chunk(model, processor, tensors, prompts, [item.answer for item in answered])
    return Exhibit(
        media=media,
        edges=clip.timeline.edges,
        frames=_channels_last(tensors["video"]) if clip.has_video else None,
        reconstruction=_channels_last(processor.feature_extractor.pixels(predicted.float().cpu())),
        spectrogram=tensors["audio"].flatten(0, 1).float().numpy() if clip.has_audio else None,
        answered=tuple(answered),
        attention=attention.numpy(),
    )


def _channels_last(video: Tensor) -> np.ndarray:
    return np.ascontiguousarray(video.permute(0, 1, 3, 4, 2).numpy())


def most_telling(answered: Sequence[Answered]) -> str:
    """The media file whose questions cover the most types; among equals the one with the most questions, then the
    first."""
    types: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for item in answered:
        types.setdefault(item.example.media, set()).add(item.example.type_name)
        counts[item.example.media] = counts.get(item.example.media, 0) + 1
    return max(types, key=lambda media: (len(types[media]), counts[media]))
