"""One timeline for pictures and sound: how a span of seconds is cut into chunks. Pure arithmetic, no files."""

import itertools
import math
from dataclasses import dataclass

from mirasol.errors import UserError


@dataclass(frozen=True)
class ChunkGrid:
    """How a clip is cut into chunks of `frames_per_chunk` frames.

    Either `chunk_seconds` is set (chunks of that length, their number follows from the clip's; a clip of more than
    `max_chunks` of them gets `max_chunks` longer ones) or `num_chunks` (that many equal chunks over the clip).

    Raises:
        UserError: both or neither are set, or a setting is not positive.
    """

    frames_per_chunk: int
    chunk_seconds: float | None = None
    num_chunks: int | None = None
    max_chunks: int = 64

    def __post_init__(self):
        if (self.chunk_seconds is None) == (self.num_chunks is None):
            raise UserError(
                f"chunk_seconds={self.chunk_seconds} and num_chunks={self.num_chunks}: set exactly one of the two"
            )
        for name in ("frames_per_chunk", "chunk_seconds", "num_chunks", "max_chunks"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name}={value} must be positive")


@dataclass(frozen=True)
class Timeline:
    """The span [start, end) of a clip and its T chunks, all in seconds.

    Chunk t is [edges[t], edges[t + 1]). With chunks of a fixed length the last edge may be before or after `end`.
    """

    start: float
    end: float
    edges: tuple[float, ...]
    frames_per_chunk: int

    @property
    def num_chunks(self) -> int:
        return len(self.edges) - 1

    @property
    def frame_times(self) -> tuple[tuple[float, ...], ...]:
        """Wanted times, [T][F] seconds: the centres of F equal cells of each chunk."""
        count = self.frames_per_chunk
        return tuple(
            tuple(left + (right - left) * (2 * k + 1) / (2 * count) for k in range(count))
            for left, right in itertools.pairwise(self.edges)
        )


def cut_into_chunks(start: float, end: float, grid: ChunkGrid) -> Timeline:
    """Cuts [start, end) seconds into chunks.

    With `grid.chunk_seconds` there are max(1, duration / chunk_seconds rounded half up) chunks whose edges are exactly
    start + k * chunk_seconds, so that the last chunk may end up to half a chunk before or after `end` (a clip shorter
    than one chunk: up to a full chunk after). With `grid.num_chunks`, or beyond `grid.max_chunks`, the chunks are equal
    parts of the span.

    Raises:
        UserError: the span is empty, negative or not finite.
    """
    if not (math.isfinite(start) and math.isfinite(end) and end > start):
        raise UserError(f"a clip from {start} s to {end} s has no length: end must be after start")
    if grid.chunk_seconds is not None:
        count = max(1, math.floor((end - start) / grid.chunk_seconds + 0.5))
        if count <= grid.max_chunks:
            edges = tuple(start + k * grid.chunk_seconds for k in range(count + 1))
            return Timeline(start, end, edges, grid.frames_per_chunk)
        count = grid.max_chunks
    else:
        count = grid.num_chunks
    edges = (*(start + (end - start) * k / count for k in range(count)), end)
    return Timeline(start, end, edges, grid.frames_per_chunk)


def describe_cut(timeline: Timeline, grid: ChunkGrid) -> list[str]:
    """What `cut_into_chunks` left out or stretched, one line each; differences under a millisecond do not count."""
    notes = []
    last, end = timeline.edges[-1], timeline.end
    if grid.chunk_seconds is not None and timeline.num_chunks == grid.max_chunks:
        length = timeline.edges[1] - timeline.edges[0]
        if length > grid.chunk_seconds + 1e-3:
            notes.append(
                f"longer than {grid.max_chunks} chunks of {grid.chunk_seconds:g} s: "
                f"cut into {grid.max_chunks} chunks of {length:.3f} s"
            )
    if end - last > 1e-3:
        notes.append(f"the last {end - last:.3f} s are ignored: too short for another chunk")
    elif last - end > 1e-3:
        notes.append(f"the last chunk reaches {last - end:.3f} s past the end: last frame held, silence")
    return notes
