"""Helper processes: how they start, what they do with signals, and how they end, in one place."""

import os
import signal
import sys
import threading
import types
from multiprocessing import connection, parent_process, resource_tracker, util
from multiprocessing.context import SpawnContext, SpawnProcess

# What a scheduler or a person sends, often to all processes at once. The program that asked for the help decides.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class HelperProcess(SpawnProcess):
    """A new interpreter that imports what its work needs, and not the program that asked for it.

    `spawn` would run the main module again: a script without an `if __name__ == "__main__"` would begin its own work a
    second time, and one read from stdin could not be found. So the helper gets an empty main module, and its work must
    be importable, as everything in this package is.

    A helper ignores `STOP_SIGNALS`: it ends when its parent asks it to, and at once when the parent has ended, however
    that happened.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        # multiprocessing starts its tracker with the first helper, and unblocks signals as it does.
        resource_tracker.ensure_running()
        # A helper inherits the mask: no signal reaches it before `run` says what is done with it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            super().start()
            # When the program ends, multiprocessing asks its helpers to end and waits: one that hangs never would.
            util.Finalize(self, self._popen.kill, exitpriority=1)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sys.modules["__main__"] = main

    def run(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()

    def terminate(self) -> None:
        """Ends the helper at once. Its files are written completely or not at all, so nothing has to be cleaned up."""
        self.kill()


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


class _Context(SpawnContext):
    Process = HelperProcess


def make_process_context() -> SpawnContext:
    """The multiprocessing context of all helpers.

    Not fork: a forked process may hang if its parent has threads, as with torch.
    """
    return _Context()
