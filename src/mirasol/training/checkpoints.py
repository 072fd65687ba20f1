"""Checkpoints: {model, optimizer, step}, written whole or not at all."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from mirasol.errors import UserError
from mirasol.training.optimizer import Optimizer

_NAME = re.compile(r"step-(\d{8})")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes `target` with what `fill` writes into it: on the disk and under its name only once it is complete.

    An older folder of that name is replaced.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    fill(unfinished)
    for path in [*sorted(unfinished.rglob("*")), unfinished]:
        _sync(path)
    remove_folder(target)
    unfinished.rename(target)
    _sync(target.parent)


def remove_folder(target: Path) -> None:
    """Removes a folder, if it is there: it loses its name first, so that half of it is never taken for the whole."""
    removed = target.with_name(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    if target.exists():
        target.rename(removed)
        shutil.rmtree(removed)


def save_model(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """What `from_pretrained` needs, without the library's own progress bar between ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What reading a damaged file raises.
DAMAGE = (SafetensorError, OSError, pickle.UnpicklingError, KeyError, RuntimeError, EOFError, ValueError)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """State, weights and the optimizer's state. Raises one of DAMAGE."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if not {"step", "fingerprint"} <= set(state):
        raise KeyError("state.json lacks step or fingerprint")
    weights = load_file(folder / "model.safetensors")
    return state, weights, torch.load(folder / "optimizer.pt", weights_only=True)


class Checkpoints:
    """The checkpoints of a run, `step-00000500` and so on, each a folder that `from_pretrained` takes as well.

    A folder gets its name last, so whatever bears such a name is complete.
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, os.listdir(self.folder)) if match)

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        optimizer: Optimizer,
        state: dict[str, Any],
    ) -> Path:
        """Writes the checkpoint after `step` steps and removes the oldest beyond `keep_last`."""

        def fill(folder: Path) -> None:
            save_model(folder, model, processor)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")

        target = self._path(step)
        write_folder(target, fill)
        # Later ones are damaged: the run went back behind them, or it would be further on.
        kept = [found for found in self.steps() if found <= step][-self.keep_last :]
        for other in self.steps():
            if other not in kept:
                remove_folder(self._path(other))
        return target

    def load_newest(
        self, model: nn.Module, optimizer: Optimizer, fingerprint: str, warn: Callable[[str], None]
    ) -> dict[str, Any]:
        """Puts the newest checkpoint that is whole into model and optimizer; `warn` is told of each one passed over.

        Returns its state, `{"step": 0}` where there is no checkpoint.

        Raises:
            UserError: all of them are damaged, the checkpoint belongs to another recipe, or its weights do not fit.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self._path(step)
            try:
                state, weights, moments = _read(folder)
            except DAMAGE as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                warn(f"{folder} is damaged and passed over for the checkpoint before it ({reason})")
                continue
            if state["fingerprint"] != fingerprint:
                raise UserError(f"{folder}: this checkpoint belongs to another recipe")
            try:
                model.load_state_dict(weights)
                optimizer.load_state_dict(moments)
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(f"{folder}: does not fit the model: {' '.join(str(error).split())}") from error
            return state
        if steps:
            raise UserError(f"{self.folder}: no checkpoint in it can be read: remove the run's folder and start again")
        return {"step": 0}

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"
