"""The table of an experiment with folds: mean accuracy over folds, with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mirasol.console import format_table
from mirasol.experiments.baselines import PACKAGE
from mirasol.experiments.folder import Settings
from mirasol.experiments.named import FoldsOf
from mirasol.finetune.outcome import format_share

REFERENCE = "random forest"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """A line of the table; shares lie between 0 and 1.

    each: accuracy of each fold; low, high: 95 % interval of their mean, None with fewer than two folds
    difference: from the random forest on the same clips, with its interval over folds
    """

    name: str
    accuracy: float
    low: float | None = None
    high: float | None = None
    each: tuple[float, ...] = ()
    difference: tuple[float, float | None, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compute_mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean over folds and its 95 % interval by Student's t with one degree of freedom fewer than folds: folds
    differ in their clips and, for a training, in its weights. Without an interval for a single fold."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    from scipy import stats

    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, float(mean - half), float(mean + half)


def summarise(results: Sequence[Mapping[str, Any]], published: Mapping[str, float]) -> list[Row]:
    """A row for each baseline and each start that all folds have, then the published numbers.

    results: by fold `{"group": name, row: {"right": verdicts, …}, …}`
    """
    names = [name for name in results[0] if name != "group"]
    shares = {name: [float(np.mean(result[name]["right"])) for result in results] for name in names}
    rows = []
    for name, each in shares.items():
        difference = None
        if name != REFERENCE:
            difference = compute_mean_interval(list(np.subtract(each, shares[REFERENCE])))
        mean, low, high = compute_mean_interval(each)
        rows.append(Row(name, mean, low, high, tuple(each), difference))
    return rows + [Row(name, value) for name, value in published.items()]


def format_rows(
    rows: Sequence[Row],
    about: FoldsOf,
    settings: Settings,
    results: Sequence[Mapping[str, Any]],
    missing: Sequence[str] = (),
) -> str:
    """The table as text, in percent, with what its numbers depend on, and which groups are `missing`, below it."""
    groups = [str(result["group"]) for result in results]
    cells = [["", "accuracy", "95 % interval", f"minus {REFERENCE}", *groups]]
    for row in rows:
        each = [format_share(share) for share in row.each] or [""] * len(groups)
        difference = "" if row.difference is None else _format_difference(*row.difference)
        cells.append([row.name, format_share(row.accuracy), _format_bounds(row.low, row.high), difference, *each])
    notes = [f"Not done: {about.group} {', '.join(missing)}."] if missing else []
    notes += [_describe_training(start, results) for start in settings.starts]
    made_by = {result[REFERENCE]["versions"][PACKAGE] for result in results}
    notes.append(f"Baselines: {PACKAGE} {_join(made_by)}, seed 0.")
    scored = "the fold after it, for tuning" if settings.tune else f"each {about.group}, trained on all others"
    head = f"{about.title}; scored: {scored}; the class of highest likelihood"
    return "\n".join([head, "", format_table(cells), "", *notes])


def _format_bounds(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{format_share(low)}, {format_share(high)}]"


def _format_difference(mean: float, low: float | None, high: float | None) -> str:
    bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * mean:+.1f}{bounds}"


def _describe_training(start: str, results: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers of a start depend on, and its controls."""
    own = [result[start] for result in results]
    share = {key: float(np.mean([np.mean(one[key]) for one in own])) for key in ("generated", "no audio")}
    hours = sum(one["training_seconds"] for one in own) / 3600
    seeds, steps = ({one[key] for one in own} for key in ("seed", "steps"))
    versions = ", ".join(
        f"{name} {own[0]['versions'][name]}" for name in ("torch", "mirasol") if name in own[0]["versions"]
    )
    return (
        f"{start}: generated word for word {format_share(share['generated'])}, without sound "
        f"{format_share(share['no audio'])}; seed {_join(seeds)}, {_join(steps)} steps, {hours:.2f} hours of training "
        f"together, {versions}, commit {(own[0]['commit'] or 'unknown')[:10]}"
    )


def _join(values: set[Any]) -> str:
    return ", ".join(str(value) for value in sorted(values))
