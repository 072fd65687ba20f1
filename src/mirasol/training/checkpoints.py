"""Checkpoints: {model, optimizer, step}, written whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
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
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    _sync(target.parent)


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
        for old in self.steps()[: -self.keep_last]:
            shutil.rmtree(self._path(old))
        return target

    def load_newest(self, model: nn.Module, optimizer: Optimizer, fingerprint: str) -> dict[str, Any]:
        """Puts the newest checkpoint into model and optimizer. Returns its state, `{"step": 0}` without any.

        Raises:
            UserError: the checkpoint belongs to another recipe, or its files do not fit the model.
        """
        if not self.steps():
            return {"step": 0}
        folder = self._path(self.steps()[-1])
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["fingerprint"] != fingerprint:
            raise UserError(f"{folder}: this checkpoint belongs to another recipe")
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            raise UserError(f"{folder}: weights do not fit the model: {' '.join(str(error).split())}") from error
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return state

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"
