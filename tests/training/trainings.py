"""Trainings in processes of their own, for tests that kill them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from mirasol.training.logging import read_metrics

MEASURED = ("clips_per_second", "data_wait", "seconds")


def elsewhere(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe with another output folder, beside its own."""
    return {**values, "output": str(Path(values["output"]).parent / name)}


def finished(values: dict[str, Any]) -> tuple[bytes, list[dict[str, Any]]]:
    """The weights of a finished run, and its metrics without what a clock measured."""
    folder = Path(values["output"])
    lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder / "metrics.jsonl")]
    return (folder / "checkpoint" / "model.safetensors").read_bytes(), lines


class Training:
    """One training that runs, in a process group of its own."""

    def __init__(self, server: "Trainings", pid: int, told: Path):
        self.server, self.pid, self.told = server, pid, told

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """Sends a signal to the training, or to all its helpers too. One that has ended gets none."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = 600) -> int | None:
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
        self.stores: list[TCPStore] = []
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

    def start_together(
        self, values: dict[str, Any], fault: str | None = None, at_rank: int = 1, processes: int = 2, **details: Any
    ) -> list[Training]:
        """Starts one training of several processes, as torchrun does; one of them has the fault."""
        # They meet at a store that is here already, as torchrun's is: a port that was only found to be free may be
        # another's by the time one of them opens it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.stores.append(store)
        started = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
                     "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
            environment = {name: str(value) for name, value in place.items()}
            mine = {"fault": fault, **details} if rank == at_rank else {}
            started.append(self.start(values, environment=environment, **mine))
        return started
