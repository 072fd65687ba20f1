"""Where a run can be watched beside its own files: Weights & Biases or trackio, by the recipe's `tracker`."""

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from mirasol.config.recipe import Recipe
from mirasol.errors import UserError

PROJECT = "mirasol"


class Tracker:
    """Hands a run's numbers, sample answers and pictures on to `wandb` or `trackio`, which share an interface.

    A resumed run goes on under its name. What becomes of steps that it logs a second time is the service's matter.
    """

    def __init__(self, module: ModuleType, recipe: Recipe):
        self.module = module
        folder = Path(recipe.output).resolve()
        # Runs of the same name in other places are other runs.
        name = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"
        extra = {"id": name} if module.__name__ == "wandb" else {}
        with _told_on_stderr():
            self.run = module.init(project=PROJECT, name=name, config=recipe.to_dict(), resume="allow", **extra)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers of a step."""
        self.run.log(dict(values), step=step)

    def samples(self, step: int, text: str, picture: Tensor | None) -> None:
        """Sample answers as text, and a picture, uint8 [3, height, width]."""
        with _told_on_stderr():
            values: dict[str, Any] = {"samples/answers": text}
            if picture is not None:
                values["samples/reconstruction"] = self.module.Image(picture.permute(1, 2, 0).numpy())
            self.run.log(values, step=step)

    def close(self) -> None:
        """Sends what is left."""
        with _told_on_stderr():
            self.run.finish()


def _told_on_stderr() -> contextlib.redirect_stdout:
    """Their messages go where ours go: stdout holds results alone."""
    return contextlib.redirect_stdout(sys.stderr)


def check_tracker(name: str) -> None:
    """Raises UserError where the tracker's package is not installed."""
    if name != "none":
        _module(name)


def make_tracker(recipe: Recipe) -> Tracker | None:
    """The recipe's tracker, or none. Raises UserError where its package is not installed."""
    return None if recipe.tracker == "none" else Tracker(_module(recipe.tracker), recipe)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"tracker={name}: the package {name} cannot be imported ({error}): pip install 'mirasol[{name}]', "
            "or set tracker: none"
        ) from error
