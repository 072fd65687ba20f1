"""Audio packets in, one mono waveform out, every sample at its own presentation time."""

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame, format_dtypes
from av.audio.layout import AudioLayout
from av.audio.plane import AudioPlane
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.packet import Packet
from jaxtyping import Bool, Float

from mirasol.media.container import get_packet_times
from mirasol.media.decoded import AudioCounts
from mirasol.media.isolation.shared import allocate_array
from mirasol.media.timeline import Timeline

# A jump of the time stamps by more than this is a gap or an overlap. Matroska rounds to whole milliseconds, so less
# must not count; a click may be off by 5 ms at most, so much more must not either.
JUMP_SECONDS = 0.004
# Yet stamps may jump and come back (Vorbis does, by 10 ms, where its block size changes). A jump is believed at once
# when it is long, otherwise when it has lasted; until then its samples wait. So do a run's first, to agree on its time.
CLEAR_JUMP_SECONDS = 0.040
DOUBT_SECONDS = 0.100
BLOCK_SECONDS = 0.5
WARM_UP_SECONDS = 10.0  # packets that end longer before the window are not decoded
# Channels are averaged, not added up: FFmpeg's default lets the same sound in two channels come out 1.4 times as loud
# (in 5.1 channels 3.4 times), and clip.
MIXING = {"rematrix_maxval": "1.0"}
# Channels that FFmpeg's downmix knows; others it silently drops, and of layouts without names it guesses some.
KNOWN_CHANNELS = ("FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC", "SL", "SR", "TFL", "TFR", "DL", "DR")
LOW_FREQUENCY = ("LFE", "LFE2")


def concatenate_frames(frames: list[AudioFrame]) -> np.ndarray:
    """Samples of frames of one kind, [channel, sample] if channels are in planes, otherwise [1, sample x channel].

    What `to_ndarray` of every frame gives, at a quarter of its cost. Not from `frame.planes`: in PyAV 18.1 that tuple
    is too long from 8 channels on, and what is behind the last real plane is foreign memory.
    """
    kind, channels = frames[0].format, frames[0].layout.nb_channels
    dtype = np.dtype(format_dtypes[kind.name])
    planes, per_sample = (channels, 1) if kind.is_planar else (1, channels)
    return np.stack(
        [
            np.concatenate(
                [np.frombuffer(AudioPlane(frame, number), dtype, frame.samples * per_sample) for frame in frames]
            )
            for number in range(planes)
        ]
    )


def is_mixed_by_ffmpeg(layout: AudioLayout) -> bool:
    """Whether FFmpeg mixes all channels of a layout down to one."""
    if layout.name in ("1 channels", "2 channels"):
        return True
    return "+" not in layout.name and all(channel.name in KNOWN_CHANNELS for channel in layout.channels)


def _mix_channels(samples: np.ndarray, layout: AudioLayout) -> np.ndarray:
    """Mono float samples [1, sample] of [channel, sample] in a layout that FFmpeg's downmix does not fully cover."""
    if layout.name.startswith("ambisonic"):
        samples = samples[:1]
    elif 0 < sum(channel.name in LOW_FREQUENCY for channel in layout.channels) < len(samples):
        samples = samples[[channel.name not in LOW_FREQUENCY for channel in layout.channels]]
    mixed = samples.mean(axis=0, dtype=np.float64)
    if samples.dtype == np.uint8:
        mixed = (mixed - 128) / 128
    elif samples.dtype.kind == "i":
        mixed /= -float(np.iinfo(samples.dtype).min)
    return mixed.astype(np.float32)[None]


@dataclass
class WaveformBuilder:
    """Mono waveform of [start, end] container seconds at `sample_rate` Hz.

    Feed it the packets of one stream in file order, then `finish`. Samples without a gap are resampled as one run
    (FFmpeg's resampler, which also mixes channels down); each run is written where its first sample's time says.
    """

    stream: AudioStream | None
    start: float
    end: float
    sample_rate: int
    joints: tuple[float, ...] = ()
    """Container seconds at which recordings meet, see `Span`."""
    counts: AudioCounts = field(default_factory=AudioCounts)
    last_end: float | None = None
    """End of the last sample taken."""
    packets_end: float = -math.inf
    """End of the last packet fed."""
    block_seconds: float = BLOCK_SECONDS
    """How much sound is resampled at once; changes speed and delay only."""

    def __post_init__(self):
        self.latest = -math.inf  # presentation time of the last packet fed
        self._tick = float(self.stream.time_base) if self.stream is not None else math.nan
        samples = max(0, round((self.end - self.start) * self.sample_rate))
        self._buffer = allocate_array((samples,), np.float32)
        self._runs: list[list[int]] = []  # [first, stop) of real samples in the buffer
        self._resampler: AudioResampler | None = None
        self._kind: tuple[str, str, int] | None = None
        self._joints = list(self.joints)
        self._untimed_end: float | None = None  # end of the last frame that was decoded, kept or not
        self._block: list[AudioFrame] = []  # decoded, not yet resampled
        self._block_samples = 0
        self._waiting: list[tuple[float, AudioFrame]] = []
        self._position = 0  # where the next resampled sample goes
        self._expected = 0.0  # container seconds at which the next decoded sample should begin
        self._run_time, self._run_samples = 0.0, 0  # where the run began, decoded samples since
        self.mixed_from: str | None = None
        self.mixing = ""  # how, where it is not FFmpeg's downmix

    @property
    def done(self) -> bool:
        return self.last_end is not None and self.last_end >= self.end

    @property
    def incomplete(self) -> bool:
        """After `finish`: whether the sound ends before the window does."""
        return not self.done

    def feed(self, packet: Packet) -> None:
        """Takes the next packet."""
        self.latest, end = get_packet_times(packet, self._tick)
        self.packets_end = max(self.packets_end, end)
        if not self.done and not -math.inf < end < self.start - WARM_UP_SECONDS:
            self._decode(packet)

    def change_stream(self, stream: AudioStream) -> None:
        """Goes on with another stream, of which all packets to come are: the one before has ended."""
        if not self.done:
            self._decode(None)
        self.stream, self._tick = stream, float(stream.time_base)

    def finish(self) -> None:
        """End of the stream or of the window."""
        if not self.done:
            self._decode(None)
        self._settle()
        self._end_run()

    def _decode(self, packet: Packet | None) -> None:
        if self.stream is None:
            return
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            # What fails before the window is a decoder warming up after a seek.
            self.counts.packets_failed += packet is None or get_packet_times(packet, self._tick)[1] > self.start
            return
        for frame in frames:
            self._take(frame)

    def _take(self, frame: AudioFrame) -> None:
        self.counts.frames_decoded += 1
        time = self._find_time(frame)
        self._untimed_end = time + frame.samples / frame.sample_rate
        while self._joints and time >= self._joints[0]:
            # However small the jump here is, what follows is another recording.
            self._joints.pop(0)
            follows = bool(self._waiting) or self._resampler is not None
            jump = time - self._compute_next_time() if follows else 0.0
            self._settle()
            self._end_run()
            if abs(jump) > JUMP_SECONDS:
                self._count_jump(jump, time)
        if frame.samples == 0 or time + frame.samples / frame.sample_rate <= self.start - DOUBT_SECONDS:
            return
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind:
            self.counts.changes += self._kind is not None
            self._settle()
            self._end_run()
            self._kind = kind
        jump = time - self._compute_next_time() if self._waiting or self._resampler is not None else 0.0
        if abs(jump) > CLEAR_JUMP_SECONDS:
            self._settle(jump=False)
            self._end_run()
            self._count_jump(jump, time)
        elif self._resampler is not None and abs(jump) <= JUMP_SECONDS:
            self._settle(jump=False)
            self._append(frame)
            return
        self._waiting.append((time, frame))
        if sum(held.samples for _, held in self._waiting) >= DOUBT_SECONDS * frame.sample_rate:
            self._settle()

    def _find_time(self, frame: AudioFrame) -> float:
        """Container seconds at which a frame begins; without a time of its own, right after the one before it."""
        if frame.pts is not None:
            return frame.pts * self._tick
        if self._waiting or self._resampler is not None:
            return self._compute_next_time()
        if self._untimed_end is not None:
            return self._untimed_end
        return self.latest if math.isfinite(self.latest) else 0.0

    def _compute_next_time(self) -> float:
        """When the next frame should begin if everything so far is one run."""
        begin = self._expected if self._resampler is not None else self._waiting[0][0]
        held = sum(frame.samples for _, frame in self._waiting) if self._waiting else 0
        return begin + held / self._kind[2]

    def _settle(self, jump: bool = True) -> None:
        """Decides about the frames that wait.

        They begin a run, at the time on which most of them agree; or, where one is under way, their times are a jump
        that has lasted (they begin a new run), or one that came to nothing (they go on with it).
        """
        frames, self._waiting = self._waiting, []
        if not frames:
            return
        if self._resampler is not None and jump:
            self._count_jump(frames[0][0] - self._expected, frames[0][0])
            self._end_run()
        elif self._resampler is not None:
            self.counts.jitters += 1
        if self._resampler is None:
            self._begin_run(frames)
        for _, frame in frames:
            self._append(frame)

    def _count_jump(self, seconds: float, time: float) -> None:
        if time > self.start:
            self.counts.gaps += seconds > 0
            self.counts.gap_seconds += max(0.0, seconds)
            self.counts.overlaps += seconds < 0

    def _append(self, frame: AudioFrame) -> None:
        """Adds a frame to the run."""
        self._run_samples += frame.samples
        self._expected = self.last_end = self._run_time + self._run_samples / frame.sample_rate
        self._block.append(frame)
        self._block_samples += frame.samples
        if self._block_samples >= self.block_seconds * frame.sample_rate:
            self._resample_block()

    def _resample_block(self) -> None:
        """Resamples what has come together: packet by packet, calling the resampler costs more than its arithmetic."""
        if not self._block:
            return
        sample_format, name, rate = self._kind
        samples, layout = concatenate_frames(self._block), self._block[0].layout
        planar = self._block[0].format.is_planar
        if not is_mixed_by_ffmpeg(layout):
            channels = samples if planar else samples.reshape(-1, layout.nb_channels).T
            frame = AudioFrame.from_ndarray(_mix_channels(channels, layout), "flt", "mono")
        elif planar and layout.nb_channels >= 8:
            # PyAV would write past the last plane, see `concatenate_frames`.
            packed = np.ascontiguousarray(samples.T).reshape(1, -1)
            frame = AudioFrame.from_ndarray(packed, sample_format.removesuffix("p"), layout)
        else:
            frame = AudioFrame.from_ndarray(samples, sample_format, name)
        frame.sample_rate = rate
        self._block, self._block_samples = [], 0
        self._write(self._resampler.resample(frame))

    def _begin_run(self, frames: list[tuple[float, AudioFrame]]) -> None:
        self._resampler = AudioResampler(format="flt", layout="mono", rate=self.sample_rate, options=MIXING)
        begins, samples = [], 0
        for time, frame in frames:
            begins.append(time - samples / frame.sample_rate)
            samples += frame.samples
        self._run_time, self._run_samples = statistics.median(begins), 0
        self._position = round((self._run_time - self.start) * self.sample_rate)
        self._runs.append([max(0, self._position), max(0, self._position)])
        layout = frames[0][1].layout
        if layout.nb_channels > 2:
            self.mixed_from = f"{layout.nb_channels} channels ({layout.name})"
            self.mixing = ""
            if layout.name.startswith("ambisonic"):
                self.mixing = ": the omnidirectional channel"
            elif not is_mixed_by_ffmpeg(layout):
                self.mixing = ": the mean of its channels"

    def _end_run(self) -> None:
        if self._resampler is not None:
            self._resample_block()
            self._write(self._resampler.resample(None))
            self._resampler = None

    def _write(self, frames: list[AudioFrame]) -> None:
        for frame in frames:
            samples = frame.to_ndarray().reshape(-1)
            first, stop = self._position, self._position + len(samples)
            low, high = max(first, 0), min(stop, len(self._buffer))
            if low < high:
                self._buffer[low:high] = samples[low - first : high - first]
                self._runs[-1][1] = high
            self._position = stop

    def runs(self) -> Iterator[tuple[int, Float[np.ndarray, " sample"]]]:
        """Every run without a gap: at which sample after `start` it begins, and its samples."""
        for first, stop in self._runs:
            if stop > first:
                yield first, self._buffer[first:stop]

    def result(self) -> tuple[Float[np.ndarray, " sample"], float]:
        """The waveform from its first to its last real sample, and the container second of the first."""
        runs = [run for run in self._runs if run[1] > run[0]]
        if not runs:
            return np.zeros(0, np.float32), self.start
        first, stop = min(run[0] for run in runs), max(run[1] for run in runs)
        return self._buffer[first:stop], self.start + first / self.sample_rate

    def find_present(self, timeline: Timeline, zero: float) -> Bool[np.ndarray, " chunk"]:
        """Which chunks hold at least one real sample. `zero`: container second of the timeline's zero."""
        edges = [(edge + zero - self.start) * self.sample_rate for edge in timeline.edges]
        return np.array(
            [
                any(run[0] < right - 0.5 and run[1] > left + 0.5 for run in self._runs if run[1] > run[0])
                for left, right in itertools.pairwise(edges)
            ]
        )
