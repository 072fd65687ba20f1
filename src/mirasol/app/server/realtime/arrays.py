"""Frames and samples as they come in → chunks, as a file with them would be cut."""

import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from jaxtyping import Int16, UInt8

from mirasol.app.live.chunks import REACH_SECONDS, LiveChunk
from mirasol.config.media import MediaConfig
from mirasol.errors import UserError
from mirasol.media.inputs.arrays import draw_frames
from mirasol.media.timeline import Timeline
from mirasol.media.video import TIME_TOLERANCE

PATIENCE_SECONDS = 2.0  # by which one of the two may be ahead of the other before its chunks go on without it
MOST_AHEAD_SECONDS = 60.0  # by which a frame may follow the one before: the chunks between are empty


class ArrayChunks:
    """Chunks of `seconds` of the frames and samples that are appended. Pictures are fitted into their squares as they
    come: what waits is small."""

    def __init__(self, media: MediaConfig, seconds: float):
        self.media, self.seconds, self.number = media, seconds, 0
        self._frames: deque[tuple[float, np.ndarray]] = deque()
        self._newest = 0.0
        self._resampler: AudioResampler | None = None
        self._rate = 0
        self._sound_start = 0.0
        self._samples = np.zeros(0, np.float32)
        self._first_sample = 0  # its number since `_sound_start`
        self._ended = False

    def append_frame(self, frame: UInt8[np.ndarray, "height width 3"], second: float) -> None:
        """Takes a picture and the second at which it begins to be shown.

        Raises:
            UserError: it is not after the one before, or long after all else.
        """
        if self._frames and second <= self._newest:
            raise UserError(f"time={second:g}: the frame before was at {self._newest:g}: times ascend")
        self._check_time(second)
        square = draw_frames([frame], np.zeros(1, np.int64), self.media)[0]
        self._frames.append((second, square))
        self._newest = second

    def append_sound(self, samples: Int16[np.ndarray, " sample"], rate: int, second: float | None) -> None:
        """Takes more of the sound, mono. second: where it begins, of the first samples.

        Raises:
            UserError: another rate than before, or a beginning long after all else.
        """
        if self._resampler is None:
            self._sound_start = self.number * self.seconds if second is None else second
            self._check_time(self._sound_start)
            self._rate = rate
            self._resampler = AudioResampler(format="fltp", layout="mono", rate=self.media.sample_rate)
        if rate != self._rate:
            raise UserError(f"rate={rate}: the sound before was of {self._rate} Hz")
        frame = AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate
        self._add(self._resampler.resample(frame))

    def end(self) -> None:
        """Nothing more comes: what there is makes the last chunks."""
        if self._resampler is not None and not self._ended:
            self._add(self._resampler.resample(None))
        self._ended = True

    def take(self) -> Iterator[LiveChunk]:
        """The chunks that are complete."""
        while self._is_complete((self.number + 1) * self.seconds):
            yield self._make_chunk()
            self.number += 1

    def _check_time(self, second: float) -> None:
        if not 0 <= second <= max(self._newest, self._sound_end) + MOST_AHEAD_SECONDS:
            raise UserError(f"time={second:g}: give seconds from 0 on, at most {MOST_AHEAD_SECONDS:g} after the last")

    @property
    def _sound_end(self) -> float:
        if self._resampler is None:
            return 0.0
        return self._sound_start + (self._first_sample + len(self._samples)) / self.media.sample_rate

    def _is_complete(self, right: float) -> bool:
        seen, heard = bool(self._frames), self._resampler is not None
        furthest = max(self._newest if seen else 0.0, self._sound_end)
        if self._ended:
            return furthest > right - self.seconds / 2  # half of a chunk counts, as for files
        if furthest < right:
            return False
        late = furthest < right + PATIENCE_SECONDS
        waits = (seen and self._newest < right) or (heard and self._sound_end < right + REACH_SECONDS)
        return not (waits and late)

    def _add(self, frames: list[AudioFrame]) -> None:
        pieces = [frame.to_ndarray().reshape(-1).astype(np.float32, copy=False) for frame in frames]
        self._samples = np.concatenate([self._samples, *pieces])

    def _make_chunk(self) -> LiveChunk:
        left, right = self.number * self.seconds, (self.number + 1) * self.seconds
        timeline = Timeline(left, right, (left, right), self.media.frames_per_chunk)
        frames, times = self._take_frames(timeline, right)
        waveform, start = self._take_sound(left, right)
        return LiveChunk(
            number=self.number, timeline=timeline, source_start=left, frames=frames, frame_times=times,
            waveform=waveform, waveform_start=start, has_video=len(frames) > 0, has_audio=len(waveform) > 0,
            arrived=time.monotonic(),
        )  # fmt: skip

    def _take_frames(self, timeline: Timeline, right: float) -> tuple[np.ndarray, np.ndarray]:
        """What is on show at the chunk's times; pictures that no later chunk shows are forgotten."""
        size = self.media.image_size
        if not self._frames or self._frames[0][0] >= right:
            return np.zeros((0, 3, size, size), np.uint8), np.zeros(0)
        begins = np.array([second for second, _ in self._frames])
        wanted = np.array(timeline.frame_times[0]) + TIME_TOLERANCE
        chosen = np.clip(np.searchsorted(begins, wanted, side="right") - 1, 0, None)
        frames = np.stack([self._frames[place][1] for place in chosen])
        while len(self._frames) > 1 and self._frames[1][0] <= right:
            self._frames.popleft()
        return frames, begins[chosen]

    def _take_sound(self, left: float, right: float) -> tuple[np.ndarray, float]:
        """The chunk's samples and a little on both sides; older ones are forgotten."""
        rate = self.media.sample_rate
        margin = round(REACH_SECONDS * rate) + 1
        first = max(0, round((left - self._sound_start) * rate) - margin - self._first_sample)
        stop = round((right - self._sound_start) * rate) - self._first_sample
        if (
            self._resampler is None
            or stop <= 0
            or round((left - self._sound_start) * rate) >= (self._first_sample + len(self._samples))
        ):
            return np.zeros(0, np.float32), left
        waveform = self._samples[first : stop + margin].copy()
        start = self._sound_start + (self._first_sample + first) / rate
        dropped = max(0, min(stop - margin, len(self._samples)))
        self._samples, self._first_sample = self._samples[dropped:], self._first_sample + dropped
        return waveform, start
