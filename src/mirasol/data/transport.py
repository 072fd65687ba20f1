"""How batches travel from a loading process to the main one: few tensors, few copies, memory used again."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

# Larger tensors travel between processes on their own; smaller ones together, for each that travels takes a handshake
# with a process that is busy loading.
PACKED_BYTES = 2**24
_ALIGNMENT = 64  # bytes, so that any dtype may begin there
_TAKEN, _RETURNED = 1, 0  # what the last byte of a kept piece of memory says
_MARK_BYTES = 64


@dataclass(frozen=True)
class _Layout:
    """Where a tensor lies in the bytes that several travel in."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class FrameMemory:
    """Bytes, in memory that processes share, for the frames of the batches that a loading process makes.

    Fresh memory costs more to get and to free than a batch's frames to copy there, so pieces that were given back
    (`give_back`) are used again. Who takes a piece marks it as taken, who has no more use for what lies there marks it
    as returned, in its last byte; a piece that never comes back is never used again.

    kept: how many pieces are held for that at most; more than can be under way at a time serve nobody
    """

    def __init__(self, kept: int):
        self.kept = kept
        self._pieces: list[UInt8[Tensor, " byte"]] = []

    def take(self, count: int) -> UInt8[Tensor, " byte"]:
        """`count` bytes of any content."""
        returned = [place for place, piece in enumerate(self._pieces) if piece[-1] == _RETURNED]
        fitting = [place for place in returned if len(self._pieces[place]) == count + _MARK_BYTES]
        if fitting:
            piece = self._pieces[fitting[0]]
        else:
            piece = _shared(count + _MARK_BYTES)
            if returned:
                self._pieces[returned[0]] = piece
            elif len(self._pieces) < self.kept:
                self._pieces.append(piece)
        piece[-1] = _TAKEN
        return piece[:count]


def give_back(layouts: dict[str, _Layout | None], travelled: dict[str, Tensor]) -> None:
    """Lets the loading process use the memory of a batch's frames again. Nobody may look at them any more.

    layouts, travelled: as `packed` gave them, and as they arrived
    """
    video = travelled.get("video")
    if video is not None and layouts["video"] is None and video.dtype == torch.uint8 and video.is_shared():
        _return(video)


def _return(taken: Tensor) -> None:
    torch.empty(0, dtype=torch.uint8).set_(taken.untyped_storage())[-1] = _RETURNED


def _shared(count: int) -> UInt8[Tensor, " byte"]:
    """Fresh memory that other processes can map, so that no copy of what lies there is sent."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count))


class FrameRows:
    """The frames of a batch's clips, uint8 [clip, chunk, frame, 3, height, width], padded with zeros to the longest.

    Each clip is copied to its row as soon as it is loaded, so that the memory which it was decoded into serves the
    next one. (Should a clip have more chunks than the first, all rows are copied once more.)

    memory: where frames that travel on their own take their bytes; None where none travel
    """

    def __init__(self, clips: int, memory: FrameMemory | None = None):
        self.clips, self.memory = clips, memory
        self.lengths: list[int] = []
        self._rows: Tensor | None = None
        self._longer: dict[int, Tensor] = {}

    def add(self, video: UInt8[Tensor, "chunk frame 3 height width"]) -> None:
        """The frames of the next clip."""
        if self._rows is None:
            self._rows = self._empty((self.clips, *video.shape))
        if len(video) <= self._rows.shape[1]:
            _fill_row(self._rows[len(self.lengths)], video)
        else:
            self._longer[len(self.lengths)] = video
        self.lengths.append(len(video))

    def batch(self) -> UInt8[Tensor, "clip chunk frame 3 height width"] | None:
        """All rows; None where no clip was added."""
        if self._longer:
            short, self._rows = self._rows, self._empty((self.clips, max(self.lengths), *self._rows.shape[2:]))
            for number, row in enumerate(self._rows):
                _fill_row(row, self._longer.get(number, short[number]))
            if short.is_shared():
                _return(short)
            self._longer = {}
        return self._rows

    def _empty(self, shape: tuple[int, ...]) -> UInt8[Tensor, "clip chunk frame 3 height width"]:
        count = math.prod(shape)
        if self.memory is None or count <= PACKED_BYTES:
            return torch.empty(shape, dtype=torch.uint8)
        return self.memory.take(count).view(shape)


def _fill_row(row: Tensor, video: Tensor) -> None:
    row[: len(video)] = video
    row[len(video) :] = 0


def packed(tensors: dict[str, Tensor]) -> tuple[dict[str, _Layout | None], dict[str, Tensor]]:
    """The tensors' layouts, None for those that travel on their own, and what travels: these by name, the others as
    one, called ""."""
    layouts: dict[str, _Layout | None] = {}
    offset = 0
    for name, value in tensors.items():
        small = value.nbytes <= PACKED_BYTES
        layouts[name] = _Layout(offset, value.dtype, tuple(value.shape)) if small else None
        offset += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT if small else 0
    together = torch.empty(offset, dtype=torch.uint8)
    for name, layout in layouts.items():
        if layout is not None:
            _view(together, layout).copy_(tensors[name])
    return layouts, {"": together, **{name: value for name, value in tensors.items() if layouts[name] is None}}


def unpacked(layouts: dict[str, _Layout | None], travelled: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `packed` was given, on the device that they travelled to."""
    return {
        name: travelled[name] if layout is None else _view(travelled[""], layout) for name, layout in layouts.items()
    }


def _view(together: Tensor, layout: _Layout) -> Tensor:
    count = math.prod(layout.shape) * layout.dtype.itemsize
    return together[layout.offset : layout.offset + count].view(layout.dtype).view(layout.shape)
