"""Small untrained models of every Combiner and clips in memory, for the tests of `explain`."""

import functools

import numpy as np
import torch

from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration, MirasolProcessor
from mirasol.media.clip import Clip
from mirasol.media.timeline import ChunkGrid, cut_into_chunks
from mirasol.media.tokenizer import train_tokenizer

TTM = {"read_tokens": 12, "memory_tokens": 6, "learner_hidden": 16, "hidden": 32, "heads": 2, "head_width": 16}
GATED = {"gated": True, "bias": False}
COMBINERS = {
    "transformer": {},
    "transformer of a chunk": {"scope": "chunk"},
    "transformer, a window, audio last": {"window": 2, "token_order": "audio_last"},
    "transformer, gated, one layer": {"stack": {**GATED, "depth": 1}},
    "cls": {"kind": "cls", "m": 7},
    "cls of a chunk": {"kind": "cls", "m": 7, "scope": "chunk"},
    "perceiver": {"kind": "perceiver", "m": 7},
    "perceiver of a chunk": {"kind": "perceiver", "m": 7, "scope": "chunk"},
    "ttm": {"kind": "ttm", "m": 7, "ttm": TTM},
    "late": {"kind": "late"},
    "late of a chunk": {"kind": "late", "scope": "chunk"},
    "concat": {"kind": "concat"},
}
QUESTION = "which shape is seen last?"
TEXTS = [QUESTION, "a red circle", "the bell, then a low hum", "in what order do the sounds come?"]


@functools.cache
def make_model(
    name: str, dtype: str = "float32", latent: str = "transformer"
) -> tuple[MirasolForConditionalGeneration, MirasolProcessor]:
    """A model with the Combiner of that name and that kind of latent model, whose weights are larger than usual so that
    no attention is even."""
    tokenizer = train_tokenizer(TEXTS, 300)
    parts = {"combiner": COMBINERS[name], "latent": {"kind": latent}, "text": {"vocab_size": len(tokenizer)}}
    config = MirasolConfig.preset("tiny", **parts)
    torch.manual_seed(4)
    model = MirasolForConditionalGeneration(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("query.weight", "key_value.weight", "scores.weight")):
                weight.mul_(4.0)
    return model.to(getattr(torch, dtype)), MirasolProcessor(MirasolFeatureExtractor.for_config(config), tokenizer)


def make_clip(chunks: int = 4, video: bool = True, audio: bool = True, gaps: bool = False, seed: int = 0) -> Clip:
    """Noise of both kinds, from second 1 of a file on; with `gaps` chunk 1 has no picture and the last no sound."""
    generator = torch.Generator().manual_seed(seed)
    timeline = cut_into_chunks(1.0, 1.0 + 0.5 * chunks, ChunkGrid(4, 0.5, None, 64))
    frames = torch.randint(0, 256, (4 * chunks if video else 0, 3, 32, 32), generator=generator, dtype=torch.uint8)
    waveform = 0.3 * torch.randn(8_000 * chunks if audio else 0, generator=generator)
    present = torch.ones(2, chunks, dtype=torch.bool)
    present[0] &= video
    present[1] &= audio
    if gaps:
        present[0, min(1, chunks - 1)] = present[1, -1] = False
    times = torch.tensor(np.array(timeline.frame_times).flatten()[: len(frames)], dtype=torch.float64)
    return Clip(frames, times, waveform, 1.0, 16_000, timeline, present[1], present[0])


def list_fields(value: object) -> dict[str, np.ndarray]:
    """All arrays of a dataclass by name, those of the dataclasses in it too."""
    found = {}
    for key, own in vars(value).items():
        if isinstance(own, np.ndarray):
            found[key] = own
        elif hasattr(own, "__dataclass_fields__"):
            found |= {f"{key}.{inner}": array for inner, array in list_fields(own).items()}
    return found
