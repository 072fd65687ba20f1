"""What decoding a window of a file gives, as NumPy arrays: a process that decodes does not need torch."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from mirasol.media.timeline import Timeline


@dataclass
class VideoCounts:
    """What decoding the video took and met. Skipped packets were never decoded, corrupt ones are shown."""

    packets_skipped: int = 0
    packets_failed: int = 0
    frames_decoded: int = 0
    frames_converted: int = 0
    frames_corrupt: int = 0
    frames_out_of_order: int = 0
    frames_untimed: int = 0
    frames_interlaced: int = 0
    frames_transparent: int = 0


@dataclass
class AudioCounts:
    """What decoding the audio took and met."""

    packets_failed: int = 0
    frames_decoded: int = 0
    gaps: int = 0
    gap_seconds: float = 0.0
    overlaps: int = 0
    jitters: int = 0
    changes: int = 0


@dataclass(frozen=True)
class DecodedWindow:
    """The fields of a `Clip`, which says what they are, before they become tensors."""

    frames: UInt8[np.ndarray, "frame 3 height width"]
    frame_times: Float64[np.ndarray, " frame"]
    waveform: Float32[np.ndarray, " sample"]
    waveform_start: float
    sample_rate: int
    timeline: Timeline
    audio_present: Bool[np.ndarray, " chunk"]
    video_present: Bool[np.ndarray, " chunk"]
    notes: tuple[str, ...]
    video_counts: VideoCounts = field(default_factory=VideoCounts)
    audio_counts: AudioCounts = field(default_factory=AudioCounts)
