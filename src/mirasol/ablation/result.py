"""What a suite found: numbers of every row over its finished seeds, against the reference, and against the paper."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirasol.ablation.run import read_done
from mirasol.ablation.runs import ANSWERS, DONE, IDENTITY, STREAM
from mirasol.ablation.statistics import Spread, Verdict, compute_spread, judge
from mirasol.ablation.streaming import average_points
from mirasol.errors import UserError
from mirasol.json_values import read_own_object
from mirasol.training.logging import read_metrics

_REDO = "remove this run's folder, and run the suite again"
SUITE, PLAN, RESULTS = "suite.json", "plan.json", "results.json"


@dataclass(frozen=True)
class StreamResult:
    """What a row's streams took, means over the seeds; points as in `streaming.stream_run`.

    early, late: two of the points, each over as many chunks as there were before it, but not the first: until then much
        happens for the first time
    by_place: right answers by the largest chunk at which they were given, a power of four; where every clip was a
        stream of its own, all of them at their longest
    same: share of the questions that were answered as about the whole clip; None with a window
    """

    streams: int
    window: int | None
    points: tuple[dict[str, Any], ...]
    early: dict[str, Any]
    late: dict[str, Any]
    end: dict[str, Any]
    by_place: dict[int, Spread]
    same: float | None


@dataclass(frozen=True)
class RowResult:
    """One row over its finished seeds.

    score, by_type: None without a finished seed; types: of those questions alone
    against: the row that it is compared with; difference: this row minus that one, seed by seed and question by
        question, over the seeds that both have
    verdict: None where the paper claims nothing, or there is nothing to compare
    parameters, flops: of a run, as the plan counted them; seconds, peak_memory: of training, means over the seeds
    stream: None where the suite streams nothing
    """

    name: str
    label: str
    paper: float | None
    expected: str | None
    seeds: tuple[int, ...]
    score: Spread | None
    by_type: dict[str, Spread]
    against: str | None
    difference: Spread | None
    verdict: Verdict | None
    parameters: int | None
    flops: int | None
    seconds: float | None
    peak_memory: float | None
    stream: StreamResult | None = None


@dataclass(frozen=True)
class SuiteResult:
    """What all finished runs of a suite amount to.

    suite: as in suite.json; baselines: what guessing scores on the same questions, by name
    questions, videos: how many; missing: names of the runs that are not finished
    curves: by row and seed, (step, share of right answers) of the validations during training
    facts: versions and commit of the runs, steps of each row, hours of training together
    """

    suite: dict[str, Any]
    rows: tuple[RowResult, ...]
    baselines: dict[str, float | None]
    questions: int
    videos: int
    missing: tuple[str, ...]
    curves: dict[str, dict[int, list[tuple[int, float]]]]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for results.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class _Answers:
    """Values of a row, [seed, question], and what the questions are."""

    seeds: tuple[int, ...]
    values: np.ndarray
    done: tuple[dict[str, Any], ...]
    streams: tuple[dict[str, Any], ...] = ()


def collect_result(output: Path) -> SuiteResult:
    """Reads what the finished runs of a suite left in its folder; nothing is trained, and no data is needed.

    Raises UserError where there is no suite, where no run is finished, and for runs that were asked other questions.
    """
    file = output / SUITE
    if not file.is_file():
        raise UserError(f"{output}: not the folder of a suite: it has no {SUITE}")
    suite = read_own_object(file, "run the suite again", ("title", "about", "rows", "seeds", "reference", "margin"))
    plan = _read_plan(output)
    asked: dict[str, Any] = {}
    answers = {name: _read_row(output, name, suite, asked) for name in suite["rows"]}
    if not asked:
        raise UserError(f"{output}: no run of a row is finished: run the suite first")
    names = [f"{name}/seed-{seed}" for seed in suite["seeds"] for name in suite["rows"]]
    missing = tuple(name for name in names if not (output / "runs" / name / DONE).is_file())
    rows = tuple(_make_row(name, suite, answers, asked, plan) for name in suite["rows"])
    curves = {name: _read_curves(output, name, own.seeds) for name, own in answers.items()}
    facts = {**_collect_facts(output, answers), **plan.get("facts", {})}
    count = len(set(asked["video"]))
    return SuiteResult(suite, rows, asked["baselines"], len(asked["id"]), count, missing, curves, facts)


def _read_plan(output: Path) -> dict[str, Any]:
    file = output / PLAN
    return read_own_object(file, "run the suite again", ("rows",)) if file.is_file() else {}


def _collect_facts(output: Path, answers: Mapping[str, _Answers]) -> dict[str, Any]:
    """Where the numbers come from, as the runs themselves wrote it down: versions, commit, steps of each row, and hours
    of training, those of copied rows once."""
    done = [one for own in answers.values() for one in own.done]
    names = [f"{name}/seed-{seed}" for name, own in answers.items() for seed in own.seeds]
    identities = [read_own_object(output / "runs" / name / IDENTITY, _REDO, ("versions",)) for name in names]
    commits = sorted({one["commit"] for one in done if one.get("commit")})
    return {
        "versions": dict(sorted({item for one in identities for item in one["versions"].items()})),
        "commit": ", ".join(commits) or None,
        "steps": {name: sorted({one["steps"] for one in own.done}) for name, own in answers.items() if own.done},
        "hours": round(sum(one["training_seconds"] for one in done if "same_run_as" not in one) / 3600, 2),
    }


def _read_row(output: Path, name: str, suite: Mapping[str, Any], asked: dict[str, Any]) -> _Answers:
    """The answers of a row's finished seeds; the first that is read fills `asked`, which all have to agree with."""
    seeds, values, done, streams = [], [], [], []
    for seed in suite["seeds"]:
        folder = output / "runs" / name / f"seed-{seed}"
        if not (folder / DONE).is_file():
            continue
        found = _read_answers(folder / ANSWERS)
        if not asked:
            asked |= {key: found[key] for key in ("id", "video", "type", "baselines")}
        if found["id"] != asked["id"]:
            raise UserError(
                f"{folder}: was asked other questions than the runs before it: remove its folder, run again"
            )
        seeds.append(seed)
        values.append(found["value"])
        done.append(read_done(folder))
        if (file := folder / STREAM).is_file():
            streams.append(read_own_object(file, "remove it and done.json, run again"))
    return _Answers(tuple(seeds), np.array(values, dtype=float), tuple(done), tuple(streams))


def _read_answers(file: Path) -> dict[str, Any]:
    """What was right, question by question. Raises UserError where the file is missing or damaged."""
    found = read_own_object(file, _REDO, ("id", "video", "type", "value", "baselines"))
    lists = [found[key] for key in ("id", "video", "type", "value")]
    if not all(isinstance(one, list) and len(one) == len(lists[0]) > 0 for one in lists):
        raise UserError(f"{file}: is damaged (lists of unequal lengths): {_REDO}")
    if not all(isinstance(value, int | float) for value in found["value"]):
        raise UserError(f"{file}: is damaged (a value that is no number): {_REDO}")
    return found


def _make_row(
    name: str, suite: Mapping[str, Any], answers: Mapping[str, _Answers], asked: Mapping[str, Any], plan: Mapping
) -> RowResult:
    row, own = suite["rows"][name], answers[name]
    against = row["against"] or suite["reference"]
    against = None if against == name else against
    difference = None if against is None else _compare(own, answers[against], asked["video"])
    verdict = None
    if difference is not None and row["expected"] is not None:
        verdict = judge(difference, row["expected"], suite["margin"])
    cost = plan.get("rows", {}).get(name, {})
    return RowResult(
        name=name,
        label=row["label"] or name,
        paper=row["paper"],
        expected=row["expected"],
        seeds=own.seeds,
        score=compute_spread(own.values, asked["video"]).cut_to_shares() if own.seeds else None,
        by_type=_split_by_type(own, asked) if own.seeds else {},
        against=against,
        difference=difference,
        verdict=verdict,
        parameters=cost.get("parameters"),
        flops=cost.get("flops"),
        seconds=_average(own.done, "training_seconds"),
        peak_memory=_average(own.done, "peak_memory"),
        stream=_summarise_streams(own.streams) if own.streams else None,
    )


def _summarise_streams(streams: Sequence[Mapping[str, Any]]) -> StreamResult:
    """The means of what the seeds' streams took."""
    points = [average_points(points) for points in zip(*(one["points"] for one in streams), strict=True)]
    end = average_points([one["end"] for one in streams])
    doubled = [point for point in points if math.log2(point["chunks"]).is_integer()] or [end]
    first = streams[0]
    values, videos = np.array([one["value"] for one in streams]), np.array(first["video"])
    limits = np.array(first["place"])
    if first["streams"] > 1:
        limits = np.full_like(limits, limits.max())
    else:
        limits = 4 ** np.ceil(np.log2(limits) / 2).astype(int)
    return StreamResult(
        streams=first["streams"],
        window=first["window"],
        points=tuple(points),
        early=doubled[min(1, len(doubled) - 1)],
        late=doubled[-1],
        end=end,
        by_place={
            int(limit): compute_spread(values[:, limits == limit], videos[limits == limit]).cut_to_shares()
            for limit in np.unique(limits)
        },
        same=None if first["same"] is None else sum(one["same"] for one in streams) / values.size,
    )


def _compare(own: _Answers, other: _Answers, videos: Sequence[str]) -> Spread | None:
    """The paired difference over the seeds that both have; None without one."""
    shared = [seed for seed in own.seeds if seed in other.seeds]
    if not shared:
        return None
    pairs = [own.values[own.seeds.index(seed)] - other.values[other.seeds.index(seed)] for seed in shared]
    return compute_spread(np.array(pairs), videos)


def _split_by_type(own: _Answers, asked: Mapping[str, Any]) -> dict[str, Spread]:
    types, videos = np.array(asked["type"]), np.array(asked["video"])
    kinds = list(dict.fromkeys(asked["type"]))
    spreads = {kind: compute_spread(own.values[:, types == kind], videos[types == kind]) for kind in kinds}
    return {kind: spread.cut_to_shares() for kind, spread in spreads.items()}


def _average(done: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [one[key] for one in done if key in one]
    return sum(values) / len(values) if values else None


def _read_curves(output: Path, name: str, seeds: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
    """Validation accuracy over steps, by seed."""
    curves = {}
    for seed in seeds:
        log = read_metrics(output / "runs" / name / f"seed-{seed}" / "train" / "metrics.jsonl")
        points = [(row["step"], _find_accuracy(row)) for row in log if row["kind"] == "validation"]
        curves[seed] = [(step, accuracy) for step, accuracy in points if accuracy is not None]
    return curves


def _find_accuracy(row: Mapping[str, Any]) -> float | None:
    """The accuracy of a validation line, over all its parts."""
    found = [part["accuracy"] for part in row.values() if isinstance(part, Mapping) and "accuracy" in part]
    return sum(found) / len(found) if found else None
