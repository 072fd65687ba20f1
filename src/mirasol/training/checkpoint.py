"""Checkpoints: weights, optimizer and step, sharded over the processes, written while the training goes on."""

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
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from mirasol.errors import UserError
from mirasol.files import remove_folder, sync_to_disk
from mirasol.training.checkpoint_io import DamagedFile, RepeatedPlanner, ShardReader, ShardWriter, layout_of
from mirasol.training.ranks import Ranks

# A run of one process is what we mean.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# What a checkpoint holds: parts ("model", "optimizer", …), each by name.
Tensors = Mapping[str, Mapping[str, Tensor]]

_NAME = re.compile(r"step-(\d{8})")
# Before, a stager forgets how to copy after its first use, and fails at the second.
_STAGERS_LAST = torch.__version__ >= "2.13"


def save_model(
    folder: Path, model: PreTrainedModel, processor: ProcessorMixin, weights: Mapping[str, Tensor] | None = None
) -> None:
    """What `from_pretrained` needs, without the library's own progress bar between ours. `weights` are the model's own
    unless they are given."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class Checkpoints:
    """The checkpoints of a run, `step-00000500` and so on: a folder each with one file per process, `.metadata` (which
    tensor lies where) and `state.json`.

    A folder gets its name last, so whatever bears such a name was complete once. Any number of processes can read what
    another number wrote.
    """

    def __init__(self, folder: Path, keep_last: int, ranks: Ranks = Ranks()):  # noqa: B008 - it is frozen
        self.folder, self.keep_last, self.ranks = folder, keep_last, ranks
        self._writing: threading.Thread | None = None
        self._staged = threading.Event()
        self._failure: BaseException | None = None
        self._stager: DefaultStager | None = None
        self._copies: Tensors = {}
        self._planner = RepeatedPlanner()

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, os.listdir(self.folder)) if match)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any], best: int | None = None) -> None:
        """Begins to write the checkpoint after `step` steps; once it is there, the oldest beyond `keep_last` go, but
        not the one of step `best`.

        The training goes on meanwhile, but must call `wait_until_copied` before it changes one of the tensors. Only one
        checkpoint is written at a time: this waits for the one before.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self._staged.clear()
        on_gpu = any(value.is_cuda for part in tensors.values() for value in part.values())
        ready = torch.cuda.current_stream().record_event() if on_gpu else None
        arguments = (step, tensors, {"step": step, **state}, ready, best)
        # A daemon, lest a process that stops with an error stay for a collective that nobody else comes to.
        self._writing = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._writing.start()

    def wait_until_copied(self) -> None:
        """Waits until the checkpoint being written no longer needs the tensors it was given."""
        if self._writing is not None:
            self._staged.wait()

    def wait(self) -> None:
        """Waits until the checkpoint being written is there. Raises UserError where it could not be written."""
        if self._writing is None:
            return
        self._writing.join()
        self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            last = self.steps()[-1:]
            kept = f"{self.path(last[0])} is whole: go on from there with --resume" if last else "there is none yet"
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({_reason(failure)}); the last one: {kept}"
            ) from failure

    def poll(self) -> None:
        """As `wait` where the checkpoint is there or has failed; returns at once while it is being written.

        Several processes wait for the next `save` instead: they would not notice a failure at the same step.
        """
        if self.ranks.world_size == 1 and self._writing is not None and not self._writing.is_alive():
            self.wait()

    def _write(self, step: int, tensors: Tensors, state: dict[str, Any], ready: Any, best: int | None) -> None:
        unfinished = self.folder / f".{self.path(step).name}.unfinished"
        in_thread = self.ranks.in_thread()
        try:
            copies = self._copied(tensors, ready)
            self._staged.set()
            with in_thread.losses_told():
                in_thread.together(lambda: self._begin(unfinished))
                dcp.save(
                    copies,
                    storage_writer=ShardWriter(unfinished),
                    planner=self._planner,
                    process_group=in_thread.host,
                    no_dist=in_thread.host is None,
                )
                in_thread.together(lambda: self._commit(step, unfinished, state, best))
        except BaseException as error:  # of any kind: `wait` raises it again in the thread that trains
            self._failure = error
            if self.ranks.is_first:
                # What half of a checkpoint takes may be what the disk lacks.
                shutil.rmtree(unfinished, ignore_errors=True)
        finally:
            self._staged.set()

    def _begin(self, unfinished: Path) -> None:
        if self.ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def _copied(self, tensors: Tensors, ready: Any) -> Tensors:
        """The tensors as they are now, in the CPU's memory; where it can be, the same memory for every checkpoint."""
        if not any(value.is_cuda or isinstance(value, DTensor) for part in tensors.values() for value in part.values()):
            return self._copied_at_once(tensors)
        if self._stager is None or not _STAGERS_LAST:
            on_gpu = ready is not None
            self._stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))
        tensors = {name: dict(part) for name, part in tensors.items()}
        if ready is None:
            return self._stager.stage(tensors)
        with torch.cuda.stream(torch.cuda.Stream()):
            ready.wait()
            copies = self._stager.stage(tensors)
            torch.cuda.current_stream().synchronize()
        return copies

    @torch.no_grad()
    def _copied_at_once(self, tensors: Tensors) -> Tensors:
        """As `_copied`, of plain tensors of this process: one call that leaves the interpreter to the step beside it,
        while a stager takes them one after the other in Python."""
        if layout_of(self._copies) != layout_of(tensors):
            self._copies = {
                name: {key: torch.empty_like(value) for key, value in part.items()} for name, part in tensors.items()
            }
        pairs = [(self._copies[name][key], value) for name, part in tensors.items() for key, value in part.items()]
        torch._foreach_copy_([copy for copy, _ in pairs], [value for _, value in pairs])
        return self._copies

    def _commit(self, step: int, unfinished: Path, state: dict[str, Any], best: int | None) -> None:
        """The checkpoint's files are on the disk: it gets its name, and those it replaces go."""
        if not self.ranks.is_first:
            return
        (unfinished / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in (unfinished / "state.json", unfinished):
            sync_to_disk(path)
        remove_folder(self.path(step))
        unfinished.rename(self.path(step))
        sync_to_disk(self.folder)
        # Later ones are damaged: the run went back behind them, or it would be further on.
        kept = [found for found in self.steps() if found <= step][-self.keep_last :]
        for other in self.steps():
            if other not in kept and other != best:
                remove_folder(self.path(other))

    def load_newest(self, tensors: Tensors, fingerprint: str, warn: Callable[[str], None]) -> dict[str, Any]:
        """Puts the newest checkpoint that is whole into the tensors; `warn` is told of each one passed over.

        Returns its state, `{"step": 0}` where there is no checkpoint.

        Raises:
            UserError: all of them are damaged, the checkpoint belongs to another recipe, or its weights do not fit.
        """
        steps = self.ranks.from_first(self.steps())
        for step in reversed(steps):
            try:
                return self.load(step, tensors, fingerprint)
            except DamagedFile as error:
                warn(f"{self.path(step)} is damaged and passed over ({error})")
        if steps:
            raise UserError(
                f"{self.folder}: no checkpoint in it can be read: restore one, or train into another output"
            )
        return {"step": 0}

    def load(self, step: int, tensors: Tensors, fingerprint: str | None = None) -> dict[str, Any]:
        """Puts the checkpoint after `step` steps, or those parts of it that are given, into the tensors; returns its
        state.

        Raises:
            DamagedFile: a file of it is missing, cut or changed; the tensors may hold parts of it.
            UserError: it belongs to another recipe, or its parts do not hold just these tensors.
        """
        folder = self.path(step)
        state = self.ranks.from_first(_read_state(folder) if self.ranks.is_first else None)
        if isinstance(state, DamagedFile):
            raise state
        if fingerprint is not None and state["fingerprint"] != fingerprint:
            raise UserError(f"{folder}: this checkpoint belongs to another recipe")
        reader = ShardReader(folder)
        held = self.ranks.together(reader.read_metadata).state_dict_metadata
        _check_tensors(folder, tensors, held)
        try:
            dcp.load(
                {name: dict(part) for name, part in tensors.items()},
                storage_reader=reader,
                process_group=self.ranks.host,
                no_dist=self.ranks.host is None,
            )
        except dcp.CheckpointException as error:
            cause = _cause(error)
            if isinstance(cause, OSError):
                raise DamagedFile(str(cause)) from error
            raise
        return state


def _read_state(folder: Path) -> dict[str, Any] | DamagedFile:
    """The checkpoint's state, or what is wrong with its files, which are all there if this finds nothing."""
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


def _check_tensors(folder: Path, tensors: Tensors, held: Mapping[str, Any]) -> None:
    wanted = {f"{part}.{name}": tensor for part, given in tensors.items() for name, tensor in given.items()}
    there = {name for name in held if name.startswith(tuple(f"{part}." for part in tensors))}
    for name in sorted(wanted.keys() ^ there):
        which = "lacks" if name in wanted else "holds unknown"
        raise UserError(f"{folder}: does not fit the model: it {which} {name}")
    for name, tensor in wanted.items():
        if tuple(held[name].size) != tuple(tensor.shape):
            raise UserError(
                f"{folder}: does not fit the model: {name} has shape {list(held[name].size)}, "
                f"the model's {list(tensor.shape)}"
            )


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the lowest rank that failed, without what torch.distributed.checkpoint wraps it in."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return " ".join(str(cause).split())[:200] or type(cause).__name__
