"""What the reader hands on: the frames kept, the waveform, and the time of each."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

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
class Clip:
    """A window of a media file, decoded for one chunk grid. Seconds count from the beginning of the media.

    frames: the T x F frames of the grid in order, RGB, fitted to a square; a frame wanted twice stands there twice;
        none (0 frames) when there is no video.
    frame_times: presentation time of each of these frames, seconds.
    waveform: mono samples in about [-1, 1]; zeros where the audio has gaps; empty when there is no audio.
    waveform_start: second of waveform[0].
    sample_rate: Hz.
    timeline: the chunks the clip was read for.
    audio_present: False for chunks in whose span no audio sample exists.
    video_present: False for chunks that lie wholly before the first or after the last frame was on show.
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

    @property
    def has_video(self) -> bool:
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        return len(self.waveform) > 0
