"""Helper processes: how they start, in one place."""

import sys
import types
from multiprocessing.context import SpawnContext, SpawnProcess


class HelperProcess(SpawnProcess):
    """A new interpreter that imports what its work needs, and not the program that asked for it.

    `spawn` would run the main module again: a script without an `if __name__ == "__main__"` would begin its own work a
    second time, and one read from stdin could not be found. So the helper is shown an empty main module. Its work has
    to be importable, as all work within this package is.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = HelperProcess


def process_context() -> SpawnContext:
    """The multiprocessing context of all helpers. Not a fork: one of a process with threads, as torch has, may hang."""
    return _Context()
