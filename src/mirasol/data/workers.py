"""What each process that loads clips is working on, so that one that dies or hangs can be named."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import get_worker_info

from mirasol.errors import UserError
from mirasol.processes import make_process_context

_STATUS_BYTES = 1024
# Messages of PyTorch's DataLoader, whose exceptions have no type of their own.
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_TIMED_OUT = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
# How long a process may take to end once its connections have: the kernel closes these first.
_ENDING_SECONDS = 5.0


class WorkerFailed(UserError):
    """A process that loads clips died (killed, out of memory, crashed) or took too long over one batch."""


class WorkerStatus:
    """What each loading process is working on, in memory that outlives the process: who hangs or dies can be named.

    `workers` processes report here, and so does the one that created it; they receive it as an argument when they
    start.
    """

    def __init__(self, workers: int):
        context = make_process_context()
        # Plain memory without locks: a process that dies while it holds one would take all others with it.
        self._texts = [context.RawArray("c", _STATUS_BYTES) for _ in range(workers + 1)]
        self._pids = context.RawArray("q", workers + 1)
        self._slot = 0
        self._theirs: Any = None
        self._killed: set[int] = set()
        self.enter(0)

    def enter(self, slot: int) -> None:
        """The calling process takes a slot of its own, 1 to `workers`; 0 is the main process."""
        self._slot = slot
        self._pids[slot] = os.getpid()

    def report(self, text: str) -> None:
        """Records what the calling process is working on; "" for nothing."""
        info = get_worker_info()
        if info is not None and self._slot == 0:
            self.enter(info.id + 1)
        self._texts[self._slot].value = text.encode()[: _STATUS_BYTES - 1]

    @contextlib.contextmanager
    def report_while(self, text: str) -> Iterator[None]:
        """Reports `text` until the work is done. The report remains if the process ends, or raises, before that."""
        self.report(text)
        yield
        self.report("")

    def current(self) -> dict[int, str]:
        """What is being worked on, by process id; idle processes are left out."""
        texts = {pid: slot.value.decode(errors="replace") for pid, slot in zip(self._pids, self._texts, strict=True)}
        return {pid: text for pid, text in texts.items() if text}

    def describe(self, pids: list[int] | None = None) -> str:
        """What these processes (all by default) are working on, or were when they ended, for messages."""
        chosen = [text for pid, text in self.current().items() if pids is None or pid in pids]
        return "; ".join(chosen) or "no clip in particular"

    def kill_workers(self) -> None:
        """Kills all workers: those that hang do not react to other signals."""
        for pid in set(self._pids[1:]) - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._killed.add(pid)

    def take_over(self) -> None:
        """Until `hand_back`, only `limit_wait` reports that a worker has ended. Call it once the workers have started.

        PyTorch reports it by an exception in the main thread, wherever that thread is: while a log closes, or while it
        handles the error that the same end caused first.
        """
        if threading.current_thread() is threading.main_thread():
            self._theirs = signal.signal(signal.SIGCHLD, _leave)

    def hand_back(self) -> None:
        """Lets PyTorch report again that its workers have ended.

        Waits first for those that were killed here, so that it does not report them. If one cannot end, for example
        because its disk is gone, nothing changes.
        """
        if self._theirs is None:
            return
        deadline = time.monotonic() + _ENDING_SECONDS
        while self._killed - set(self._find_ended()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        signal.signal(signal.SIGCHLD, self._theirs)
        self._theirs = None

    @contextlib.contextmanager
    def limit_wait(self, seconds: float) -> Iterator[None]:
        """Raises WorkerFailed, with the samples being loaded, if the block takes longer, or if a worker has died or
        dies: at once after `take_over`.

        DataLoader's own limit is not enough: once a batch is half received, it waits for its worker without a limit.
        Signals interrupt any wait of the main thread; other threads have DataLoader's limit alone.
        """
        signalled = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGALRM)

        def stand_down() -> None:
            if signalled:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
                if self._theirs is not None:
                    signal.signal(signal.SIGCHLD, _leave)

        def ring(number: int, frame: object) -> None:
            stand_down()
            error = self._make_timeout_error(seconds)
            # Whatever still waits for them must give up too.
            self.kill_workers()
            raise error

        def look(number: int, frame: object) -> None:
            try:
                self._theirs(number, frame)
            except RuntimeError as raised:
                stand_down()
                raise (self._explain_error(raised) or raised) from None
            if gone := self._find_ended():  # PyTorch misses those that multiprocessing has already reaped
                stand_down()
                raise self._make_death_error(gone)

        try:
            if signalled:
                signal.signal(signal.SIGALRM, ring)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                if callable(self._theirs):
                    signal.signal(signal.SIGCHLD, look)
                    look(signal.SIGCHLD, None)
            yield
        except (EOFError, OSError, RuntimeError) as raised:
            stand_down()
            raise (self._explain_error(raised) or raised) from raised.__cause__
        finally:
            stand_down()

    def _make_timeout_error(self, seconds: float) -> WorkerFailed:
        return WorkerFailed(
            f"no batch within batch_seconds={seconds:g}: being loaded: {self.describe()}: "
            "leave that clip out, or allow more time"
        )

    def _explain_error(self, error: Exception) -> WorkerFailed | None:
        """The failure of a worker behind an error raised while waiting for a batch; None if no worker is to blame.

        A worker that dies breaks off what it was sending; that may be noticed before its end is.
        """
        if found := _TIMED_OUT.search(str(error)):
            return self._make_timeout_error(float(found[1]))
        if found := _DIED.search(str(error)):
            return self._make_death_error([int(pid) for pid in found[1].split(",")])
        deadline = time.monotonic() + _ENDING_SECONDS
        while any(self._pids[1:]) and time.monotonic() < deadline:
            if gone := self._find_ended():
                return self._make_death_error(gone)
            time.sleep(0.01)
        return None

    def _make_death_error(self, pids: list[int]) -> WorkerFailed:
        return WorkerFailed(
            f"a worker that loads clips died, out of memory perhaps, at {self.describe(pids)}: continue with --resume"
        )

    def _find_ended(self) -> list[int]:
        """The workers that have ended."""
        return sorted(set(self._pids[1:]) - {0} - {process.pid for process in multiprocessing.active_children()})


def _leave(number: int, frame: object) -> None:
    """A signal handler that leaves things as they are."""
