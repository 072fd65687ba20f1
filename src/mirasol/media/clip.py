"""What the reader returns: the frames kept, the waveform, and the time of each."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

from mirasol.media.decoded import AudioCounts, DecodedWindow, VideoCounts
from mirasol.media.timeline import Timeline


@dataclass(frozen=True)
class Clip:
    """A window of a media file, decoded for one chunk grid. Seconds count from the beginning of the media.

    frames: the T x F frames of the grid in order, RGB, fitted to a square; a frame wanted twice appears twice;
        none (0 frames) when there is no video.
    frame_times: presentation time of each of these frames, seconds.
    waveform: mono samples in about [-1, 1]; zeros where the audio has gaps; empty when there is no audio.
    waveform_start: second of waveform[0].
    sample_rate: Hz.
    timeline: the chunks the clip was read for.
    audio_present: False for chunks in whose span no audio sample exists.
    video_present: False for chunks that are entirely before the first frame was on show or after the last.
    notes: one line for every irregularity met.
    video_counts, audio_counts: what the reading took.
    """

    frames: UInt8[Tensor, "frame 3 height width"]
    frame_times: Float64[Tensor, " frame"]
    waveform: Float[Tensor, " sample"]
    waveform_start: float
    sample_rate: int
    timeline: Timeline
    audio_present: Bool[Tensor, " chunk"]
    video_present: Bool[Tensor, " chunk"]
    notes: tuple[str, ...] = ()
    video_counts: VideoCounts = field(default_factory=VideoCounts)
    audio_counts: AudioCounts = field(default_factory=AudioCounts)

    def __post_init__(self):
        chunks, per_chunk = self.timeline.num_chunks, self.timeline.frames_per_chunk
        assert len(self.frames) in (0, chunks * per_chunk), (len(self.frames), chunks, per_chunk)
        assert len(self.frame_times) == len(self.frames)
        assert self.audio_present.shape == self.video_present.shape == (chunks,)

    @classmethod
    def from_decoded(cls, decoded: DecodedWindow) -> "Clip":
        """The clip of a decoded window; its tensors share the memory of the window's arrays."""
        values = {field.name: getattr(decoded, field.name) for field in dataclasses.fields(decoded)}
        return cls(**{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()})

    @property
    def has_video(self) -> bool:
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        return len(self.waveform) > 0

    def mute(self) -> "Clip":
        """The clip without its sound."""
        silent, notes = torch.zeros_like(self.audio_present), (*self.notes, "its sound is left out")
        return dataclasses.replace(self, waveform=torch.zeros(0), audio_present=silent, notes=notes)
