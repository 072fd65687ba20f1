"""The files of a checkpoint: a storage format for torch.distributed.checkpoint, with checksums.

Every process writes one file, the bytes of its tensors one after another. The first process also writes `.metadata`:
the file, offset and checksum of every piece of a tensor. PyTorch's own format (`FileSystemWriter`) has no checksums.
"""

import io
import math
import os
import pickle
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

METADATA = ".metadata"


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor: the place of its bytes, their CRC-32, and what they represent; `dtype` is torch's name."""

    file: str
    offset: int
    length: int
    checksum: int
    dtype: str
    shape: tuple[int, ...]


class DamagedFile(OSError):
    """A file of a checkpoint is missing or not as it was written; the message names it."""


def _make_completed_future(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class ShardWriter(StorageWriter):
    """Writes into `folder`, which exists and is empty."""

    def __init__(self, folder: Path):
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Does nothing: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **named: Any) -> None:
        """Does nothing: all writers are the same."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"shard-{rank:05d}.bin") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this process's tensors; they are on disk when this returns."""
        results, offset = [], 0
        with open(self.folder / plan.storage_data, "wb") as stream:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor), f"{item.index.fqn}: a checkpoint contains tensors only"
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
        return _make_completed_future(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes `.metadata`, once all processes have written their data."""
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        with open(self.folder / METADATA, "wb") as stream:
            pickle.dump(metadata, stream)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class ShardReader(StorageReader):
    """Reads what `ShardWriter` wrote into `folder`, on any number of processes.

    Raises (through torch.distributed.checkpoint, on all processes):
        DamagedFile: a file is missing, cut short or changed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pieces: dict[MetadataIndex, Piece] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Does nothing: a reader is for one checkpoint."""

    def read_metadata(self, *args: Any, **named: Any) -> Metadata:
        file = self.folder / METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        except FileNotFoundError as error:
            raise DamagedFile(f"{METADATA} is missing") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"{METADATA} is damaged") from error
        if not isinstance(metadata, Metadata):
            raise DamagedFile(f"{METADATA} is damaged")
        return metadata

    def check(self) -> None:
        """Raises DamagedFile unless every file exists at full length; checksums are compared while reading."""
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

        def place(item: ReadItem) -> tuple[str, int]:
            piece = self.pieces[item.storage_index]
            return piece.file, piece.offset

        last, values = None, torch.empty(0)
        for item in sorted(plan.items, key=place):
            piece = self.pieces[item.storage_index]
            if piece is not last:
                last, values = piece, self._read(piece)
            part = values
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        return _make_completed_future(None)

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
            raise DamagedFile(f"{piece.file} was changed: its checksum differs")
        dtype = getattr(torch, piece.dtype)
        if not math.prod(piece.shape):
            return torch.empty(piece.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(piece.shape)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class _MetadataUnpickler(pickle.Unpickler):
    """Loads only the types of a checkpoint's `.metadata`: an unrestricted pickle could run any code."""

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
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
        return super().find_class(module, name)
