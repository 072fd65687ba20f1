"""An explanation as figures for papers, drawn of its arrays and numbers alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mirasol.evaluation.figures import COLOURS, apply_style, create_figure, make_accent_colormap
from mirasol.explain.compute import Explanation
from mirasol.explain.describe import describe_explanation
from mirasol.explain.pictures import LINES, colour_frames, colour_spectrogram, scale_spectrogram, trace_waveform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDTH, MARGINS, LARGEST_FRAME = 10.2, 1.5, 2.5  # inches: of a figure, beside its columns, of a frame
NAMES = {
    "transformer": "Transformer Combiner",
    "cls": "CLS Combiner",
    "perceiver": "Perceiver Combiner",
    "ttm": "Token Turing Machine",
    "late": "Late fusion",
    "concat": "No Combiner",
}
MOST_LABELS, MOST_NUMBERS = 12, 32  # of the time axis, and of chunks


def draw_figures(explanation: Explanation, chunk: int) -> dict[str, "Figure"]:
    """All figures by name; `chunk`, from 0, is the one whose features are looked at."""
    figures = {"timeline": draw_timeline(explanation, chunk), "combiner": draw_combiner(explanation, chunk)}
    if explanation.reading.memory is not None:
        figures["memory"] = draw_memory(explanation, chunk)
    return figures


def draw_timeline(explanation: Explanation, chunk: int) -> "Figure":
    """Frames, waveform and spectrogram on one axis, and below each chunk the attention of every token of the answer and
    what the answer loses without the chunk's picture or sound."""
    record = describe_explanation(explanation, chunk)
    attention = [(token["text"], token["attention"]) for token in record["tokens"]]  # a text may come twice
    losses = [(f"without {name}", record["mattered"][f"loss_without_{name}"]) for name in ("picture", "sound")]
    side = _find_side(explanation)
    heights = [side, 0.45, 0.8, 0.27 * len(attention), 0.54]
    with apply_style():
        figure = create_figure(WIDTH, sum(heights) + 1.15)
        rows = figure.add_gridspec(5, 1, height_ratios=heights)
        axes = [figure.add_subplot(row) for row in rows]
        title = f"{record['question']}   {record['answer'] or '(nothing)'}"
        figure.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)  # a $ is a $
        frames = None if explanation.frames is None else explanation.frames[:, explanation.frames.shape[1] // 2]
        _draw_frames(axes[0], explanation, frames, "seen")
        _draw_waveform(axes[1], explanation)
        heard = None if explanation.spectrogram is None else scale_spectrogram(explanation)
        _draw_sound(axes[2], explanation, heard, "heard")
        _draw_cells(axes[3], attention, 100, "{:.0f}", make_accent_colormap())
        _draw_cells(axes[4], losses, 1, "{:.2f}", _make_signed_colormap(), signed=True)
        axes[3].set_title("attention while each token was predicted, percent", **_SMALL)
        axes[4].set_title("log-likelihood that the answer loses, nats", **_SMALL)
    return figure


def draw_combiner(explanation: Explanation, chunk: int, title: str | None = None) -> "Figure":
    """What the features of one chunk read: the pictures and the sound of all chunks in grey, in orange what is read of
    them, and each feature's shares."""
    record = describe_explanation(explanation, chunk)
    shares, numbers = explanation.reading.rollout[chunk].mean(axis=0), record["reads"]["rollout"]
    features = numbers["by_feature"]
    side, height = _find_side(explanation), min(0.16 * len(features), 1.8)
    with apply_style():
        figure = create_figure(WIDTH, side + 0.8 + 0.54 + height + 1.2)
        rows = figure.add_gridspec(4, 1, height_ratios=[side, 0.8, 0.54, height])
        axes = [figure.add_subplot(row) for row in rows]
        named = f"{NAMES[explanation.reading.kind]}: what the {len(features)} features of chunk {chunk + 1} read"
        figure.suptitle(title or named, fontsize=11, fontweight="bold")
        _draw_frames(axes[0], explanation, colour_frames(explanation, shares), "of pictures")
        _draw_sound(axes[1], explanation, colour_spectrogram(explanation, shares), "of sound")
        totals = [(name, numbers[name]) for name in ("picture", "sound")]
        _draw_cells(axes[2], totals, 100, "{:.0f}", make_accent_colormap())
        rest = f"; {100 * numbers['own']:.0f} % is no feature" if numbers["own"] else ""
        axes[2].set_title(f"share of each chunk, percent{rest}", **_SMALL)
        _draw_features(axes[3], features)
        for axis in axes[:2]:
            axis.axvspan(chunk, chunk + 1, fill=False, edgecolor=COLOURS["ink"], linewidth=1.6, zorder=5)
    return figure


def draw_memory(explanation: Explanation, chunk: int) -> "Figure":
    """What the memory of a Token Turing Machine holds after each chunk, and, next to it, each of its tokens after one
    chunk."""
    memory = describe_explanation(explanation, chunk)["reads"]["memory"]
    chunks = explanation.chunks
    panels = {
        "after chunk": (memory["content"], memory["empty"]),
        f"token of the memory after chunk {chunk + 1}": (memory["slots"], memory["slots_empty"]),
    }
    with apply_style():
        figure = create_figure(WIDTH, 4.0)
        figure.suptitle("What the memory holds of which chunk", fontsize=11, fontweight="bold")
        for axes, (name, (content, empty)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            values = np.column_stack([np.array(content), np.array(empty)])
            image = axes.imshow(values, cmap=make_accent_colormap(), vmin=0, aspect="auto")
            axes.set(ylabel=name)
            axes.set_xticks([*range(0, chunks, -(-chunks // MOST_LABELS)), chunks])
            axes.set_xticklabels([*(str(place + 1) for place in range(0, chunks, -(-chunks // MOST_LABELS))), "empty"])
            rows = range(0, len(values), -(-len(values) // 16))
            axes.set_yticks(list(rows), [str(place + 1) for place in rows])
            axes.set_xlabel("share of each chunk")
            axes.grid(False)
            figure.colorbar(image, ax=axes, shrink=0.8).outline.set_visible(False)
    return figure


def _find_side(explanation: Explanation) -> float:
    """Inches that a chunk's frame is high: as wide as its column, unless few chunks have much room."""
    return min((WIDTH - MARGINS) / explanation.chunks, LARGEST_FRAME)


_SMALL: dict[str, Any] = {"fontsize": 8, "loc": "left", "color": COLOURS["soft"], "pad": 3}


def _draw_frames(axes: "Axes", explanation: Explanation, frames: np.ndarray | None, name: str) -> None:
    """One frame in the column of each chunk that has a picture."""
    for place, present in enumerate(explanation.video_present):
        if frames is not None and present:
            extent = (place + 0.03, place + 0.97, 0, 1)
            axes.imshow(frames[place], extent=extent, aspect="auto", interpolation="nearest")
        else:
            axes.text(place + 0.5, 0.5, "no picture", ha="center", va="center", fontsize=7, color=COLOURS["soft"])
    _label_row(axes, name, explanation.chunks)
    axes.set(ylim=(0, 1), xticks=[])


def _draw_sound(axes: "Axes", explanation: Explanation, picture: np.ndarray | None, name: str) -> None:
    """A spectrogram over all chunks, and the times of their edges."""
    chunks = explanation.chunks
    if picture is None:
        axes.text(chunks / 2, 0.5, "no sound", ha="center", va="center", fontsize=8, color=COLOURS["soft"])
    else:
        axes.imshow(picture, extent=(0, chunks, 0, 1), aspect="auto", cmap="inferno")
    _label_row(axes, name, chunks)
    places = range(0, chunks + 1, -(-chunks // MOST_LABELS))
    axes.set_xticks(list(places), [f"{explanation.edges[place]:.4g} s" for place in places])
    axes.set(ylim=(0, 1))


def _draw_waveform(axes: "Axes", explanation: Explanation) -> None:
    ends = trace_waveform(explanation)
    if ends is not None:
        places = (np.arange(LINES) + 0.5) * explanation.chunks / LINES
        axes.fill_between(places, ends[:, 0], ends[:, 1], color=COLOURS["soft"], linewidth=0.4)
    _label_row(axes, "waveform", explanation.chunks)
    axes.set(xticks=[])


def _draw_cells(
    axes: "Axes",
    rows: Sequence[tuple[str, Sequence[float | None]]],
    factor: float,
    number: str,
    colours: "Colormap",
    signed: bool = False,
) -> None:
    """A row of numbers under the chunks for each name; darker is larger. Narrow columns have their colour alone."""
    values = np.array([[np.nan if value is None else value for value in row] for _, row in rows], float)
    most = max(np.nanmax(np.abs(values)) if np.isfinite(values).any() else 0.0, 1e-9)
    axes.imshow(
        values, cmap=colours, vmin=-most if signed else 0, vmax=most, aspect="auto",
        extent=(0, values.shape[1], len(rows), 0),
    )  # fmt: skip
    size = 7 if values.shape[1] <= 16 else 5
    texts = [
        "–" if np.isnan(one) else number.format(factor * one + 0.0).replace("-0.00", "0.00") for one in values.flat
    ]
    room = 72 * (WIDTH - MARGINS) / values.shape[1]  # points
    is_wide = max(map(len, texts), default=0) * 0.62 * size <= room
    for ((row, column), value), text in zip(
        np.ndenumerate(values), texts if is_wide else [""] * len(texts), strict=True
    ):
        dark = abs(value) > 0.6 * most
        axes.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color="#fff" if dark else "#26190f"
        )
    axes.set(xticks=[], xlim=(0, values.shape[1]))
    axes.set_yticks(np.arange(len(rows)) + 0.5, [name for name, _ in rows], parse_math=False)
    axes.grid(False)


def _draw_features(axes: "Axes", features: Sequence[Mapping[str, Any]]) -> None:
    """A row for each feature; under each chunk the left half is what it reads of the picture, the right half of the
    sound."""
    values = np.array([np.column_stack([row["picture"], row["sound"]]).flatten() for row in features])
    chunks = values.shape[1] // 2
    axes.imshow(
        values, cmap=make_accent_colormap(), vmin=0, aspect="auto", extent=(0, chunks, len(values), 0),
        interpolation="nearest",
    )  # fmt: skip
    for place in range(chunks + 1):
        axes.axvline(place, color="#ffffff", linewidth=1.5)
    _label_row(axes, "features", chunks)
    places = range(0, chunks, -(-chunks // MOST_NUMBERS))
    axes.set_xticks([place + 0.5 for place in places], [str(place + 1) for place in places])
    axes.set_title("each feature: left half of a column pictures, right half sound", **_SMALL)
    axes.set_xlabel("chunk")


def _label_row(axes: "Axes", name: str, chunks: int) -> None:
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.set(yticks=[], xlim=(0, chunks))
    axes.grid(False)


def _make_signed_colormap() -> "Colormap":
    """Blue below zero, orange above."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", [COLOURS["c1"], "#f7f3ea", COLOURS["accent"]])
