"""Memory for the frames of a batch, which a loading process shares with the main one and uses again."""

import math

import torch
from jaxtyping import UInt8
from torch import Tensor

_TAKEN, _RELEASED = 1, 0  # in the last byte of a piece of memory
_MARK_BYTES = 64  # a multiple of the alignment that any dtype needs


class FrameMemory:
    """Memory that processes share, for the frames of the batches that a loading process makes.

    Getting and freeing fresh memory costs more than copying a batch's frames, so released pieces are used again. The
    last byte of a piece says whether it is in use: the loading process sets it, `release_frames` in the main process
    clears it. A piece that is never released is never used again.

    kept: most pieces to keep; more than the loader prefetches are of no use
    """

    def __init__(self, kept: int):
        self.kept = kept
        self._pieces: list[UInt8[Tensor, " byte"]] = []

    def take(self, count: int) -> UInt8[Tensor, " byte"]:
        """`count` bytes of any content."""
        released = [place for place, piece in enumerate(self._pieces) if piece[-1] == _RELEASED]
        fitting = [place for place in released if len(self._pieces[place]) == count + _MARK_BYTES]
        if fitting:
            piece = self._pieces[fitting[0]]
        else:
            piece = torch.empty(count + _MARK_BYTES, dtype=torch.uint8).share_memory_()
            if released:
                self._pieces[released[0]] = piece
            elif len(self._pieces) < self.kept:
                self._pieces.append(piece)
        piece[-1] = _TAKEN
        return piece[:count]


def release_frames(video: UInt8[Tensor, "clip chunk frame 3 height width"]) -> None:
    """Lets the process that loaded these frames use their memory again. Nobody may look at them any more."""
    assert video.dtype == torch.uint8 and video.is_shared()
    torch.empty(0, dtype=torch.uint8).set_(video.untyped_storage())[-1] = _RELEASED


class FrameRows:
    """The frames of a batch's clips, uint8 [clip, chunk, frame, 3, height, width], padded with zeros to the longest.

    Each clip is copied to its row as soon as it is loaded, so that the memory it was decoded into serves the next one.
    (If a clip has more chunks than the first, all rows are copied once more.)

    memory: where the rows get their memory; None for memory of this process
    """

    def __init__(self, clips: int, memory: FrameMemory | None = None):
        self.clips, self.memory = clips, memory
        self.lengths: list[int] = []
        self._rows: Tensor | None = None
        self._longer: dict[int, Tensor] = {}

    def add(self, video: UInt8[Tensor, "chunk frame 3 height width"]) -> None:
        """Adds the frames of the next clip."""
        if self._rows is None:
            self._rows = self._allocate((self.clips, *video.shape))
        if len(video) <= self._rows.shape[1]:
            _fill_row(self._rows[len(self.lengths)], video)
        else:
            self._longer[len(self.lengths)] = video
        self.lengths.append(len(video))

    def batch(self) -> UInt8[Tensor, "clip chunk frame 3 height width"] | None:
        """The rows of all clips that were added; None where none was."""
        if self._longer:
            short, self._rows = self._rows, self._allocate((self.clips, max(self.lengths), *self._rows.shape[2:]))
            for number, row in enumerate(self._rows):
                _fill_row(row, self._longer.get(number, short[number]))
            if self.memory is not None:
                release_frames(short)
            self._longer = {}
        return None if self._rows is None else self._rows[: len(self.lengths)]

    def _allocate(self, shape: tuple[int, ...]) -> UInt8[Tensor, "clip chunk frame 3 height width"]:
        if self.memory is None:
            return torch.empty(shape, dtype=torch.uint8)
        return self.memory.take(math.prod(shape)).view(shape)


def _fill_row(row: Tensor, video: Tensor) -> None:
    row[: len(video)] = video
    row[len(video) :] = 0
