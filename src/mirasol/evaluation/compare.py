"""The paired difference of two sets of predictions on the same questions, and whether it may be chance."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirasol.console import format_table
from mirasol.data.datasets.tables import raise_if_not_utf8, read_text
from mirasol.errors import UserError
from mirasol.evaluation.intervals import compute_mean_intervals, compute_sign_test
from mirasol.evaluation.metrics import OPEN, PREDICTION_FILES
from mirasol.evaluation.predictions import parse_line
from mirasol.json_values import parse_json


@dataclass(frozen=True)
class Difference:
    """Accuracy of `first` and `second` on `n` questions, and second minus first with its paired 95 % interval.

    low, high: bootstrap over videos, both sets drawn together; p_mcnemar: exact, assumes independent questions
    """

    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    n: int
    first_only: int
    second_only: int
    p_mcnemar: float


@dataclass(frozen=True)
class Comparison:
    """Differences by question type and, under "All", over all questions that both sets contain; the others are counted.

    judged: protocol and normalisation of each; None where no results.json next to it states them
    """

    rows: dict[str, Difference]
    only_first: int
    only_second: int
    judged: tuple[str | None, str | None] = (None, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = {name: asdict(row) for name, row in self.rows.items()}
        return {
            "rows": rows,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "first_judged_by": self.judged[0],
            "second_judged_by": self.judged[1],
        }

    def format_table(self) -> str:
        """One line per type, in percent."""
        cells = [["", "first", "second", "diff", "95 % interval", "p", "n"]]
        for name, row in self.rows.items():
            low, high = (f"{100 * bound:+.2f}" if bound is not None else "-" for bound in (row.low, row.high))
            shares = [f"{100 * row.first:.2f}", f"{100 * row.second:.2f}", f"{100 * row.difference:+.2f}"]
            cells.append([name, *shares, f"[{low}, {high}]", f"{row.p_mcnemar:.4f}", str(row.n)])
        lines = [format_table(cells)]
        if self.only_first or self.only_second:
            lines.append(
                f"left out: {self.only_first} questions only in the first, {self.only_second} only in the second"
            )
        if self.judged[0] != self.judged[1]:
            one, other = (how or "unknown: no results.json next to it" for how in self.judged)
            lines.append(f"judged differently: the first by {one}; the second by {other}")
        return "\n".join(lines)


def compare_results(first: Path, second: Path, seed: int = 0) -> Comparison:
    """Compares two predictions.jsonl (or the folders that contain them) on the questions they share.

    Raises:
        UserError: a missing file or one of another kind, no shared question, targets that differ, WUPS in only one.
    """
    one, other = read_judged_lines(first), read_judged_lines(second)
    by_wups = [any("value" in row for row in rows.values()) for rows in (one, other)]
    if by_wups[0] != by_wups[1]:
        there = first if by_wups[0] else second
        raise UserError(f"{there} has WUPS, the other one right or wrong: compare results of one protocol")
    shared = [id for id in one if id in other]
    if not shared:
        raise UserError(f"{first} and {second} share no question: compare predictions on the same split")
    for id in shared:
        if one[id]["target"] != other[id]["target"]:
            a, b = one[id]["target"], other[id]["target"]
            raise UserError(f"question {id!r} has target {a!r} in {first} and {b!r} in {second}: not the same data")
    pairs = [(one[id], other[id]) for id in shared]
    types = sorted({a["question_type"] for a, _ in pairs} - {""})
    rows = {
        kind: _compute_difference([pair for pair in pairs if pair[0]["question_type"] == kind], seed) for kind in types
    }
    rows["All"] = _compute_difference(pairs, seed)
    return Comparison(
        rows, len(one) - len(shared), len(other) - len(shared), (read_protocol(first), read_protocol(second))
    )


def _compute_difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], seed: int) -> Difference:
    right = np.array([[row.get("value", row["right"]) for row in pair] for pair in pairs], dtype=float)
    gained = right[:, 1] - right[:, 0]
    videos = [a["video"] for a, _ in pairs]
    interval = compute_mean_intervals(gained, videos, np.ones((len(pairs), 1), dtype=bool), seed)[0]
    lost, won = int((gained < 0).sum()), int((gained > 0).sum())
    first, second = right.mean(axis=0).tolist()
    return Difference(
        first,
        second,
        float(gained.mean()),
        interval.low,
        interval.high,
        len(pairs),
        lost,
        won,
        compute_sign_test(lost, won),
    )


def read_judged_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a predictions.jsonl by question id. Raises UserError for another format or a repeated id."""
    file = _find_file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file: give a result's folder or its predictions.jsonl")
    rows: dict[str, dict[str, Any]] = {}
    text = read_text(file)
    raise_if_not_utf8(text, str(file))
    # By line feeds alone: texts from the web contain other characters that `splitlines` takes for ends of lines.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        place = f"{file}, line {number}"
        row = parse_line(line, place)
        if not _is_judged(row):
            raise UserError(
                f"{place}: has no id, video, question_type, target and right (true, false or null): judge "
                "it first with `mirasol score DATASET ROOT PREDICTIONS --output DIR`"
            )
        if row["id"] in rows:
            raise UserError(f"{place}: question {row['id']!r} appears twice: keep one of the two")
        if row["right"] is not None:  # no published answer
            rows[row["id"]] = row
    return rows


def _find_file(path: Path) -> Path:
    path = Path(path)
    return path / PREDICTION_FILES[OPEN] if path.is_dir() else path


def _is_judged(row: Any) -> bool:
    """Whether a line has all fields that a comparison needs, with their types."""
    if not isinstance(row, dict) or not isinstance(row.get("right", ""), bool | None):
        return False
    value = row.get("value", 0)
    return all(isinstance(row.get(name), str) for name in ("id", "video", "question_type", "target")) and (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    )


def read_protocol(path: Path) -> str | None:
    """Protocol and normalisation of a predictions.jsonl (or the folder that contains it), from the results.json next to
    it; None where that does not state them."""
    file = _find_file(path)
    try:
        protocols = parse_json((file.parent / "results.json").read_bytes())["protocols"]
        [name] = [name for name in protocols if len(protocols) == 1 or PREDICTION_FILES.get(name) == file.name]
        form = protocols[name].get("normalisation")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return f"{name}, normalisation {form}" if form is not None else name
