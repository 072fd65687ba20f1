"""The files of a checkpoint, as torch.distributed.checkpoint writes and reads them through its own interface.

Every process writes one file, its tensors' bytes one after the other, and the first one `.metadata`: which piece of
which tensor lies where, with a checksum. torch's own files hold a small archive per piece: it takes three times as long
to make in Python, for which the training step beside it has to wait, and a flipped bit in it passes unseen.
"""

import io
import math
import os
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

METADATA = ".metadata"


@dataclass(frozen=True)
class Piece:
    """Where a piece of a tensor lies: its bytes in a file, and what they are. `dtype` is torch's name for it."""

    file: str
    offset: int
    length: int
    checksum: int
    dtype: str
    shape: tuple[int, ...]


class DamagedFile(OSError):
    """A file of a checkpoint that is missing or is not as it was written; the message names it."""


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def layout_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What a plan to write the tensors follows from: their names, shapes and dtypes."""
    return {
        part: {name: (value.shape, value.dtype) for name, value in values.items()} for part, values in tensors.items()
    }


class RepeatedPlanner(DefaultSavePlanner):
    """Plans once and answers the same for as long as the tensors' layout is the same, in a run of one process: planning
    is Python from end to end, for which the training step beside it has to wait."""

    _layout: Any = None
    _local: SavePlan | None = None
    _whole: tuple[list[SavePlan], Metadata] | None = None

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        layout = layout_of(state_dict)
        if layout != self._layout:
            self._layout, self._local, self._whole = layout, None, None
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        if self._local is None:
            self._local = super().create_local_plan()
        return self._local

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # What comes from other processes is never this very object.
        if len(all_plans) > 1 or all_plans[0] is not self._local:
            return super().create_global_plan(all_plans)
        if self._whole is None:
            self._whole = super().create_global_plan(all_plans)
        return self._whole


class ShardWriter(StorageWriter):
    """Writes into `folder`, which is there and empty."""

    def __init__(self, folder: Path):
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """There is nothing to forget: a writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **named: Any) -> None:
        """All writers are alike."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"shard-{rank:05d}.bin") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this process's tensors and has them on the disk before it returns."""
        results, offset = [], 0
        with open(self.folder / plan.storage_data, "wb") as stream:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor), f"{item.index.fqn}: a checkpoint holds tensors only"
                values = tensor.detach().contiguous().cpu()
                data = values.reshape(-1).view(torch.uint8).numpy().data
                stream.write(data)
                dtype = str(values.dtype).removeprefix("torch.")
                piece = Piece(
                    plan.storage_data, offset, data.nbytes, zlib.crc32(data), dtype, tuple(values.shape)
                )  # fmt: skip
                results.append(WriteResult(item.index, data.nbytes, piece))
                offset += data.nbytes
            stream.flush()
            os.fsync(stream.fileno())
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes `.metadata`, after the data of all processes."""
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        with open(self.folder / METADATA, "wb") as stream:
            pickle.dump(metadata, stream)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class ShardReader(StorageReader):
    """Reads what `ShardWriter` wrote into `folder`, whatever the number of processes then and now.

    Raises (through torch.distributed.checkpoint, which tells all processes):
        DamagedFile: a file is missing, cut or changed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pieces: dict[MetadataIndex, Piece] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """There is nothing to forget: a reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **named: Any) -> Metadata:
        file = self.folder / METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        except FileNotFoundError as error:
            raise DamagedFile(f"{METADATA} is missing") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"{METADATA} is not whole") from error
        if not isinstance(metadata, Metadata):
            raise DamagedFile(f"{METADATA} is not whole")
        return metadata

    def check(self) -> None:
        """Raises DamagedFile unless every file is there at its full length; their content is checked while reading."""
        ends: dict[str, int] = {}
        for piece in self.read_metadata().storage_data.values():
            ends[piece.file] = max(ends.get(piece.file, 0), piece.offset + piece.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            if not file.is_file():
                raise DamagedFile(f"{name} is missing")
            if file.stat().st_size < end:
                raise DamagedFile(f"{name} is cut short: {file.stat().st_size} of {end} bytes")

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **named: Any) -> None:
        self.pieces = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the pieces that this process needs into its tensors."""
        wanted = sorted(plan.items, key=lambda item: (self.pieces[item.storage_index].file,
                                                      self.pieces[item.storage_index].offset))  # fmt: skip
        last, values = None, torch.empty(0)
        for item in wanted:
            piece = self.pieces[item.storage_index]
            if piece is not last:
                last, values = piece, self._read(piece)
            part = values
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        return _done(None)

    def _read(self, piece: Piece) -> Tensor:
        try:
            with open(self.folder / piece.file, "rb") as stream:
                stream.seek(piece.offset)
                data = bytearray(stream.read(piece.length))
        except FileNotFoundError as error:
            raise DamagedFile(f"{piece.file} is missing") from error
        if len(data) != piece.length:
            raise DamagedFile(f"{piece.file} is cut short")
        if zlib.crc32(data) != piece.checksum:
            raise DamagedFile(f"{piece.file} is not as it was written: its checksum differs")
        dtype = getattr(torch, piece.dtype)
        if not math.prod(piece.shape):
            return torch.empty(piece.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(piece.shape)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what a checkpoint's `.metadata` is made of and nothing else: a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("mirasol.training.shard_files", "Piece"):  # checkpoints of version 0.1
            return Piece
        allowed = (
            module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner", __name__)
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module, name) == ("torch.serialization", "_get_layout")
            or (module == "collections" and name == "OrderedDict")
        )
        if not allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)
