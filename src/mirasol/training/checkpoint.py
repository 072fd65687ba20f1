"""Checkpoints: weights, optimizer and step, one file per process, written while the training continues."""

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from mirasol.errors import UserError
from mirasol.files import remove_folder, sync_to_disk
from mirasol.training.checkpoint_io import DamagedFile, ShardReader, ShardWriter
from mirasol.training.distributed import Ranks

# dcp.save(no_dist=True) warns of the run of one process that we ask for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# The tensors of a checkpoint: by part ("model", "optimizer", …), then by name.
Tensors = Mapping[str, Mapping[str, Tensor]]

_NAME = re.compile(r"step-(\d{8})")


def save_model(
    folder: Path, model: PreTrainedModel, processor: ProcessorMixin, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Saves what `from_pretrained` needs, without transformers' progress bar. `weights` default to the model's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@torch.no_grad()
def copy_to_cpu(tensors: Tensors) -> Tensors:
    """Copies of the tensors in CPU memory; sharded ones stay sharded."""
    parts = {name: dict(part) for name, part in tensors.items()}
    if any(value.is_cuda for part in parts.values() for value in part.values()):
        # A new one each time: in PyTorch 2.11 a stager cannot be used twice.
        return DefaultStager(StagingOptions(False, False, False, False)).stage(parts)
    return {name: {key: value.detach().clone() for key, value in part.items()} for name, part in parts.items()}


class Checkpoints:
    """The checkpoints of a run, `step-00000500` and so on: folders with one file per process, `.metadata` (the place of
    every tensor) and `state.json`.

    A folder gets its name last, so one with such a name was once complete. Any number of processes can load what any
    other number wrote.
    """

    def __init__(self, folder: Path, keep_last: int, ranks: Ranks = Ranks()):  # noqa: B008 - it is frozen
        self.folder, self.keep_last, self.ranks = folder, keep_last, ranks
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last_step: int | None = None

    def list_steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, os.listdir(self.folder)) if match)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any], best: int | None = None) -> None:
        """Copies the tensors and begins to write the checkpoint after `step` steps, in a thread of its own.

        Nothing happens if this step was loaded or saved before. Once the checkpoint is written, the oldest ones beyond
        `keep_last` are removed, except that of step `best`. Only one checkpoint is written at a time: this waits for
        the previous one.

        Raises:
            UserError: the previous one could not be written.
        """
        if step == self._last_step:
            return
        self.wait()
        self._last_step = step
        arguments = (step, copy_to_cpu(tensors), {"step": step, **state}, best)
        # A daemon, so that a process that stops with an error does not stay for a collective that no other joins.
        self._writing = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises UserError if it could not be written."""
        if self._writing is None:
            return
        self._writing.join()
        self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            last = self.list_steps()[-1:]
            kept = f"{self.path(last[0])} is complete: continue with --resume" if last else "there is none yet"
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({_describe(failure)}); the one before: {kept}"
            ) from failure

    def poll(self) -> None:
        """As `wait`, but returns at once while the checkpoint is still being written.

        Does nothing with several processes: they would notice a failure at different steps, so they wait in `save`.
        """
        if self.ranks.world_size == 1 and self._writing is not None and not self._writing.is_alive():
            self.wait()

    def _write(self, step: int, tensors: Tensors, state: dict[str, Any], best: int | None) -> None:
        unfinished = self.folder / f".{self.path(step).name}.unfinished"
        ranks = self.ranks.for_checkpoints()
        try:
            with ranks.raise_if_rank_lost():
                ranks.run_together(lambda: self._begin(unfinished))
                dcp.save(
                    tensors,
                    storage_writer=ShardWriter(unfinished),
                    process_group=ranks.host,
                    no_dist=ranks.host is None,
                )
                ranks.run_together(lambda: self._commit(step, unfinished, state, best))
        except BaseException as error:  # of any kind: `wait` raises it again in the thread that trains
            self._failure = error
            if self.ranks.is_first:
                # On a full disk the unfinished checkpoint may take the space that others need.
                shutil.rmtree(unfinished, ignore_errors=True)

    def _begin(self, unfinished: Path) -> None:
        if self.ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def _commit(self, step: int, unfinished: Path, state: dict[str, Any], best: int | None) -> None:
        """Names the checkpoint, all of whose files are on disk, and removes those it replaces."""
        if not self.ranks.is_first:
            return
        (unfinished / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in (unfinished / "state.json", unfinished):
            sync_to_disk(path)
        remove_folder(self.path(step))
        unfinished.rename(self.path(step))
        sync_to_disk(self.folder)
        # Later ones are damaged: the run was resumed from a checkpoint before them.
        kept = [found for found in self.list_steps() if found <= step][-self.keep_last :]
        for other in self.list_steps():
            if other not in kept and other != best:
                remove_folder(self.path(other))

    def load_newest(self, tensors: Tensors, fingerprint: str, warn: Callable[[str], None]) -> dict[str, Any]:
        """Loads the newest undamaged checkpoint into the tensors; `warn` is called for each damaged one.

        Returns its state, `{"step": 0}` if there is no checkpoint.

        Raises:
            UserError: all of them are damaged, the checkpoint belongs to another recipe, or its weights do not fit.
        """
        steps = self.ranks.broadcast(self.list_steps())
        for step in reversed(steps):
            try:
                state = self.load(step, tensors, fingerprint)
                self._last_step = step
                return state
            except DamagedFile as error:
                warn(f"{self.path(step)} is damaged and skipped ({error})")
        if steps:
            raise UserError(f"{self.folder}: every checkpoint is damaged: restore one, or train into another output")
        return {"step": 0}

    def load(self, step: int, tensors: Tensors, fingerprint: str | None = None) -> dict[str, Any]:
        """Loads the parts in `tensors` of the checkpoint after `step` steps; returns its state.

        Raises:
            DamagedFile: a file is missing, cut short or changed; some tensors may be loaded already.
            UserError: it belongs to another recipe, or has other tensors.
        """
        folder = self.path(step)
        state = self.ranks.broadcast(_read_state(folder) if self.ranks.is_first else None)
        if isinstance(state, DamagedFile):
            raise state
        if fingerprint is not None and state["fingerprint"] != fingerprint:
            raise UserError(f"{folder}: this checkpoint belongs to another recipe")
        reader = ShardReader(folder)
        metadata = self.ranks.run_together(reader.read_metadata)
        _check_tensors(folder, tensors, metadata.state_dict_metadata)
        try:
            dcp.load(
                {name: dict(part) for name, part in tensors.items()},
                storage_reader=reader,
                process_group=self.ranks.host,
                no_dist=self.ranks.host is None,
            )
        except dcp.CheckpointException as error:
            cause = _find_cause(error)
            if isinstance(cause, OSError):
                raise DamagedFile(str(cause)) from error
            raise
        return state


def _read_state(folder: Path) -> dict[str, Any] | DamagedFile:
    """The checkpoint's state, or what is wrong with its files; all of them exist if this finds no problem."""
    try:
        ShardReader(folder).check()
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except DamagedFile as error:
        return error
    except (OSError, ValueError) as error:
        return DamagedFile(f"state.json cannot be read: {' '.join(str(error).split())}")
    if not isinstance(state, dict) or not {"step", "fingerprint"} <= set(state):
        return DamagedFile("state.json lacks step or fingerprint")
    return state


def _check_tensors(folder: Path, tensors: Tensors, stored: Mapping[str, TensorStorageMetadata]) -> None:
    wanted = {f"{part}.{name}": tensor for part, given in tensors.items() for name, tensor in given.items()}
    found = {name for name in stored if name.startswith(tuple(f"{part}." for part in tensors))}
    for name in sorted(wanted.keys() ^ found):
        which = "lacks" if name in wanted else "has unknown"
        raise UserError(f"{folder}: does not fit the model: it {which} {name}")
    for name, tensor in wanted.items():
        if tuple(stored[name].size) != tuple(tensor.shape):
            raise UserError(
                f"{folder}: does not fit the model: {name} has shape {list(stored[name].size)}, "
                f"the model's {list(tensor.shape)}"
            )


def _find_cause(error: BaseException) -> BaseException:
    """The error of the lowest rank that failed, unwrapped from torch.distributed.checkpoint's exception."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


def _describe(error: BaseException) -> str:
    cause = _find_cause(error)
    return " ".join(str(cause).split())[:200] or type(cause).__name__
