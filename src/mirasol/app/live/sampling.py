"""The offline samplers of pictures and sound, for media without a known end: what is wanted is added as time goes on,
and what is ready is taken away."""

import math
from collections import deque

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mirasol.media.audio import WaveformBuilder
from mirasol.media.limits import Limits
from mirasol.media.video import TIME_TOLERANCE, FrameSampler

MARGIN_SECONDS = 0.05  # of sound on both sides of a chunk: more than any analysis window reaches over its edge
BLOCK_SECONDS = 0.04  # of sound that is resampled at once: it waits no longer than a frame does


class OpenFrameSampler(FrameSampler):
    """Pictures for the wanted times of the chunks that have not been taken yet."""

    def __init__(self, file: object, stream: VideoStream | None, size: int, fit: str, limits: Limits, untimed: bool):
        super().__init__(file, stream, [], size, fit, limits, count_frames=untimed)
        self._ready: deque[tuple[float, np.ndarray]] = deque()  # for the first wanted times
        self.size_shown: tuple[int, int] | None = None
        self.size_changes: list[str] = []

    @property
    def num_ready(self) -> int:
        return self._next

    def want(self, times: list[float]) -> None:
        """Adds ascending times, container seconds."""
        self.wanted.extend(times)

    def want_only(self, count: int) -> None:
        """Of what is wanted, only the first `count` times: the source has ended."""
        del self.wanted[count:]
        self._next = min(self._next, count)

    def hold(self, count: int) -> None:
        """Shows what there is for the first `count` wanted times: nothing newer is waited for."""
        self._decode_held(math.inf)
        if self._next < count and self._shown is not None:
            self._keep_until(self.wanted[count - 1] + 2 * TIME_TOLERANCE)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures [count, 3, size, size] and their times for the first `count` wanted times, which are forgotten; none
        where not all of them have one."""
        del self.wanted[:count]
        self._next = max(0, self._next - count)
        taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
        if len(taken) < count:
            return np.zeros((0, 3, self.size, self.size), np.uint8), np.zeros(0)
        return np.stack([picture for _, picture in taken]), np.array([time for time, _ in taken])

    def restart(self) -> None:
        """Another connection follows: what it shows comes after what was shown."""
        self._decode_held(math.inf)

    def _keep_until(self, time: float) -> None:
        first = self._next
        while not self.done and self.wanted[self._next] < time - TIME_TOLERANCE:
            self._next += 1
        if self._next > first:
            picture = np.zeros((3, self.size, self.size), np.uint8)
            self._draw(self._shown, picture)
            self._ready.extend([(self._shown_time, picture)] * (self._next - first))
            self.counts.frames_converted += 1

    def _draw(self, frame: VideoFrame, square: np.ndarray) -> None:
        size = (frame.width, frame.height)
        if self.size_shown not in (None, size):
            self.size_changes.append(
                f"pictures of {size[0]}x{size[1]} follow those of {'x'.join(map(str, self.size_shown))}"
            )
        self.size_shown = size
        super()._draw(frame, square)


class OpenWaveform(WaveformBuilder):
    """Sound from `start` container seconds on, at `sample_rate` Hz."""

    def __init__(self, stream: AudioStream | None, start: float, sample_rate: int, joints: tuple[float, ...] = ()):
        super().__init__(stream, start, start, sample_rate, joints, block_seconds=BLOCK_SECONDS)
        self.end = math.inf
        self._pieces: deque[tuple[int, np.ndarray]] = deque()
        self._forgotten = 0  # samples before this one are gone
        self._given = 0  # samples before this one are in chunks that are given out
        self.late_samples = 0

    @property
    def reached(self) -> float:
        """Container second up to which the sound is complete."""
        return self.start + self._position / self.sample_rate if self._runs else -math.inf

    def _write(self, frames: list[AudioFrame]) -> None:
        for frame in frames:
            samples = frame.to_ndarray().reshape(-1).astype(np.float32, copy=False)
            stop = self._position + len(samples)
            low = max(self._position, 0)
            if low < stop:
                self.late_samples += max(0, min(stop, self._given) - low)
                self._pieces.append((low, samples[low - self._position :]))
                self._runs[-1][1] = stop
            self._position = stop

    def has_sound(self, left: float, right: float) -> bool:
        """Whether any real sample is in [left, right) container seconds; as `find_present`."""
        first, stop = (left - self.start) * self.sample_rate, (right - self.start) * self.sample_rate
        return any(run[0] < stop - 0.5 and run[1] > first + 0.5 for run in self._runs if run[1] > run[0])

    def take(self, left: float, right: float, ends: bool = False) -> tuple[np.ndarray, float]:
        """The samples of [left, right) container seconds and a little on both sides, silence where there are none, and
        the container second of the first. Samples before `right` are forgotten, up to that little. With `ends` there is
        nothing after `right`."""
        margin = round(MARGIN_SECONDS * self.sample_rate)
        edge = round((right - self.start) * self.sample_rate)
        first = max(0, round((left - self.start) * self.sample_rate) - margin)
        samples = np.zeros(max(0, edge + (0 if ends else margin) - first), np.float32)
        for begin, piece in self._pieces:  # the later one counts
            low, high = max(begin, first), min(begin + len(piece), first + len(samples))
            if low < high:
                samples[low - first : high - first] = piece[low - begin : high - begin]
        self._given = max(self._given, edge)
        self._forget(edge - margin)
        return samples, self.start + first / self.sample_rate

    def _forget(self, sample: int) -> None:
        self._forgotten = max(self._forgotten, sample)
        self._pieces = deque((begin, piece) for begin, piece in self._pieces if begin + len(piece) > self._forgotten)
        self._runs[:-1] = [run for run in self._runs[:-1] if run[1] > self._forgotten]
