"""What goes wrong in a training of `trainings.py`, arranged in its process before it begins."""

import os
import signal
import time

from mirasol.training import trainer
from mirasol.training.trainer import Trainer
from mirasol.training.worker_status import WorkerStatus


def signal_after(step: int, name: str) -> None:
    """The training gets a signal in the middle of the step after `step`."""
    take = Trainer._step

    def interrupted(self, number, *arguments):
        if number == step:
            os.kill(os.getpid(), getattr(signal, name))
        return take(self, number, *arguments)

    Trainer._step = interrupted


def signal_while_decoding(name: str) -> None:
    """The training, and all its helpers, get a signal before its first step."""
    decode = Trainer._decode_clips

    def interrupted(self):
        os.killpg(os.getpgid(0), getattr(signal, name))
        return decode(self)

    Trainer._decode_clips = interrupted


def signals_without_end(name: str) -> None:
    """The training gets a signal again and again within one step."""

    def interrupted(self, *arguments):
        while True:
            os.kill(os.getpid(), getattr(signal, name))

    Trainer._step = interrupted


def when_a_worker_hangs(do: str, seconds: float = 0.5) -> None:
    """Once a worker has been at the same clip for so long, it is killed (`kill`), or the loader's time limit is over
    (`limit`); before that a worker may take any time to start."""
    make = trainer.make_loader

    def watched(batches, *arguments):
        loaded, worker = iter(make(batches, *arguments)), _hanging(batches.status, seconds)
        if do == "kill":
            os.kill(worker, signal.SIGKILL)
        else:
            loaded._timeout = seconds
        return loaded

    trainer.make_loader = watched


def _hanging(status: WorkerStatus, seconds: float) -> int:
    """Waits for a process that stays at one text for so long; its id."""
    before, since = {}, time.monotonic()
    while not before or time.monotonic() - since < seconds:
        time.sleep(0.02)
        if status.current() != before:
            before, since = status.current(), time.monotonic()
    return next(iter(before))
