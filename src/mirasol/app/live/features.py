"""Chunks of a live source as the tensors that a model takes, by the offline reader's own arithmetic."""

import torch
from torch import Tensor

from mirasol.app.live.chunks import LiveChunk
from mirasol.media.clip import Clip
from mirasol.media.feature_extractor import MirasolFeatureExtractor


def make_clip(chunk: LiveChunk, sample_rate: int) -> Clip:
    """The chunk as a clip of one chunk."""
    return Clip(
        frames=torch.from_numpy(chunk.frames.copy()),
        frame_times=torch.from_numpy(chunk.frame_times.copy()),
        waveform=torch.from_numpy(chunk.waveform.copy()),
        waveform_start=chunk.waveform_start,
        sample_rate=sample_rate,
        timeline=chunk.timeline,
        audio_present=torch.tensor([chunk.has_audio]),
        video_present=torch.tensor([chunk.has_video]),
    )


def compute_chunk_tensors(extractor: MirasolFeatureExtractor, chunk: LiveChunk) -> dict[str, Tensor]:
    """What `MirasolFeatureExtractor.tensors` gives for a clip of this chunk alone; rows of what it gives for all."""
    return extractor.tensors(make_clip(chunk, extractor.sample_rate))
