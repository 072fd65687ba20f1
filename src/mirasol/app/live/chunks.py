"""What the process that decodes and the one that watches tell each other. No torch, no PyAV."""

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from mirasol.config.media import MediaConfig
from mirasol.errors import UserError
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.timeline import Timeline

# The analysis of a chunk's sound reaches beyond its last edge: by up to a hop, where its length is no number of hops,
# and by 7.5 ms, half of what a window is longer than a hop.
REACH_SECONDS = 0.0185
DROPPED = "dropped"  # the machine is slower than the source


@dataclass(frozen=True)
class LiveChunk:
    """One chunk of a source, in the units of `mirasol.media.clip.Clip`. Seconds count from where watching began.

    number: 0 for the first chunk
    timeline: of this chunk alone
    source_start: when it begins by the source's own clock
    frames: the pictures of the chunk, none where it has no video
    frame_times: when each of them began to be shown
    waveform: the sound of the chunk and a little on both sides, none where it has no sound
    waveform_start: second of waveform[0]
    arrived: `time.monotonic()` when the last of it came in
    missing: why it is empty, "" where it is what the source sent
    """

    number: int
    timeline: Timeline
    source_start: float
    frames: UInt8[np.ndarray, "frame 3 height width"]
    frame_times: Float64[np.ndarray, " frame"]
    waveform: Float32[np.ndarray, " sample"]
    waveform_start: float
    has_video: bool
    has_audio: bool
    arrived: float
    missing: str = ""

    @property
    def start(self) -> float:
        return self.timeline.start

    @property
    def end(self) -> float:
        return self.timeline.end

    def drop(self) -> "LiveChunk":
        """The chunk without its content, at the same place."""
        return dataclasses.replace(
            self,
            frames=self.frames[:0],
            frame_times=self.frame_times[:0],
            waveform=self.waveform[:0],
            has_video=False,
            has_audio=False,
            missing=DROPPED,
        )


@dataclass(frozen=True)
class LiveSettings:
    """How a source is read.

    media: the checkpoint's settings
    chunk_seconds: length of a chunk where the source has no length of its own; by default the checkpoint's
    fast: a file as fast as it can be read, not as it plays
    drop: what to do when chunks wait for the model: drop the content of the oldest, or let the source wait. By
        default what would go on by itself is dropped, and what can wait waits.
    most_waiting: how many chunks wait for the model before one is dropped, or the source waits; by as many decoding may
        be behind what goes on by itself
    patience: seconds by which one stream may be behind the other before its chunks go on without it; by default 1 for
        what goes on by itself, 10 for what can wait
    stall: seconds without anything new after which a source counts as broken off
    retries: how often in a row a source is tried again, after 0.5, 1, 2, 4, … at most 30 seconds
    first_retry: seconds before the first of them
    start, end: second of a file where watching begins and ends
    """

    media: MediaConfig
    chunk_seconds: float | None = None
    fast: bool = False
    drop: bool | None = None
    most_waiting: int = 4
    patience: float | None = None
    stall: float = 10.0
    retries: int = 5
    first_retry: float = 0.5
    start: float | None = None
    end: float | None = None
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self):
        for name in ("chunk_seconds", "stall", "first_retry"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name}={value} must be positive")
        if self.most_waiting < 1 or self.retries < 0:
            raise UserError(f"most_waiting={self.most_waiting} must be at least 1, retries={self.retries} at least 0")

    @property
    def usual_seconds(self) -> float | None:
        """Length of a chunk of a source without an end; None where nobody says."""
        return self.chunk_seconds or self.media.chunk_seconds


@dataclass
class LiveCounts:
    """What came in, and what of it did not reach the model.

    chunks: given to the model, those without content included. dropped: because the model was slower than the source.
    undecoded: dropped because decoding was.
    empty: in which the source had neither picture nor sound.
    packets: read. packets_failed: that could not be decoded. before_keyframe: video that nothing could be made of.
    late_samples: of sound that came after its chunk. jumps: of the source's clock. gap_seconds: without anything.
    connections, crashes: how often the source was opened, how often the decoder had to be started again.
    """

    chunks: int = 0
    dropped: int = 0
    undecoded: int = 0
    empty: int = 0
    packets: int = 0
    packets_failed: int = 0
    frames: int = 0
    before_keyframe: int = 0
    late_samples: int = 0
    jumps: int = 0
    gap_seconds: float = 0.0
    connections: int = 0
    crashes: int = 0

    def add(self, other: "LiveCounts") -> None:
        for part in dataclasses.fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass(frozen=True)
class Resume:
    """Where a connection goes on that follows another one.

    next_chunk: number of the first chunk that has not been given out
    zero: where watching began, by the source's clock
    latest: how far the source had come
    shift: seconds added to its time stamps
    first_stamps: with which time stamps the connections before began
    arrived: `time.monotonic()` of the last packet
    """

    next_chunk: int
    zero: float
    latest: float
    shift: float
    first_stamps: tuple[float, ...]
    arrived: float


@dataclass(frozen=True)
class Progress:
    """What a connection has come to.

    ended: None while it goes on; "" at the source's end; else why it broke off
    notes: what has happened since, one line each
    total: how many chunks the source has, None where that is not known
    """

    ended: str | None
    counts: LiveCounts
    notes: tuple[str, ...] = ()
    resume: Resume | None = None
    arrived: float = 0.0
    total: int | None = None
    chunks: tuple[LiveChunk, ...] = field(default=(), repr=False)
