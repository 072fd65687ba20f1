"""What goes wrong in a training of `trainings.py`, arranged in its process before it begins."""

import os
import signal

from mirasol.training import trainer
from mirasol.training.trainer import Trainer


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


def limit_from_the_second_batch_on(seconds: float) -> None:
    """The loader's time limit holds from the second batch on, when its workers have started."""
    make = trainer.make_loader

    def waiting(*arguments):
        loaded = iter(make(*arguments))
        yield next(loaded)
        loaded._timeout = seconds
        yield from loaded

    trainer.make_loader = waiting
