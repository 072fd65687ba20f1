"""The state of a stream between chunks: token buffers that double when full, or are rings if there is a window."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

_LEAST_CHUNKS = 4


class ChunkBuffer:
    """The tokens of all chunks so far, or of the last `window` chunks; every chunk has the same number of tokens.

    Appending a chunk copies that chunk alone. The buffer doubles when it is full, but has at most room for `window`
    chunks; then the newest chunk overwrites the oldest.
    """

    def __init__(self, window: int | None = None):
        self.window, self.chunks, self.count = window, 0, 0
        self.data: Tensor | None = None

    @property
    def kept(self) -> int:
        """Number of chunks in the buffer."""
        return self.chunks if self.window is None else min(self.chunks, self.window)

    @property
    def nbytes(self) -> int:
        """Size of the buffer, unused room included."""
        return 0 if self.data is None else self.data.nbytes

    def append(
        self, tokens: Float[Tensor, "*shape token width"], passing: Float[Tensor, "*shape passing width"] | None = None
    ) -> Float[Tensor, "*shape kept width"]:
        """Appends one chunk. Returns a view of all tokens in the buffer, in any order, then the tokens `passing`, which
        are not kept."""
        self.count, extra = tokens.shape[-2], 0 if passing is None else passing.shape[-2]
        place = self.chunks if self.window is None else self.chunks % self.window
        self.chunks += 1
        end = self.kept * self.count
        if self.data is None or end + extra > self.data.shape[-2]:
            self._make_room(tokens, extra)
        self.data[..., place * self.count : (place + 1) * self.count, :] = tokens
        if passing is not None:
            self.data[..., end : end + extra, :] = passing
        return self.data[..., : end + extra, :]

    def _make_room(self, tokens: Tensor, extra: int) -> None:
        chunks = max(_LEAST_CHUNKS, 2 * (self.kept - 1))
        chunks = chunks if self.window is None else min(chunks, self.window)
        *shape, count, width = tokens.shape
        data = tokens.new_empty(*shape, chunks * count + extra, width)
        if self.data is not None:
            data[..., : self.data.shape[-2], :] = self.data
        self.data = data

    def in_order(self) -> Float[Tensor, "*shape kept width"]:
        """All tokens in the buffer, the oldest first; later chunks do not change the result."""
        held = self.data[..., : self.kept * self.count, :]
        # Without a window nothing is overwritten, so that a view is safe.
        return held if self.window is None else held.roll(-(self.chunks % self.kept) * self.count, dims=-2)


class KeyValueCache:
    """Keys and values of one attention over chunks, each [batch, head, token, head width]."""

    def __init__(self, window: int | None = None):
        self.keys, self.values = ChunkBuffer(window), ChunkBuffer(window)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def append(
        self, keys_values: tuple[Tensor, Tensor], passing: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    ) -> tuple[Tensor, Tensor]:
        """Appends one chunk's keys and values. Returns all that its queries attend to, those `passing` included."""
        (keys, values), (passing_keys, passing_values) = keys_values, passing
        return self.keys.append(keys, passing_keys), self.values.append(values, passing_values)


@dataclass
class StreamState:
    """The state of one part of a model between chunks.

    chunks: number of chunks so far. caches: one for each layer that attends to earlier chunks. memory: the Token Turing
    Machine's, [batch, memory, width].
    """

    chunks: int = 0
    caches: list[KeyValueCache] = field(default_factory=list)
    memory: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches) + (0 if self.memory is None else self.memory.nbytes)


def find_narrowest(*windows: int | None) -> int | None:
    """The smallest window; None is unlimited."""
    return min((window for window in windows if window is not None), default=None)
