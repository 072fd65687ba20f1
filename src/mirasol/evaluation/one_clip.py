"""One clip shown closely: its frames and sound, what the model expected to see, the answers, and the attention of each
answer to each chunk."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mirasol.checkpoint import Loaded
from mirasol.data.media_files import open_media_file
from mirasol.errors import BadClip
from mirasol.evaluation.answer import compute_attention_by_chunk
from mirasol.evaluation.evaluate import Evaluation
from mirasol.evaluation.figures import make_picture_url, map_to_colours
from mirasol.evaluation.metrics import OPEN, JudgedAnswer
from mirasol.media.clip import Clip
from mirasol.media.tokenizer import TextCoder
from mirasol.model.mirasol import MirasolNetwork
from mirasol.model.outputs import MirasolEncoderOutput

MOST_CHUNKS = 24  # columns that fit on a page
MOST_QUESTIONS = 12
LARGEST_FRAME = 96  # pixels


@dataclass(frozen=True)
class OneClip:
    """A clip of T chunks and the model's view of it.

    edges: T + 1 chunk edges, seconds
    frames: uint8 [T, F, height, width, 3]; None without video
    reconstruction: uint8 [chunk, F, height, width, 3], the model's pictures of the clip's last chunks: of all but the
        first, each expected from the chunks before it, or of all T where it reconstructs the chunk itself
    spectrogram: float [T * S, mel]; None without audio
    judged: answers to questions about the clip
    attention: float [question, T], the share of cross-attention on each chunk while the answer was written
    """

    media: str
    edges: tuple[float, ...]
    frames: np.ndarray | None
    reconstruction: np.ndarray
    spectrogram: np.ndarray | None
    judged: tuple[JudgedAnswer, ...]
    attention: np.ndarray


@torch.inference_mode()
def examine_clip(loaded: Loaded, clip: Clip, media: str, judged: Sequence[JudgedAnswer]) -> OneClip:
    """Runs the clip through the model once more and keeps what can be shown. `judged` are answers about it."""
    model, processor = loaded.model, loaded.processor
    tensors = processor.feature_extractor.tensors(clip)
    batch = processor.feature_extractor.collate([tensors]).to(model.device)
    prompts, answers = [item.example.prompt for item in judged], [item.predicted or "" for item in judged]
    attention = compute_attention_by_chunk(model, processor, tensors, prompts, answers)
    return OneClip(
        media=media,
        edges=clip.timeline.edges,
        frames=_move_channels_last(tensors["video"]) if clip.has_video else None,
        reconstruction=reconstruct_clip(model, processor, model.encode(**batch)),
        spectrogram=tensors["audio"].flatten(0, 1).float().numpy() if clip.has_audio else None,
        judged=tuple(judged),
        attention=attention.numpy(),
    )


def reconstruct_clip(
    model: MirasolNetwork, processor: TextCoder, encoded: MirasolEncoderOutput
) -> UInt8[np.ndarray, "chunk frame height width 3"]:
    """The model's pictures of the last chunks of an encoded clip: see `OneClip.reconstruction`."""
    settings, frames = model.config.reconstruction, model.config.video.frames_per_chunk
    patches, _ = model.reconstruction(encoded.latents)
    predicted = model.reconstruction.video(patches)[0]
    if settings.step == "next":
        predicted = predicted[:-1]
    if settings.frames is not None:
        # Each predicted frame represents several frames of the chunk.
        predicted = predicted.repeat_interleave(frames // settings.frames, dim=1)
    return _move_channels_last(processor.feature_extractor.pixels(predicted.float().cpu()))


def _move_channels_last(video: Tensor) -> np.ndarray:
    return np.ascontiguousarray(video.permute(0, 1, 3, 4, 2).numpy())


def examine_evaluated_clip(loaded: Loaded, evaluation: Evaluation) -> OneClip | None:
    """The evaluation's most varied clip, see `choose_clip`; None if none fits a page or its file is missing."""
    short = [item for item in evaluation.protocols[OPEN].judged if evaluation.chunks[item.example.id] <= MOST_CHUNKS]
    judged = choose_clip(short)[:MOST_QUESTIONS]
    if not judged:
        return None
    example = judged[0].example
    try:
        with open_media_file(evaluation.dataset.root, example.media) as path:
            clip = loaded.processor.feature_extractor.read(path, example.start, example.end)
    except BadClip:
        return None
    return examine_clip(loaded, clip, example.media, judged)


def choose_clip(judged: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    """The answers about the clip whose questions cover the most types; among equals the one with the most questions,
    then the first. Nothing where there are no answers."""
    by_clip: dict[tuple[str, float | None, float | None], list[JudgedAnswer]] = defaultdict(list)
    for item in judged:
        by_clip[item.example.media, item.example.start, item.example.end].append(item)
    return max(by_clip.values(), key=lambda own: (len({i.example.type_name for i in own}), len(own)), default=[])


def describe_one_clip(one: OneClip) -> dict[str, Any]:
    """The clip's pictures and attention for the page, one column per chunk."""
    chunks = len(one.edges) - 1
    expected = [_draw_filmstrip(chunk) for chunk in one.reconstruction]
    is_expected = len(expected) < chunks  # the first chunk cannot be predicted
    strongest = max(float(one.attention.max(initial=0)), 1e-9)
    return {
        "media": one.media,
        "chunks": chunks,
        "edges": one.edges,
        "seen": [_draw_filmstrip(chunk) for chunk in one.frames] if one.frames is not None else None,
        "expected": [None] * (chunks - len(expected)) + expected,
        "is_expected": is_expected,
        "frames_per_chunk": one.reconstruction.shape[1] if len(one.reconstruction) else 1,
        # Low tones at the bottom.
        "spectrogram": make_picture_url(map_to_colours(one.spectrogram.T[::-1]))
        if one.spectrogram is not None
        else None,
        "questions": [
            {
                "prompt": item.example.prompt,
                "answer": item.shown_answer,
                "target": item.example.target,
                "right": item.right,
                "attention": [(float(share), float(share) / strongest) for share in row],
            }
            for item, row in zip(one.judged, one.attention, strict=True)
        ],
    }


def _draw_filmstrip(frames: np.ndarray) -> str:
    """The frames of one chunk, [F, height, width, 3], in one row: the page shows one of them, and plays all of them
    under the pointer."""
    return make_picture_url(np.ascontiguousarray(np.concatenate(list(frames), axis=1)), LARGEST_FRAME)
