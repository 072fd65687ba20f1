"""The numbers of a set of predictions: the table of the data set, each number with its interval, beside baselines."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool

from mirasol.data.datasets import Problem
from mirasol.data.datasets.activitynet_qa import FREE
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.evaluation import ranking
from mirasol.evaluation.baselines import Prior
from mirasol.evaluation.intervals import Interval, class_mean_interval, mean_intervals
from mirasol.evaluation.normalisation import NORMALISATIONS, unchanged
from mirasol.evaluation.predictions import Prediction
from mirasol.evaluation.tables import Row, headline, table_rows, wups_rows
from mirasol.evaluation.wups import Wups

OPEN = "open generation"
CANDIDATES = "candidate scoring"
WUPS = "WUPS"
# Where an evaluation writes what was predicted under each; `mirasol score`, which has one, writes the first.
FILES = {OPEN: "predictions.jsonl", WUPS: "predictions.wups.jsonl", CANDIDATES: "predictions.candidates.jsonl"}
WUPS_THRESHOLD = 0.9  # of the second of the two numbers that papers print


@dataclass(frozen=True)
class Estimate:
    """One number of a table: between 0 and 1 for shares, over `n` questions; `low` and `high` bound its 95 % interval.

    `value` is None where nothing defines it; low and high also where no interval is computed (baselines, and numbers of
    an official script).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Judged:
    """One question with what was predicted. `predicted` is the text, for a choice the candidate's; None without one.

    value: what it counts, 1 where it is right and 0 where it is wrong; WUPS may lie between
    """

    example: Example
    predicted: str | None
    value: float

    @property
    def right(self) -> bool:
        return self.value == 1.0

    def to_dict(self) -> dict[str, Any]:
        """One line of predictions.jsonl, less what the protocol adds."""
        example = self.example
        return {
            "id": example.id,
            "video": example.video_name,
            "question_type": example.question_type,
            "prompt": example.prompt,
            "target": example.target,
            "answer": self.predicted,
            "right": self.right,
        }


@dataclass(frozen=True)
class Scored:
    """Numbers of one protocol on one split."""

    protocol: str
    normalisation: str | None
    metrics: dict[str, Estimate]
    baselines: dict[str, Estimate]
    headline: str
    judged: tuple[Judged, ...]
    problems: tuple[Problem, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: everything but the single questions."""
        return {
            "protocol": self.protocol,
            "normalisation": self.normalisation,
            "headline": self.headline,
            "metrics": {name: asdict(estimate) for name, estimate in self.metrics.items()},
            "baselines": {name: asdict(estimate) for name, estimate in self.baselines.items()},
            **self.facts,
        }


def score_answers(
    dataset: str,
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    normalisation: str,
    seed: int = 0,
    known: Sequence[Example] = (),
) -> Scored:
    """Exact match of answer texts with the target, or one of the references, after the normalisation of that name.

    A question without a prediction is wrong. Questions of which the data set publishes no answer are left out. `known`:
    examples of the training split, for the baselines of blind guessing.
    """
    form = NORMALISATIONS[normalisation]
    examples = with_answers(examples)
    judged = []
    for example in examples:
        answer = None if (prediction := predictions.get(example.id)) is None else prediction.answer
        right = answer is not None and form(answer) in {form(text) for text in right_texts(example)}
        judged.append(Judged(example, answer, float(right)))
    metrics = table(_rows(dataset, judged), judged, seed)
    if dataset == "activitynet_qa":
        metrics["free_official_script"] = Estimate(_official_free(judged), None, None, len(judged))
    baselines = {"chance": _estimate([_chance(example) for example in examples])}
    rights = [{form(text) for text in right_texts(example)} for example in examples]
    baselines["majority"] = _majority(rights)
    if prior := Prior(known, form):
        pairs = list(zip(examples, rights, strict=True))
        baselines["train majority"] = _estimate([prior.constant in right for _, right in pairs])
        baselines["train blind"] = _estimate([prior.guess(example.prompt) in right for example, right in pairs])
    return Scored(OPEN, normalisation, metrics, baselines, headline(dataset), tuple(judged))


def score_wups(
    dataset: str, examples: Sequence[Example], predictions: Mapping[str, Prediction], wups: Wups, seed: int = 0
) -> Scored:
    """WUPS of answer texts, without a threshold (the headline) and with 0.9. A question without a prediction scores 0.

    Questions of which the data set publishes no answer are left out.
    """
    examples = with_answers(examples)
    said = [None if (found := predictions.get(example.id)) is None else found.answer for example in examples]

    def judge(answers: Sequence[str | None], threshold: float) -> list[Judged]:
        return [
            Judged(e, text, 0.0 if text is None else wups.score(text, right_texts(e), e.question_type, threshold))
            for e, text in zip(examples, answers, strict=True)
        ]

    judged = judge(said, 0.0)
    rows = wups_rows(dataset, [example.type_name for example in examples])
    metrics = table(rows, judged, seed)
    strict = table(rows, judge(said, WUPS_THRESHOLD), seed)
    metrics |= {f"{name}@{WUPS_THRESHOLD}": estimate for name, estimate in strict.items()}
    common = Counter(example.target for example in examples).most_common(1)
    constant = judge([common[0][0]] * len(examples), 0.0) if common else []
    baselines = {"most frequent answer": _estimate([item.value for item in constant])}
    return Scored(WUPS, None, metrics, baselines, rows[-1].name, tuple(judged), facts={"computed_with": wups.facts})


def score_choices(
    dataset: str,
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    classes: Sequence[str] = (),
    seed: int = 0,
    known: Sequence[Example] = (),
) -> Scored:
    """Accuracy of the chosen candidates; with scores of all `classes` also the metrics of a ranking.

    `known`: examples of the training split, for the baseline of blind guessing.

    Raises:
        UserError: a choice or a number of scores that does not fit the candidates.
    """
    examples = with_answers(examples)
    places = [right_places(example, classes) for example in examples]
    judged = [
        _judge_choice(e, predictions.get(e.id), classes, right) for e, right in zip(examples, places, strict=True)
    ]
    single = all(len(right) == 1 for right in places)
    metrics, name = {}, headline(dataset)
    ranked = classes and all(p.scores is not None for e in examples if (p := predictions.get(e.id)) is not None)
    if ranked and examples:
        labels = np.zeros((len(examples), len(classes)), dtype=bool)
        for row, right in zip(labels, places, strict=True):
            row[list(right)] = True
        metrics |= class_metrics(examples, predictions, labels, single, seed)
        name = next(iter(metrics))
    if not ranked or (single and any(example.question_type for example in examples)):
        metrics |= table(_rows(dataset, judged), judged, seed)
    baselines = {"chance": _estimate([_chance(example) for example in examples]), "majority": _majority(places)}
    if prior := Prior(known, unchanged):
        chosen = [prior.choose(example.prompt, example.candidates or classes) for example in examples]
        baselines["train blind"] = _estimate([one in right for one, right in zip(chosen, places, strict=True)])
    facts = {"classes": len(classes)} if classes else {}
    return Scored(CANDIDATES, None, metrics, baselines if single else {}, name, tuple(judged), facts=facts)


def with_answers(examples: Sequence[Example]) -> list[Example]:
    """The examples of which the data set publishes an answer."""
    return [example for example in examples if example.target]


def right_texts(example: Example) -> tuple[str, ...]:
    """All texts that are right. Those of a clip with several labels are right only together, as the target has them."""
    return example.references if example.target in example.references else (example.target,)


def right_places(example: Example, classes: Sequence[str]) -> tuple[int, ...]:
    """The places of the right ones among the candidates (or else the classes)."""
    if example.answer_index is not None:
        return (example.answer_index,)
    where = _where(tuple(example.candidates or classes))
    return tuple(sorted(place for text in set(example.references) or {example.target} for place in where.get(text, ())))


@lru_cache(maxsize=4)
def _where(candidates: tuple[str, ...]) -> dict[str, list[int]]:
    """The places of each candidate's text."""
    found: dict[str, list[int]] = {}
    for place, text in enumerate(candidates):
        found.setdefault(text, []).append(place)
    return found


def _judge_choice(
    example: Example, prediction: Prediction | None, classes: Sequence[str], right: Sequence[int]
) -> Judged:
    if prediction is None:
        return Judged(example, None, 0.0)
    candidates = example.candidates or classes
    choice = prediction.choice
    if prediction.scores is not None:
        if len(prediction.scores) != len(candidates):
            count = len(prediction.scores)
            raise UserError(f"question {example.id!r}: {count} scores for {len(candidates)} candidates: give one each")
        choice = int(np.argmax(prediction.scores))
    if choice is None or not 0 <= choice < len(candidates):
        raise UserError(f"question {example.id!r}: prediction {choice} is out of range: 0 to {len(candidates) - 1}")
    return Judged(example, candidates[choice], float(choice in right))


def _rows(dataset: str, judged: Sequence[Judged]) -> tuple[Row, ...]:
    return table_rows(dataset, [item.example.type_name for item in judged])


def table(rows: Sequence[Row], judged: Sequence[Judged], seed: int = 0) -> dict[str, Estimate]:
    """The numbers of a table: means over the questions of each row."""
    values = np.array([item.value for item in judged])
    groups = np.array([[row.holds(item.example.question_type) for row in rows] for item in judged], dtype=bool)
    groups = groups.reshape(len(judged), len(rows))
    intervals = mean_intervals(values, [item.example.video_name for item in judged], groups, seed)
    return {row.name: _row(row, values, groups[:, place], interval)
            for place, (row, interval) in enumerate(zip(rows, intervals, strict=True))}  # fmt: skip


def _row(row: Row, values: np.ndarray, chosen: np.ndarray, interval: Interval) -> Estimate:
    count = int(chosen.sum())
    return Estimate(float(values[chosen].mean()) if count else None, interval.low, interval.high, count)


def class_metrics(
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    labels: Bool[np.ndarray, "example category"],
    single: bool,
    seed: int = 0,
) -> dict[str, Estimate]:
    """What papers on these data sets print; `single`: every example has exactly one class."""
    nothing = (-math.inf,) * labels.shape[1]
    found = [predictions.get(example.id) for example in examples]
    scores = np.array([nothing if p is None or p.scores is None else p.scores for p in found])
    videos, n = [example.video_name for example in examples], len(examples)
    metrics = {}
    if single:
        best, among = ranking.in_top(scores, labels, 1), ranking.in_top(scores, labels, 5)
        for name, right in (("top-1", best), ("top-5", among)):
            interval = mean_intervals(right, videos, np.ones((n, 1), dtype=bool), seed)[0]
            metrics[name] = Estimate(float(right.mean()), interval.low, interval.high, n)
        present = labels[:, labels.any(axis=0)]
        by_class = [best[column].mean() for column in present.T]
        interval = class_mean_interval(best, videos, present, seed)
        metrics["mean class accuracy"] = Estimate(float(np.mean(by_class)), interval.low, interval.high, n)
    area = ranking.mean_over_classes(ranking.area_under_curve, scores, labels)
    precision = ranking.mean_over_classes(ranking.average_precision, scores, labels)
    of_precision, of_area = ranking.mean_intervals(scores, labels, videos, seed)
    # d-prime rises with the area, so its percentiles are those of the area.
    bounds = (ranking.d_prime(math.nan if bound is None else bound) for bound in (of_area.low, of_area.high))
    for name, value, low, high in (
        ("mAP", precision, of_precision.low, of_precision.high),
        ("AUC", area, of_area.low, of_area.high),
        ("d-prime", ranking.d_prime(area), *bounds),
    ):
        metrics[name] = Estimate(_finite(value), _finite(low), _finite(high), n)
    return metrics


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _official_free(judged: Sequence[Judged]) -> float | None:
    """The "Free" that ActivityNet-QA's script prints: it divides the right answers by the numbers of the types that
    come fourth and later in the order of their first appearance, which are not the types of Free."""
    counts = Counter(item.example.question_type for item in judged)  # keeps the order of first appearance
    divisor = sum(list(counts.values())[3:])
    right = sum(item.value for item in judged if item.example.question_type in FREE)
    return right / divisor if divisor else None


def _chance(example: Example) -> float:
    return 1 / len(example.candidates) if example.candidates else 0.0


def _estimate(values: Sequence[float | bool]) -> Estimate:
    return Estimate(sum(values) / len(values) if values else None, None, None, len(values))


def _majority(right: Sequence[Iterable[Any]]) -> Estimate:
    """What the best constant answer scores on this very split."""
    counts = Counter(answer for answers in right for answer in set(answers))
    best = max(counts.values(), default=0)
    return Estimate(best / len(right) if right else None, None, None, len(right))


def as_text(scored: Scored) -> str:
    """The numbers as a table: percent (d-prime aside), with the 95 % interval."""
    rows = {**scored.metrics, **scored.baselines}
    first = max(map(len, rows))
    lines = [f"{scored.protocol}, headline: {scored.headline}"]
    for name, estimate in rows.items():
        lines.append(f"{name.ljust(first)}  {_number(name, estimate.value)}  {_span(name, estimate)}  n={estimate.n}")
    return "\n".join(lines)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "     -"
    return f"{value:6.3f}" if name == "d-prime" else f"{100 * value:6.2f}"


def _span(name: str, estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return " " * 16
    return f"[{_number(name, estimate.low)}, {_number(name, estimate.high)}]"
