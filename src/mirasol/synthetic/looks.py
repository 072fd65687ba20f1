"""How things look: outlines of shapes as coverage of a square of pixels, and ways of moving as centres and sizes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Whether points are inside a shape: x [1, n] to the right and y [n, 1] downwards, both from -1 to 1 → bool [n, n].
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


@functools.lru_cache(maxsize=2048)
def make_mask(outline: Outline, size: int) -> np.ndarray:
    """Coverage 0..1 of each pixel of a size x size square by the shape, float32, from 4 x 4 samples a pixel."""
    axis = (np.arange(4 * size, dtype=np.float32) + 0.5) / (2 * size) - 1
    inside = outline(axis[None, :], axis[:, None])
    return inside.reshape(size, 4, size, 4).mean(axis=(1, 3), dtype=np.float32)


def outline_circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disc."""
    return x**2 + y**2 <= 1


def outline_square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square, smaller than the disc's box so that both cover about as much."""
    return (np.abs(x) <= 0.85) & (np.abs(y) <= 0.85)


def outline_triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A triangle that stands on its base."""
    return (np.abs(x) <= (y + 0.95) / 1.85) & (y <= 0.9)


def outline_cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two bars, upright."""
    return (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)


def outline_star(x: np.ndarray, y: np.ndarray, inner: float = 0.42) -> np.ndarray:
    """Five points, one of them up; `inner` is the radius of the notches."""
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # from the nearest point's direction
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    notch_along, notch_across = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    return (1 - along) * notch_across >= across * (1 - notch_along)


def outline_ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disc with a hole."""
    return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.55**2)


def outline_moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A crescent, open to the right."""
    return (x**2 + y**2 <= 1) & ((x - 0.62) ** 2 + y**2 >= 0.9**2)


def outline_arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An arrow that points upwards."""
    return (np.abs(x) <= np.where(y < 0, y + 1, 0)) | ((np.abs(x) <= 0.28) & (y >= -0.1))


@dataclass(frozen=True)
class Track:
    """Where a shape may move, in pixels: its size, the frame's, and how far; `along` and `across` (0..1) place it."""

    size: int
    width: int
    height: int
    travel: float  # fraction of the frame's side
    along: float
    across: float


# Centres (x, y) and sizes in pixels at each progress 0..1 of an event: float [n], float [n], int [n]. The shape stays
# in the frame, and each half of the event shows the motion.
Way = tuple[np.ndarray, np.ndarray, np.ndarray]
Motion = Callable[[Track, np.ndarray], Way]


def move_right(track: Track, progress: np.ndarray) -> Way:
    """A straight line to the right."""
    return _follow_row(track, progress)


def move_left(track: Track, progress: np.ndarray) -> Way:
    """A straight line to the left."""
    return _follow_row(track, 1 - progress)


def move_down(track: Track, progress: np.ndarray) -> Way:
    """A straight line downwards."""
    return _follow_column(track, progress)


def move_up(track: Track, progress: np.ndarray) -> Way:
    """A straight line upwards."""
    return _follow_column(track, 1 - progress)


def swing(track: Track, progress: np.ndarray) -> Way:
    """To and fro, twice in an event."""
    return _follow_row(track, (1 + np.sin(4 * np.pi * progress)) / 2)


def hop(track: Track, progress: np.ndarray) -> Way:
    """Up and back, twice in an event."""
    return _follow_column(track, 1 - np.abs(np.sin(2 * np.pi * progress)))


def grow(track: Track, progress: np.ndarray) -> Way:
    """Stays where it is and becomes larger."""
    return _change_size(track, progress)


def shrink(track: Track, progress: np.ndarray) -> Way:
    """Stays where it is and becomes smaller."""
    return _change_size(track, 1 - progress)


def _follow_row(track: Track, progress: np.ndarray) -> Way:
    forward, across = _place(track, progress, track.width, track.height)
    return forward, across, np.full(len(progress), track.size)


def _follow_column(track: Track, progress: np.ndarray) -> Way:
    forward, across = _place(track, progress, track.height, track.width)
    return across, forward, np.full(len(progress), track.size)


def _place(track: Track, progress: np.ndarray, length: int, breadth: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres along and across a line through the frame, `progress` of the way from its beginning."""
    way = track.travel * length
    first = track.size / 2 + track.along * (length - track.size - way)
    forward = first + way * progress
    return forward, np.full_like(forward, track.size / 2 + track.across * (breadth - track.size))


def _change_size(track: Track, progress: np.ndarray, least: float = 0.6, most: float = 1.3) -> Way:
    """Sizes from `least` to `most` times the track's, at one place where the largest has room."""
    sizes = np.round(track.size * (least + (most - least) * progress)).astype(int)
    largest = round(most * track.size)
    x, y = (
        largest / 2 + share * (side - largest)
        for share, side in ((track.along, track.width), (track.across, track.height))
    )
    return np.full(len(progress), x), np.full(len(progress), y), sizes
