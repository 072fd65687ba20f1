"""What several commands share."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mirasol.errors import UserError


def console() -> Any:
    """Where progress is shown: stderr, so that stdout holds results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(out: Any, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A callback `(done, total)` that shows rate and time left on the console."""
    from mirasol.training.logging import Progress

    with Progress(out, title, 0, unit) as shown:

        def report(done: int, total: int) -> None:
            shown.total = total
            shown.update(done)

        yield report


def cores() -> int:
    """How many processes can work at once."""
    return os.cpu_count() or 1


def check_positive(name: str, value: int) -> int:
    """The value, if it is at least 1; UserError otherwise."""
    if value < 1:
        raise UserError(f"{name} {value}: must be at least 1")
    return value


def check_device(name: str) -> str:
    """The device's name, if PyTorch can compute there; UserError otherwise."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here: use cpu") from error
    return name


def new_folder(path: str | Path) -> Path:
    """The path, if nothing is in the way of a new folder there; UserError otherwise."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists: give another --output, for nothing is overwritten")
    return path
