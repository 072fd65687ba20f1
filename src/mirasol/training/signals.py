"""Being asked to stop: what schedulers and people send to a run, and that it stops between two steps."""

import signal
import threading
from types import FrameType

from mirasol.errors import Stopped
from mirasol.processes import STOP_SIGNALS


class StopSignals:
    """Notes a stop signal (SIGTERM, SIGUSR1, SIGINT) while open, for a loop that looks at `received` between its steps.

    Until `defer` is called there is nothing to save, and a signal raises Stopped at once. After it, the first signal
    is noted only; a second one raises Stopped wherever the run is. Signals can be had in the main thread alone:
    elsewhere the process does with them what it did before.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From here on the loop itself sees to a signal."""
        self._deferred = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, signal.Signals(number)
        if again:
            raise Stopped(f"stopped at once by a second {self.received.name}: --resume goes on", number)
        if not self._deferred:
            raise Stopped(f"stopped by {self.received.name} before the first step: --resume begins again", number)
