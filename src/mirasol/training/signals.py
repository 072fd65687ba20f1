"""Stop signals, which schedulers and people send to a run, so that it stops between two steps."""

import signal
import threading
from types import FrameType

from mirasol.errors import Stopped
from mirasol.processes import STOP_SIGNALS


class StopSignals:
    """Records a stop signal (SIGTERM, SIGUSR1, SIGINT) in `received` while open; the loop checks it between two steps.

    Before `defer` there is nothing to save, and a signal raises Stopped at once. After it, the first signal is only
    recorded, and a second one raises Stopped immediately. Python handles signals in the main thread only: in another
    thread nothing changes.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on the loop handles the first signal."""
        self._deferred = True

    def _record(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, signal.Signals(number)
        if again:
            raise Stopped(f"stopped at once by a second {self.received.name}: continue with --resume", number)
        if not self._deferred:
            raise Stopped(f"stopped by {self.received.name} before the first step: start again with --resume", number)
