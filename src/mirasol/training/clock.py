"""Time: of the whole training, and what its steps spend it on."""

import contextlib
import time


class Clock:
    """Seconds of training, and since the last lap clips per second, the share of time spent waiting for data, and how
    many clips were bad and replaced.

    Validation and checkpoints count into the seconds, not into the rates.
    """

    def __init__(self, seconds_before: float):
        self.before, self.began = seconds_before, time.monotonic()
        self._new_lap()

    def _new_lap(self) -> None:
        self.lap_began, self.clips, self.replaced, self.waited, self.pause = time.monotonic(), 0, 0, 0.0, 0.0

    def seconds(self) -> float:
        """Training time in all, earlier parts of a resumed run included."""
        return self.before + time.monotonic() - self.began

    @contextlib.contextmanager
    def waiting(self):
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self):
        began = time.monotonic()
        yield
        self.pause += time.monotonic() - began

    def lap(self) -> dict[str, float]:
        """Numbers since the last lap; starts a new one."""
        elapsed = max(time.monotonic() - self.lap_began - self.pause, 1e-9)
        numbers = {
            "clips_per_second": self.clips / elapsed,
            "data_wait": self.waited / elapsed,
            "replaced_clips": self.replaced,
            "seconds": self.seconds(),
        }
        self._new_lap()
        return numbers
