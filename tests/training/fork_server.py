"""Runs trainings in processes of their own, to be killed for real: forked from one that has imported everything, so
that each costs no more than its steps. `trainings.py` talks to it: a JSON request a line, a JSON answer a line."""

import atexit
import contextlib
import json
import os
import signal
import sys
import time
import traceback

import faults
from rich.console import Console
from torch.utils import tensorboard  # noqa: F401 - so that no fork has to

from mirasol.cli import main as cli
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.training.trainer import train


def run(request: dict) -> int:
    """Does what `mirasol train` does with the recipe's values; returns the exit code."""
    if request["fault"] is not None:
        getattr(faults, request["fault"])(**request["details"])
    console = Console(file=sys.stderr)
    cli.run_command = lambda _: train(recipe_from_dict(request["values"]), resume=request["resume"], console=console)
    try:
        cli.main([])
    except SystemExit as ended:
        # As when an interpreter ends: what the error refers to is still there, and all that runs at exit runs.
        atexit._run_exitfuncs()
        return ended.code
    return 0


def child(request: dict) -> None:
    """A training, in a process group of its own. Never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        os.environ.update(request["environment"])
        told = os.open(request["told"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(told, 1)
        os.dup2(told, 2)
        code = run(request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code (negative: the signal it was killed by), None for a process that hung and had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            answer = wait(request["pid"], request["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


main()
