"""Trainings in processes of their own, for tests that kill them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class Training:
    """One training that runs, in a process group of its own."""

    def __init__(self, server: "Trainings", pid: int, told: Path):
        self.server, self.pid, self.told = server, pid, told

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """Sends a signal to the training, or to all its helpers too. One that has ended gets none."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = 120) -> int | None:
        """Its exit code; None where it hung and had to be killed."""
        return self.server.ask({"pid": self.pid, "seconds": seconds})

    @property
    def text(self) -> str:
        """What it wrote to stdout and stderr."""
        return self.told.read_text()


class Trainings:
    """Starts trainings. A context manager: the server ends with it."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        script = Path(__file__).with_name("fork_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Trainings":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, request: dict[str, Any]) -> Any:
        self.process.stdin.write(f"{json.dumps(request)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        values: dict[str, Any],
        *,
        resume: bool = True,
        fault: str | None = None,
        environment: dict[str, str] | None = None,
        **details: Any,
    ) -> Training:
        """Starts `mirasol train` with the recipe's values; `fault` of faults.py is arranged before, with `details`."""
        self.count += 1
        told = self.folder / f"training-{self.count}.txt"
        request = {"values": values, "resume": resume, "fault": fault, "details": details, "told": str(told),
                   "environment": environment or {}}  # fmt: skip
        return Training(self, self.ask(request), told)
