"""Figures of reports and papers, drawn with matplotlib: inline SVG in the colours of the page, or PDF and PNG files.

Every function that draws returns a matplotlib `Figure`. Nothing here touches pyplot or its global state.
"""

import base64
import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirasol.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from mirasol.evaluation.one_clip import OneClip

FORMATS = ("pdf", "png")
# The page's colours by the name of their CSS variable. On the page an SVG refers to the variable, so that it follows
# light and dark mode; a file has the light values given here. Every value is unique.
COLOURS = {
    "ink": "#1d1c1a", "soft": "#6d6a62", "line": "#e4e1d8", "track": "#eeece4", "card": "#fffefb",
    "accent": "#b4531f", "good": "#2d7a4d", "bad": "#b3382f",
    "c0": "#c0501f", "c1": "#2a6fb0", "c2": "#7a4fb5", "c3": "#1d8577", "c4": "#ab7a08", "c5": "#b33f78",
    "c6": "#5e6b76", "c7": "#8a8a2b",
}  # fmt: skip
TYPE_COLOURS = tuple(f"c{place}" for place in range(8))
# Marker, and whether it is filled, of each further column of the chart of scores, in their order.
MARKERS = (("o", False), ("D", False), ("o", True), ("s", False), ("^", False), ("v", False), ("P", True), ("X", True))
LOSSES = (
    ("text_loss", "Text", "cross-entropy of the target tokens, nats"),
    ("latent_loss", "Latent", "distance to the next chunk's features"),
    ("video_loss", "Video", "distance to the pixels of a chunk"),
    ("audio_loss", "Audio", "distance to the spectrogram of a chunk"),
    ("contrastive_loss", "Contrastive", "images against texts, nats"),
)
# Parts of a validation in logs of a single data set; "slot" is the former name of "segment".
_PARTS = ("segment", "slot", "clip", "any", "image")
# How a curve is drawn, by `Curve.look`.
_LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"linewidth": 1.7},
    "faint": {"linewidth": 0.8, "alpha": 0.35},
    "dashed": {"linewidth": 1.3, "linestyle": (0, (4, 2.5))},
}
# Dashes of the baselines' lines in a chart of scores, in their order.
_DASHES = ("solid", (0, (2, 1.5)), (0, (1, 1)))
# Fonts for letters that DejaVu Sans lacks, of those that are installed.
_FURTHER_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Source Han Sans", "WenQuanYi Zen Hei", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS",
)  # fmt: skip
_MISSING_GLYPH = re.compile(r"Glyph (\d+) .* missing from")
_MOST_POINTS = 1_500  # of one curve
_MOST_ROWS = 40  # of a chart of scores
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["soft"],
    "pdf.fonttype": 42,  # TrueType, as publishers ask for
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mirasol",  # the same figure gives the same bytes
}


def check_figure_format(name: str | None) -> None:
    """Raises UserError for an unknown format of figure files; None is none."""
    if name is not None and name not in FORMATS:
        raise UserError(f"--figures {name}: choose {' or '.join(FORMATS)}")


@dataclass(frozen=True)
class Curve:
    """One curve: `points` are (x, y); `colour` is a key of `COLOURS`; `look` is "plain", "faint" or "dashed"."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    look: str = "plain"


@dataclass(frozen=True)
class ScoreBar:
    """One bar: a number between 0 and 1 with its interval, baselines and markers for controls, by heading."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = "accent"
    lines: Mapping[str, float | None] = field(default_factory=dict)
    marks: Mapping[str, float | None] = field(default_factory=dict)


def draw_reliability(sets: Mapping[str, Sequence[Mapping[str, Any]]], threshold: float | None) -> "Figure":
    """Accuracy over probability for sets of reliability bins by name: a point for each filled bin, its area the number
    of answers, next to the diagonal of perfect calibration and an upright line at the threshold."""
    with apply_style():
        figure = create_figure(5.4, 4.2)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=COLOURS["soft"], linewidth=1, linestyle=(0, (4, 2.5)), label="calibrated")
        for colour, (name, bins) in zip(TYPE_COLOURS, sets.items(), strict=False):
            filled = [one for one in bins if one["answers"]]
            x, y = ([one[key] for one in filled] for key in ("probability", "accuracy"))
            most = max((one["answers"] for one in filled), default=1)
            axes.plot(x, y, color=COLOURS[colour], linewidth=1.3, label=name)
            axes.scatter(x, y, [12 + 130 * one["answers"] / most for one in filled], color=COLOURS[colour], alpha=0.75)
        if threshold:
            axes.axvline(threshold, color=COLOURS["ink"], linewidth=1, label="not sure to the left")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="probability of the answer", ylabel="share of right answers")
        axes.legend(loc="upper left", fontsize=8)
    return figure


def draw_scores(bars: Sequence[ScoreBar]) -> "Figure":
    """Horizontal bars with intervals, an upright line for each baseline and a marker for each control."""
    bars = bars[:_MOST_ROWS]
    with apply_style():
        figure = create_figure(10.2, 0.42 * len(bars) + 0.75)
        axes = figure.subplots()
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        places = np.arange(len(bars))[::-1]
        axes.barh(places, 1, 0.62, color=COLOURS["track"])
        for place, bar in zip(places, bars, strict=True):
            axes.barh(place, bar.value, 0.62, color=COLOURS[bar.colour], alpha=0.88)
            if bar.low is not None and bar.high is not None:
                ends = [bar.low, bar.high]
                axes.plot(
                    ends, [place, place], color=COLOURS["ink"], alpha=0.6, linewidth=1.2, marker="|", markersize=5
                )
            axes.text(1.012, place, f"{100 * bar.value:.1f} %", va="center", color=COLOURS["ink"], fontweight="bold")
            _draw_references(axes, bar, place)
        axes.set_yticks(places, [bar.name for bar in bars], color=COLOURS["ink"], fontweight="bold")
        axes.tick_params(axis="y", pad=8)
        axes.set_xticks(np.linspace(0, 1, 5), [f"{share:.0%}" for share in np.linspace(0, 1, 5)])
        axes.set(xlim=(0, 1.075), ylim=(-0.6, len(bars) - 0.4))
        _draw_legend(figure, bars)
    return figure


def _draw_references(axes: "Axes", bar: ScoreBar, place: float) -> None:
    for (_, value), dashes in zip(bar.lines.items(), _DASHES, strict=False):
        if value is not None:
            axes.plot(
                [value, value], [place - 0.42, place + 0.42], color=COLOURS["ink"], linewidth=1.5, linestyle=dashes
            )
    for (_, value), (marker, filled) in zip(bar.marks.items(), MARKERS, strict=False):
        if value is not None:
            axes.plot(value, place, **_choose_marker_style(marker, filled), clip_on=False, zorder=4)


def _choose_marker_style(marker: str, filled: bool) -> dict[str, Any]:
    face = COLOURS["ink" if filled else "card"]
    return {
        "marker": marker,
        "markersize": 6,
        "markerfacecolor": face,
        "markeredgecolor": COLOURS["ink"],
        "markeredgewidth": 1.3,
        "linestyle": "none",
    }


def _draw_legend(figure: "Figure", bars: Sequence[ScoreBar]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if bars and any(bar.low is not None for bar in bars):
        handles.append(
            Line2D(
                [], [], color=COLOURS["ink"], alpha=0.6, linewidth=1.2, marker="|", markersize=5, label="95 % interval"
            )
        )
    for name, dashes in zip(bars[0].lines if bars else (), _DASHES, strict=False):
        handles.append(Line2D([], [], color=COLOURS["ink"], linewidth=1.5, linestyle=dashes, label=name))
    for name, (marker, filled) in zip(bars[0].marks if bars else (), MARKERS, strict=False):
        handles.append(Line2D([], [], **_choose_marker_style(marker, filled), label=name))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), handlelength=1.6, fontsize=8.5)


def draw_curves(
    curves: Sequence[Curve],
    size: tuple[float, float],
    *,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    marks: Mapping[float, str] | None = None,
    end_labels: bool = False,
) -> "Figure":
    """Curves over training steps.

    size: inches; marks: x positions with a label, drawn as dashed upright lines (the first steps of stages)
    end_labels: write each curve's name and last value at its end; percent: label the y axis in percent
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with apply_style():
        figure = create_figure(*size)
        axes = figure.subplots()
        for curve in curves:
            shown = curve.points[:: -(-len(curve.points) // _MOST_POINTS)] if curve.points else []
            x, y = np.array(shown, dtype=float).reshape(-1, 2).T
            axes.plot(x, y, color=COLOURS[curve.colour], label=curve.name, **_LOOKS[curve.look])
        if y_range is not None:
            axes.set_ylim(*y_range)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6 if size[0] > 5 else 3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        for x, label in (marks or {}).items():
            axes.axvline(x, color=COLOURS["soft"], linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)
            axes.text(x, 1.02, f" {label}", transform=axes.get_xaxis_transform(), color=COLOURS["soft"], fontsize=8)
        if end_labels:
            _label_ends(axes, [curve for curve in curves if curve.points])
    return figure


def _label_ends(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Names and last values to the right of the curves' ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = sorted(curves, key=lambda curve: curve.points[-1][1])
    places = spread_apart([(curve.points[-1][1] - low) / (high - low) for curve in ends], gap=0.058)
    for place, curve in zip(places, ends, strict=True):
        text = f"{curve.name} {curve.points[-1][1]:.0%}"
        axes.text(
            1.012,
            place,
            text,
            transform=axes.transAxes,
            va="center",
            color=COLOURS[curve.colour],
            fontweight="bold",
            fontsize=8.5,
        )


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved so that neighbours are at least `gap` apart, within [0, 1] as far as there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    limit = 1.0
    for number in range(len(moved) - 1, -1, -1):
        moved[number] = min(moved[number], limit)
        limit = moved[number] - gap
    return moved


def draw_losses(log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, "Figure"]]:
    """By loss: its last running mean, its unit, and its figure; losses that the run does not have are left out.

    Every logged value is thin, their running mean strong, the validation on whole clips dashed.
    """
    train = [row for row in log if row["kind"] == "train"]
    figures = {}
    for key, title, unit in LOSSES:
        points = [(row["step"], row[key]) for row in train if key in row]
        if not points:
            continue
        validation = [
            (row["step"], row["clip"][key]) for row in log if row["kind"] == "validation" and key in row.get("clip", {})
        ]
        # The first steps are far above the rest: the axis is made for what comes after them.
        values = sorted(value for _, value in points)
        high = values[int(0.97 * (len(values) - 1))] * 1.1
        smooth = smooth_points(points)
        curves = [
            Curve(f"{title} loss", points, "accent", "faint"),
            Curve("running mean", smooth, "accent"),
            Curve("validation, whole clips", validation, "ink", "dashed"),
        ]
        figure = draw_curves(curves, (3.4, 2.0), y_range=(0, high or 1.0), marks=find_stage_starts(log))
        figures[title] = (f"{smooth[-1][1]:.3f}", unit, figure)
    return figures


def draw_learning(log: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> "Figure | None":
    """Validation accuracy of every question type over training; None without a validation."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for name, accuracy in find_validation_accuracy(row).items():
            curves.setdefault(name, []).append((row["step"], accuracy))
    if not curves:
        return None
    names = sorted(curves, key=lambda name: (list(colours).index(name) if name in colours else len(colours), name))
    later = iter(TYPE_COLOURS[len(colours) % 8 :] + TYPE_COLOURS * len(names))
    lines = [Curve(name, curves[name], colours.get(name) or next(later)) for name in names]
    return draw_curves(lines, (10.2, 3.3), y_range=(0, 1), percent=True, marks=find_stage_starts(log), end_labels=True)


def find_validation_accuracy(row: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by question type of a validation line, all its parts together; nothing for other lines."""
    if row["kind"] != "validation":
        return {}
    found: dict[str, float] = {}
    for part, values in row.items():
        if isinstance(values, Mapping) and "by_type" in values:
            prefix = "" if part in _PARTS else f"{part.rpartition('_')[0]}: "
            found |= {f"{prefix}{name}": own["accuracy"] for name, own in values["by_type"].items()}
    return found


def find_stage_starts(log: Sequence[Mapping[str, Any]]) -> dict[float, str]:
    """First logged step of each stage and the stage's name."""
    train = [row for row in log if row["kind"] == "train"]
    return {next(rows)["step"]: stage for stage, rows in groupby(train, key=lambda row: row["stage"])}


def smooth_points(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """A centred running mean of y over `share` of all points, narrower at both ends."""
    half = max(1, int(len(points) * share / 2))
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    sums = np.concatenate([[0.0], np.cumsum(y)])
    places = np.arange(len(y))
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(y))
    return list(zip(x.tolist(), ((sums[end] - sums[first]) / np.maximum(end - first, 1)).tolist(), strict=True))


def draw_confusion(counts: np.ndarray, classes: Sequence[str], most_names: int = 45) -> "Figure":
    """The share of each target's clips (row) that were given each class (column); few classes with names and counts."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= most_names
    side = min(10.2, 2.6 + 0.26 * len(classes)) if named else 6.0
    with apply_style():
        figure = create_figure(side, side * 0.85 if named else side)
        axes = figure.subplots()
        axes.grid(False)
        image = axes.imshow(shares, cmap=make_accent_colormap(), vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="chosen", ylabel="target")
        if named:
            axes.set_xticks(range(len(classes)), classes, rotation=90, color=COLOURS["ink"])
            axes.set_yticks(range(len(classes)), classes, color=COLOURS["ink"])
        if len(classes) <= 25:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    dark = shares[row, column] > 0.55
                    axes.text(
                        column,
                        row,
                        str(count),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="#ffffff" if dark else "#26190f",
                    )
        figure.colorbar(image, ax=axes, shrink=0.6, label="share of the target's clips").outline.set_visible(False)
    return figure


def make_accent_colormap() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("mirasol", ["#f7f3ea", "#f0b48a", "#b4531f", "#5e2408"])


def draw_one_clip(one: "OneClip") -> "Figure":
    """The clip of `OneClip` for a paper: frames, reconstructed frames, spectrogram, attention of each answer."""
    chunks, questions = len(one.edges) - 1, len(one.judged)
    missing = chunks - len(one.reconstruction)  # the first chunk cannot be predicted
    heights = [1, 1, 1.3, 0.38 * max(questions, 1)]
    with apply_style():
        figure = create_figure(10.2, 0.62 * sum(heights) + 0.6)
        rows = figure.add_gridspec(4, 1, height_ratios=heights)
        strips = (("seen", one.frames, 0), ("expected" if missing else "reconstructed", one.reconstruction, missing))
        for place, (title, frames, first) in enumerate(strips):
            axes = figure.add_subplot(rows[place])
            _draw_strip(axes, frames if frames is not None else (), first, chunks)
            axes.set_ylabel(title, rotation=0, ha="right", va="center")
        axes = figure.add_subplot(rows[2])
        if one.spectrogram is not None:
            axes.imshow(
                one.spectrogram.T,
                cmap="inferno",
                origin="lower",
                aspect="auto",
                extent=(0, chunks, 0, one.spectrogram.shape[1]),
            )
        axes.set_xticks(range(chunks + 1), [f"{edge:g}" for edge in np.round(one.edges, 2)])
        axes.set(yticks=[], xlim=(0, chunks))
        axes.set_ylabel("heard", rotation=0, ha="right", va="center")
        axes = figure.add_subplot(rows[3])
        axes.imshow(one.attention, cmap=make_accent_colormap(), aspect="auto", vmin=0)
        axes.set_yticks(range(questions), [f"{item.example.prompt} {item.shown_answer}" for item in one.judged])
        axes.set(xticks=[])
        for axes in figure.axes:
            axes.grid(False)
    return figure


def _draw_strip(axes: "Axes", frames: Sequence[np.ndarray] | np.ndarray, first: int, chunks: int) -> None:
    """The middle frame of each chunk in its column, from column `first` on."""
    for place, chunk in enumerate(frames):
        left = first + place
        axes.imshow(chunk[len(chunk) // 2], extent=(left + 0.03, left + 0.97, 0, 0.94), aspect="auto")
    axes.set(xlim=(0, chunks), ylim=(0, 0.94), xticks=[], yticks=[])


def convert_to_svg(figure: "Figure", title: str) -> str:
    """The figure as inline SVG of a page: its colours are the page's variables, and it refers to no other file."""
    buffer = io.StringIO()
    with apply_style():
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = figure.get_size_inches() * 72  # the viewBox is in points
    head = f'<svg viewBox="0 0 {width:g} {height:g}" class="chart" role="img" style="max-width:{1.4 * width:.0f}px">'
    text = f"{head}<title>{escape(title)}</title>{text[text.index('>') + 1 :]}"
    text = text.replace("xlink:href", "href")
    text = re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", text)  # names of groups, which would repeat from figure to figure
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for name, value in COLOURS.items():
        text = text.replace(value, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", text)


def write_figures(folder: Path, figures: Mapping[str, "Figure"], file_format: str) -> list[Path]:
    """Writes each figure as NAME.pdf or NAME.png into the folder, in light colours."""
    folder.mkdir(exist_ok=True)
    # Without a date the same numbers give the same file.
    dated = {"CreationDate": None} if file_format == "pdf" else {}
    files = []
    with apply_style():
        for name, figure in figures.items():
            files.append(folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.{file_format}")
            figure.savefig(files[-1], format=file_format, dpi=200, metadata=dated)
    return files


def make_picture_url(pixels: np.ndarray, largest: int | None = None) -> str:
    """A picture, uint8 [height, width, 3], as a PNG data URL; made smaller where it is higher than `largest` pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if largest is not None and image.height > largest:
        image = image.resize((round(image.width * largest / image.height), largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def map_to_colours(values: np.ndarray) -> np.ndarray:
    """Numbers [height, width] as colours, uint8 [height, width, 3]: the smallest dark, the largest bright."""
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    return colormaps["inferno"]((values - low) / max(high - low, 1e-9), bytes=True)[..., :3]


@contextlib.contextmanager
def apply_style() -> Iterator[None]:
    """A context in which figures are drawn and written as all of them are. At its end it warns of letters that no
    installed font has."""
    import matplotlib

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with matplotlib.rc_context({**_STYLE, "font.sans-serif": list(_list_fonts())}):
            yield
    missing = []
    for one in caught:
        if found := _MISSING_GLYPH.match(str(one.message)):
            missing.append(chr(int(found[1])))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing:
        letters = "".join(dict.fromkeys(missing))
        warnings.warn(
            f"figures: no installed font has {letters!r}: boxes stand for these letters: install one that has them, "
            f"such as {_FURTHER_FONTS[0]}", stacklevel=3,
        )  # fmt: skip


@functools.cache
def _list_fonts() -> tuple[str, ...]:
    """The fonts to look for letters in, in their order."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FURTHER_FONTS if name in installed))


def create_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
