"""What the processes that load clips are at, so that one that dies or hangs can be named."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator

from torch.utils.data import get_worker_info

from mirasol.errors import UserError
from mirasol.processes import process_context

_STATUS_BYTES = 1024
# How PyTorch's DataLoader words it; the exceptions have no type of their own.
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_TOO_LONG = re.compile(r"DataLoader timed out after ([\d.]+) seconds")


class WorkerFailed(UserError):
    """A process that loads clips died (killed, out of memory, crashed) or was at one batch for too long."""


class WorkerStatus:
    """What each loading process is at, in memory that outlives the process: who hangs or dies can be named.

    `workers` processes report here, and the one that made it; it reaches them as an argument when they start.
    """

    def __init__(self, workers: int):
        context = process_context()
        # Plain memory without locks: a process that dies while it holds one would take all others with it.
        self._texts = [context.RawArray("c", _STATUS_BYTES) for _ in range(workers + 1)]
        self._pids = context.RawArray("q", workers + 1)
        self._slot = 0
        self.enter(0)

    def enter(self, slot: int) -> None:
        """The calling process takes a slot of its own, 1 to `workers`; 0 is the main process."""
        self._slot = slot
        self._pids[slot] = os.getpid()

    def report(self, text: str) -> None:
        """Says what the calling process works on now; "" for nothing."""
        info = get_worker_info()
        if info is not None and self._slot == 0:
            self.enter(info.id + 1)
        self._texts[self._slot].value = text.encode()[: _STATUS_BYTES - 1]

    @contextlib.contextmanager
    def at(self, text: str) -> Iterator[None]:
        """Reports `text` until the work is done. It stays where the process ends, or raises, before that."""
        self.report(text)
        yield
        self.report("")

    def current(self) -> dict[int, str]:
        """What is being worked on, by process id; idle processes are left out."""
        texts = {pid: slot.value.decode(errors="replace") for pid, slot in zip(self._pids, self._texts, strict=True)}
        return {pid: text for pid, text in texts.items() if text}

    def named(self, pids: list[int] | None = None) -> str:
        """What these processes (all by default) are at, or were when they ended, as messages say it."""
        chosen = [text for pid, text in self.current().items() if pids is None or pid in pids]
        return "; ".join(chosen) or "no clip in particular"

    def kill_workers(self) -> None:
        """Ends those that hang, without asking."""
        for pid in set(self._pids[1:]) - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Raises WorkerFailed, with the samples the workers are at, where what is done meanwhile takes longer.

        DataLoader's own limit is not enough: with a batch half received it waits for its worker without one. An alarm
        interrupts any wait of the main thread; another thread has DataLoader's limit alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(number: int, frame: object) -> None:
            error = self._too_long(seconds)
            # Whoever still waits for them is to give up too. PyTorch need not tell of their end: this is the error.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.kill_workers()
            raise error

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _too_long(self, seconds: float) -> WorkerFailed:
        return WorkerFailed(
            f"no batch within batch_seconds={seconds:g}: being loaded: {self.named()}: "
            "leave that clip out, or allow more time"
        )

    def failure(self, error: BaseException) -> WorkerFailed | None:
        """What DataLoader's error says about a worker, with the sample it was at; None for any other error.

        PyTorch raises it wherever the main process happens to be, not only where it waits for a batch.
        """
        if isinstance(error, EOFError | ConnectionError) and (gone := self._gone()):
            return self._died(gone, "its batch was half received")
        if not isinstance(error, RuntimeError):
            return None
        if found := _TOO_LONG.search(str(error)):
            return self._too_long(float(found[1]))
        if found := _DIED.search(str(error)):
            return self._died([int(pid) for pid in found[1].split(",")], " ".join(str(error).split()))
        return None

    def _died(self, pids: list[int], reason: str) -> WorkerFailed:
        return WorkerFailed(
            f"a worker that loads clips died, out of memory perhaps, at {self.named(pids)} ({reason}): --resume goes on"
        )

    def _gone(self) -> list[int]:
        """The workers that have ended."""
        return sorted(set(self._pids[1:]) - {0} - {process.pid for process in multiprocessing.active_children()})
