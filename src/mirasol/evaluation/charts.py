"""Charts and pictures as text that stands in a page by itself: inline SVG that takes its colours from the page's style
sheet (so it is right in light and dark), and PNG as data URLs."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

# Five stops from dark to bright through purple and orange, evenly lightening: for spectrograms.
_HEAT = np.array([(8, 8, 24), (76, 26, 110), (170, 48, 110), (240, 120, 70), (254, 236, 170)], dtype=float)


def png_url(pixels: np.ndarray) -> str:
    """A picture, uint8 [height, width, 3], as a data URL that an <img> can show."""
    height, width, channels = pixels.shape
    assert channels == 3 and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # \0: no filter on this row
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers [height, width] as colours, uint8 [height, width, 3]: the smallest dark, the largest bright."""
    low, high = float(values.min()), float(values.max())
    place = (values - low) / max(high - low, 1e-9) * (len(_HEAT) - 1)
    below = np.clip(place.astype(int), 0, len(_HEAT) - 2)
    share = (place - below)[..., None]
    return (_HEAT[below] * (1 - share) + _HEAT[below + 1] * share).round().astype(np.uint8)


@dataclass(frozen=True)
class Line:
    """One curve: `points` are (x, y); `style` is the CSS class that colours it."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class Frame:
    """Size of a chart in its own units and where the plot lies in it."""

    width: float
    height: float
    left: float = 44
    right: float = 14
    top: float = 20
    bottom: float = 28


def line_chart(
    lines: Sequence[Line],
    frame: Frame,
    *,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    marks: Mapping[float, str] | None = None,
    direct_labels: bool = False,
) -> str:
    """An SVG of curves over training steps.

    `marks` are x positions with a label, drawn as dashed lines (the beginnings of stages); `direct_labels` writes each
    curve's name and last value beside its end. `percent` labels the y axis in percent.
    """
    points = [point for line in lines for point in line.points]
    x_high = max((x for x, _ in points), default=1.0) or 1.0
    low, high = y_range or (0.0, max((y for _, y in points), default=1.0) * 1.05 or 1.0)
    across, down = frame.width - frame.left - frame.right, frame.height - frame.top - frame.bottom

    def place(x: float, y: float) -> tuple[float, float]:
        share = (min(max(y, low), high) - low) / (high - low)
        return frame.left + across * x / x_high, frame.top + down * (1 - share)

    parts = [f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" class="chart" role="img">']
    for tick in ticks(low, high, 4):
        _, y = place(0, tick)
        label = f"{tick:.0%}" if percent else f"{tick:g}"
        parts.append(
            f'<line x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{frame.left - 7}" y="{y + 3.5:.1f}" class="tick" text-anchor="end">{label}</text>'
        )
    for tick in ticks(0, x_high, 5 if frame.width > 500 else 3):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{frame.height - 9}" class="tick" text-anchor="middle">{tick:g}</text>')
    for x_mark, label in (marks or {}).items():
        x, _ = place(x_mark, low)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.top + down}" class="mark"/>'
            f'<text x="{x:.1f}" y="{frame.top - 5}" class="tick">{escape(label)}</text>'
        )
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        title = f"<title>{escape(line.name)}</title>"
        parts.append(f'<polyline points="{path}" class="line {line.style}">{title}</polyline>')
    if direct_labels:
        parts += _end_labels([line for line in lines if line.points], place, frame)
    return "".join([*parts, "</svg>"])


def _end_labels(lines: Sequence[Line], place, frame: Frame, gap: float = 15) -> list[str]:
    """Names and last values at the curves' ends, pushed apart where they would overlap."""
    ends = sorted(((place(*line.points[-1])[1], line) for line in lines), key=lambda end: end[0])
    placed: list[float] = []
    for y, _ in ends:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    # Pushed below the plot: move the whole block up again.
    overflow = max(0.0, placed[-1] - (frame.height - frame.bottom)) if placed else 0.0
    for place_in_row in range(len(placed) - 1, -1, -1):
        highest = placed[place_in_row + 1] - gap if place_in_row + 1 < len(placed) else placed[place_in_row] - overflow
        placed[place_in_row] = min(placed[place_in_row], highest)
    x = frame.width - frame.right + 8
    return [
        f'<text x="{x}" y="{y + 4:.1f}" class="label {line.style}">'
        f'{escape(line.name)} <tspan class="value">{line.points[-1][1]:.0%}</tspan></text>'
        for y, (_, line) in zip(placed, ends, strict=True)
    ]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers from low to high."""
    raw = (high - low) / max(wanted, 1)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """A running mean of y over `share` of all points, to see a curve's way through its noise."""
    half = max(1, int(len(points) * share / 2))
    windows = [points[max(0, k - half) : k + half + 1] for k in range(len(points))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]
