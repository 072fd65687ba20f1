"""What a decoder process and the process that reads from it share: progress, memory for arrays, and messages.

Outside a decoder process nothing is shared: progress is not counted, and arrays are in the process's own memory.
"""

import math
import mmap
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Collection, Sequence

import numpy as np

SHARED_BYTES = 2**16  # arrays from this size on travel in shared memory, smaller ones in the message
MOST_DESCRIPTORS = 64  # in one message
HEADER = struct.Struct("!QI")  # bytes of the message, descriptors that come with it
KEPT_REGIONS = 2  # free ones, for the arrays of the next clips
PAGE = mmap.PAGESIZE

# Set in a decoder process only.
_progress: memoryview | None = None
_regions: "SharedRegions | None" = None


def share_with_reader(progress: memoryview, regions: "SharedRegions") -> None:
    """Makes this a decoder process: progress is counted in shared memory, and large arrays are allocated there."""
    global _progress, _regions
    _progress, _regions = progress, regions


def report_progress() -> None:
    """Counts a unit of work, such as a packet: a process that takes its time is not mistaken for a stalled one."""
    if _progress is not None:
        _progress[0] += 1


def allocate_array(shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """Zeros. In a decoder process large arrays are in shared memory, so that returning them copies nothing."""
    return np.zeros(shape, dtype) if _regions is None else _regions.allocate(tuple(shape), np.dtype(dtype))


def make_memory(size: int) -> int:
    """The descriptor of `size` bytes of zeros that processes can share."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("mirasol")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class SharedRegions:
    """Shared memory for the arrays of results, one region for each large array, used again once the reader returns it.

    Fresh pages cost about as much to fault in as the frames of a clip cost to draw.
    """

    def __init__(self):
        self._free: dict[int, mmap.mmap] = {}
        self._taken: dict[int, tuple[mmap.mmap, int]] = {}  # by this job, with the address where each begins
        self._lent: dict[int, mmap.mmap] = {}  # to the reader
        self._fresh: dict[int, int] = {}  # descriptors that the reader has not been sent
        self._count = 0

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Zeros in a region, or in this process's own memory where they are few."""
        count = math.prod(shape) * dtype.itemsize
        if count < SHARED_BYTES:
            return np.zeros(shape, dtype)
        _, array, used = self._take(count)
        if used:
            array[:] = 0
        return array.view(dtype).reshape(shape)

    def place(self, buffer: pickle.PickleBuffer) -> tuple[int, int, int] | None:
        """Region, offset and length of an array's bytes, copied there if need be; None where they are few."""
        content = np.frombuffer(buffer.raw(), np.uint8)
        if content.nbytes < SHARED_BYTES:
            return None
        address = content.ctypes.data
        for number, (region, begin) in self._taken.items():
            if begin <= address < begin + len(region):
                return number, address - begin, content.nbytes
        number, array, _ = self._take(content.nbytes)
        array[:] = content
        return number, 0, content.nbytes

    def _take(self, count: int) -> tuple[int, np.ndarray, bool]:
        """The number of a region, `count` bytes there, and whether it was used before."""
        fitting = [(len(region), number) for number, region in self._free.items() if count <= len(region) <= 2 * count]
        if fitting:
            _, number = min(fitting)
            region = self._free.pop(number)
        else:
            number, size = self._count, -(-count // PAGE) * PAGE
            self._count += 1
            self._fresh[number] = make_memory(size)
            region = mmap.mmap(self._fresh[number], size)
        array = np.frombuffer(region, np.uint8, count)
        self._taken[number] = region, array.ctypes.data
        return number, array, bool(fitting)

    def take_back(self, numbers: Sequence[int]) -> None:
        """The reader no longer uses these."""
        for number in numbers:
            self._free[number] = self._lent.pop(number)

    def end_job(self, lent: Collection[int]) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """The job has ended, and its result is in the regions `lent`.

        Returns the regions that the reader does not know yet (number, bytes), their descriptors, and the numbers of
        those that it can forget.
        """
        for number, (region, _) in self._taken.items():
            if number in lent:
                self._lent[number] = region
            elif number in self._fresh:
                os.close(self._fresh.pop(number))
            else:
                self._free[number] = region
        self._taken.clear()
        dropped = list(self._free)[: max(0, len(self._free) - KEPT_REGIONS)]
        for number in dropped:
            del self._free[number]
        fresh, self._fresh = self._fresh, {}
        return [(number, len(self._lent[number])) for number in fresh], list(fresh.values()), dropped


def send_message(connection: socket.socket, content: bytes, descriptors: Sequence[int] = ()) -> None:
    """Sends bytes, and descriptors along with them."""
    header = HEADER.pack(len(content), len(descriptors))
    if descriptors:
        socket.send_fds(connection, [header], list(descriptors))
        connection.sendall(content)
    else:
        connection.sendall(header + content)


def receive_message(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """The next message and its descriptors; None where the other side is gone."""
    header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, MOST_DESCRIPTORS)
    try:
        while 0 < len(header) < HEADER.size:
            more = connection.recv(HEADER.size - len(header))
            header += more
            if not more:
                break
        if len(header) < HEADER.size:
            raise EOFError
        length, _ = HEADER.unpack(header)
        content, filled = bytearray(length), 0
        while filled < length:
            count = connection.recv_into(memoryview(content)[filled:])
            if not count:
                raise EOFError
            filled += count
    except (EOFError, ConnectionError):
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    return bytes(content), descriptors
