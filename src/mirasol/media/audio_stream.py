"""Audio packets in, one mono waveform out, every sample at its own presentation time."""

from dataclasses import dataclass, field

import av
import av.error
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.packet import Packet
from jaxtyping import Bool, Float
from torch import Tensor

from mirasol.media.timeline import Timeline

# A jump of the time stamps by more than this is a gap or an overlap. Matroska rounds to whole milliseconds, so less
# must not count; a click may be off by 5 ms at most, so much more must not either.
JUMP_SECONDS = 0.004


@dataclass
class AudioCounts:
    """What the decoder met."""

    packets_failed: int = 0
    frames_decoded: int = 0
    gaps: int = 0
    gap_seconds: float = 0.0
    overlaps: int = 0
    changes: int = 0


@dataclass
class WaveformBuilder:
    """Mono waveform of [start, end] container seconds at `sample_rate` Hz.

    Feed it the packets of one stream in file order, then `finish`. Samples without a gap are resampled as one run
    (FFmpeg's resampler, which also mixes channels down); each run is written where its first sample's time says.
    """

    stream: AudioStream
    start: float
    end: float
    sample_rate: int
    counts: AudioCounts = field(default_factory=AudioCounts)
    first_time: float | None = None
    last_end: float | None = None
    """End of the last sample decoded, within the window or not."""

    def __post_init__(self):
        self._buffer = np.zeros(max(0, round((self.end - self.start) * self.sample_rate)), np.float32)
        self._runs: list[list[int]] = []  # [first, stop) of real samples in the buffer
        self._resampler: AudioResampler | None = None
        self._kind: tuple | None = None
        self._position = 0  # where the next resampled sample goes
        self._expected = 0.0  # container seconds at which the next decoded sample should stand
        self._run_time, self._run_samples = 0.0, 0  # where the run began, decoded samples since
        self.mixed_from: str | None = None

    @property
    def done(self) -> bool:
        return self.last_end is not None and self.last_end >= self.end

    def feed(self, packet: Packet) -> None:
        """Takes the next packet."""
        if not self.done:
            self._decode(packet)

    def finish(self) -> None:
        """End of the stream or of the window."""
        if not self.done:
            self._decode(None)
        self._end_run()

    def _decode(self, packet: Packet | None) -> None:
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            self.counts.packets_failed += 1
            return
        for frame in frames:
            self._take(frame)

    def _take(self, frame: AudioFrame) -> None:
        self.counts.frames_decoded += 1
        if frame.samples == 0:
            return
        time = self._expected if frame.pts is None else float(frame.pts * frame.time_base)
        stop = time + frame.samples / frame.sample_rate
        if stop <= self.start:
            # Before the window: the decoder only had to warm up.
            self._expected = stop
            return
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        self._note_jump(time, kind)
        if self._resampler is None:
            self._begin_run(frame, time, kind)
        samples = frame.samples
        frame.pts = None  # the run's own count places its samples
        self._write(self._resampler.resample(frame))
        if self.first_time is None:
            self.first_time = time
        self.last_end = stop
        # Counted from the beginning of the run, so that a clock that drifts is caught before it is out by a chunk.
        self._run_samples += samples
        self._expected = self._run_time + self._run_samples / self._kind[2]

    def _note_jump(self, time: float, kind: tuple) -> None:
        """Ends the current run where the time stamps jump or the kind of sound changes."""
        if self._resampler is None:
            return
        jump = time - self._expected
        if jump > JUMP_SECONDS:
            self.counts.gaps += 1
            self.counts.gap_seconds += jump
        elif jump < -JUMP_SECONDS:
            self.counts.overlaps += 1
        if kind != self._kind:
            self.counts.changes += 1
        if abs(jump) > JUMP_SECONDS or kind != self._kind:
            self._end_run()

    def _begin_run(self, frame: AudioFrame, time: float, kind: tuple) -> None:
        self._kind, self._run_time, self._run_samples = kind, time, 0
        self._resampler = AudioResampler(format="flt", layout="mono", rate=self.sample_rate)
        self._position = round((time - self.start) * self.sample_rate)
        self._runs.append([max(0, self._position), max(0, self._position)])
        if frame.layout.nb_channels > 2:
            self.mixed_from = f"{frame.layout.nb_channels} channels ({frame.layout.name})"

    def _end_run(self) -> None:
        if self._resampler is not None:
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

    def result(self) -> tuple[Float[Tensor, "sample"], float]:
        """The waveform from its first to its last real sample, and the container second of the first."""
        runs = [run for run in self._runs if run[1] > run[0]]
        if not runs:
            return torch.zeros(0), self.start
        first, stop = min(run[0] for run in runs), max(run[1] for run in runs)
        return torch.from_numpy(self._buffer[first:stop]), self.start + first / self.sample_rate

    def present(self, timeline: Timeline, zero: float) -> Bool[Tensor, "chunk"]:
        """Which chunks hold at least one real sample. `zero`: container second of the timeline's zero."""
        edges = [(edge + zero - self.start) * self.sample_rate for edge in timeline.edges]
        return torch.tensor(
            [
                any(run[0] < right - 0.5 and run[1] > left + 0.5 for run in self._runs if run[1] > run[0])
                for left, right in zip(edges[:-1], edges[1:], strict=True)
            ]
        )
