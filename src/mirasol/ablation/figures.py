"""The figures of a suite: its forest plot, and how its rows learn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mirasol.ablation.result import RowResult, SuiteResult
from mirasol.ablation.sections import list_ages
from mirasol.ablation.statistics import Spread
from mirasol.evaluation.figures import COLOURS, TYPE_COLOURS, Curve, apply_style, create_figure, draw_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICT_COLOURS = {"reproduced": "good", "refuted": "bad", "undecided": "soft"}


def draw_forest(result: SuiteResult) -> "Figure":
    """For every row its mean with the interval and each seed as a dot, next to its difference from the row that it is
    compared with, in the colour of the verdict; the paper's differences as diamonds."""
    rows, chance = result.rows, result.baselines.get("chance")
    published = [_find_published(row, rows) for row in rows]
    of_chance = "" if chance is None else " (dashed: chance)"
    of_paper = "" if published == [None] * len(rows) else " (diamond: the paper's)"
    with apply_style():
        figure = create_figure(10.2, 0.46 * len(rows) + 1.1)
        left, right = figure.subplots(1, 2, sharey=True)
        places = np.arange(len(rows))[::-1]
        for place, row, of_row in zip(places, rows, published, strict=True):
            if row.score is not None:
                _draw_spread(left, place, row.score, "accent", 100)
            if row.difference is not None:
                _draw_spread(right, place, row.difference, VERDICT_COLOURS.get(row.verdict or "", "ink"), 100)
            if of_row is not None:
                right.plot(of_row, place, marker="D", markersize=5, color=COLOURS["ink"], markerfacecolor="none")
        if chance is not None:
            left.axvline(100 * chance, color=COLOURS["soft"], linewidth=1, linestyle=(0, (4, 2.5)))
        right.axvline(0, color=COLOURS["ink"], linewidth=1)
        left.set_yticks(places, [row.label for row in rows], color=COLOURS["ink"])
        left.set(xlabel=f"percent right{of_chance}", ylim=(-0.6, len(rows) - 0.4))
        right.set(xlabel=f"difference in points{of_paper}")
        for axes in (left, right):
            axes.grid(visible=True, axis="x")
            axes.grid(visible=False, axis="y")
    return figure


def _draw_spread(axes: "Axes", place: float, spread: Spread, colour: str, scale: float) -> None:
    axes.plot(
        [scale * spread.low, scale * spread.high], [place, place], color=COLOURS[colour], linewidth=2.2,
        solid_capstyle="butt",
    )  # fmt: skip
    axes.plot(scale * spread.mean, place, marker="o", markersize=7, color=COLOURS[colour])
    seeds = [scale * value for value in spread.by_seed]
    axes.plot(seeds, [place + 0.22] * len(seeds), marker="|", markersize=6, linestyle="none", color=COLOURS["soft"])


def _find_published(row: RowResult, rows: Sequence[RowResult]) -> float | None:
    """The paper's difference between a row and the one that it is compared with, in percentage points."""
    other = next((one for one in rows if one.name == row.against), None)
    if other is None or row.paper is None or other.paper is None:
        return None
    return row.paper - other.paper


def draw_learning(result: SuiteResult) -> "Figure | None":
    """Validation accuracy over steps: each seed thin, the mean over the seeds that were validated there strong; None
    without a validation."""
    curves = []
    for colour, row in zip(TYPE_COLOURS * len(result.rows), result.rows, strict=False):
        seeds = [points for points in result.curves[row.name].values() if points]
        if not seeds:
            continue
        curves += [Curve(f"{row.label}, one seed", points, colour, "faint") for points in seeds]
        steps = [step for step, _ in seeds[0] if all(any(step == at for at, _ in points) for points in seeds)]
        mean = [(step, float(np.mean([dict(points)[step] for points in seeds]))) for step in steps]
        curves.append(Curve(row.label, mean, colour))
    if not curves:
        return None
    shown = [curve for curve in curves if curve.look == "plain"]
    highest = max(value for curve in curves for _, value in curve.points)
    figure = draw_curves(curves, (10.2, 3.6), y_range=(0, min(1.0, 1.1 * highest) or 1.0), percent=True)
    figure.axes[0].legend(
        handles=[line for line in figure.axes[0].lines if line.get_label() in {curve.name for curve in shown}],
        fontsize=8, ncols=2, frameon=False, labelcolor=COLOURS["ink"],
    )  # fmt: skip
    return figure


def draw_ages(result: SuiteResult) -> "Figure | None":
    """Right answers over the age of what is asked about, with intervals; None where questions have no ages."""
    ages = list_ages(result)
    if not ages:
        return None
    with apply_style():
        figure = create_figure(10.2, 4.2)
        axes = figure.subplots()
        shift = 1.06 ** (np.arange(len(result.rows)) - (len(result.rows) - 1) / 2)
        for colour, row, factor in zip(TYPE_COLOURS * len(result.rows), result.rows, shift, strict=False):
            spreads = {age: row.by_type[f"age {age}"] for age in ages if f"age {age}" in row.by_type}
            if not spreads:  # not finished
                continue
            x = np.array(list(spreads)) * factor  # side by side, so that intervals can be told apart
            means = [100 * spread.mean for spread in spreads.values()]
            axes.plot(x, means, marker="o", markersize=4.5, color=COLOURS[colour], label=row.label)
            for at, spread in zip(x, spreads.values(), strict=True):
                axes.plot([at, at], [100 * spread.low, 100 * spread.high], color=COLOURS[colour], linewidth=1)
        chance = result.baselines.get("chance")
        if chance is not None:
            axes.axhline(100 * chance, color=COLOURS["soft"], linewidth=1, linestyle=(0, (4, 2.5)))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ages, [f"{age:,}" for age in ages])
        axes.set(xlabel="shown so many chunks before the last (dashed: chance)", ylabel="percent right", ylim=(0, 102))
        axes.legend(fontsize=8, frameon=False, labelcolor=COLOURS["ink"], loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_stream(result: SuiteResult) -> "Figure | None":
    """Kibibytes of state and milliseconds a chunk over the chunks of a stream; None where nothing is streamed, or too
    little for a curve."""
    rows = [(colour, row) for colour, row in zip(TYPE_COLOURS * len(result.rows), result.rows, strict=False)
            if row.stream is not None and len(row.stream.points) > 1]  # fmt: skip
    if not rows:
        return None
    with apply_style():
        figure = create_figure(10.2, 3.8)
        sizes, times = figure.subplots(1, 2)
        for colour, row in rows:
            drawn = {"marker": "o", "markersize": 3.5, "color": COLOURS[colour], "label": row.label}
            x = [point["chunks"] for point in row.stream.points]
            sizes.plot(x, [sum(point["state"].values()) / 1024 for point in row.stream.points], **drawn)
            timed = [point for point in row.stream.points[1:] if point["chunks"] <= row.stream.late["chunks"]]
            times.plot([point["chunks"] for point in timed], [point["milliseconds"] for point in timed], **drawn)
        ticks = sorted({4 ** int(np.log2(point["chunks"]) / 2) for _, row in rows for point in row.stream.points})
        sizes.set(xlabel="chunks so far", ylabel="KiB of state", yscale="log")
        times.set(xlabel="chunks so far", ylabel="ms of processor time a chunk")
        times.set_ylim(bottom=0)
        for axes in (sizes, times):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        times.legend(fontsize=8, frameon=False, labelcolor=COLOURS["ink"], loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
