"""Scores of answers: right or wrong after a normalisation, the table of the data set with an interval for each number,
and the baselines that every score is compared with."""

import math
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Bool

from mirasol.console import format_table
from mirasol.data.datasets.activitynet_qa import FREE
from mirasol.data.datasets.contract import Problem
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.evaluation import ranking
from mirasol.evaluation.baselines import AnswerPrior, compute_chance, find_most_frequent_right
from mirasol.evaluation.intervals import Interval, compute_class_mean_interval, compute_mean_intervals
from mirasol.evaluation.predictions import EMPTY_ANSWER, NO_ANSWER, Prediction
from mirasol.evaluation.tables import TableRow, find_headline, find_table_rows, find_wups_rows
from mirasol.evaluation.wups import Wups

OPEN = "open generation"
CANDIDATES = "candidate scoring"
WUPS = "WUPS"
# The predictions file of each protocol; `mirasol score`, which has only one protocol, always writes the first.
PREDICTION_FILES = {
    OPEN: "predictions.jsonl",
    WUPS: "predictions.wups.jsonl",
    CANDIDATES: "predictions.candidates.jsonl",
}
# Baselines with a column in text tables and a line in charts.
MAIN_BASELINES = ("chance", "train blind", "most frequent answer")
WUPS_THRESHOLD = 0.9  # of the second of the two numbers that papers print
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(answer: str) -> str:
    """Lower case, punctuation and the articles a, an, the removed, whitespace folded: "The Bell." becomes "bell".

    Nothing is removed if the text would become empty: "A" becomes "a" and "?" stays "?", so an empty answer matches
    neither."""
    lower = " ".join(answer.lower().split())
    words = "".join(" " if _is_punctuation(character) else character for character in lower)
    bare = _ARTICLES.sub(" ", words)
    return " ".join(bare.split() or words.split() or lower.split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def normalise_lightly(answer: str) -> str:
    """Unicode NFC, lower case, whitespace folded, one final full stop, question or exclamation mark removed.

    The public data sets' scripts compare raw strings of lower-case data. This form forgives a generated answer its case
    and closing mark and nothing else: articles stay, as in those scripts."""
    folded = " ".join(unicodedata.normalize("NFC", answer).lower().split())
    return folded[:-1].rstrip() if len(folded) > 1 and folded[-1] in ".?!" else folded


def keep_unchanged(answer: str) -> str:
    """The answer itself, for the raw comparison of the official scripts."""
    return answer


# By the name that results state; "light" is how public data sets are scored, "folded" your own folder.
NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "light": normalise_lightly,
    "folded": normalise,
    "none": keep_unchanged,
}


@dataclass(frozen=True)
class TypeScore:
    """The mean of a value (accuracy, chance) over all `n` questions and over those of each question type."""

    accuracy: float
    by_type: dict[str, float]
    n: int

    def to_dict(self) -> dict[str, Any]:
        """`{"accuracy", "by_type", "n"}`, as in the demo's metrics.json."""
        return asdict(self)


def average_by_type(values: Iterable[tuple[str, float]]) -> TypeScore:
    """The mean of pairs (question type, value), overall and by type in the order of first appearance.

    Right answers count 1 and wrong ones 0. Evaluation, the demo and validation during training share this function.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in values:
        groups[name].append(float(value))
    everything = [value for group in groups.values() for value in group]
    by_type = {name: sum(group) / len(group) for name, group in groups.items()}
    return TypeScore(sum(everything) / max(len(everything), 1), by_type, len(everything))


def score_chance(examples: Iterable[Example]) -> TypeScore:
    """What guessing among the candidates scores on average, see `compute_chance`."""
    return average_by_type((example.type_name, compute_chance(example)) for example in examples)


@dataclass(frozen=True)
class Estimate:
    """One number of a table, over `n` questions; shares lie between 0 and 1.

    value: None where it is undefined
    low, high: bounds of the 95 % interval; None also for numbers without one (baselines, official scripts)
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class JudgedAnswer:
    """One question with its answer and verdict.

    predicted: text of the answer, or of the chosen candidate; None without a prediction
    value: 1 where it is right and 0 where it is wrong; WUPS may be in between
    """

    example: Example
    predicted: str | None
    value: float

    @property
    def shown_answer(self) -> str:
        """The answer as reports show it: one that is empty or missing becomes a remark in brackets."""
        return NO_ANSWER if self.predicted is None else self.predicted or EMPTY_ANSWER

    @property
    def right(self) -> bool:
        return self.value == 1.0

    def to_dict(self) -> dict[str, Any]:
        """One line of predictions.jsonl, without what the protocol adds."""
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
class ProtocolScores:
    """The numbers of one protocol on one split.

    metrics: by row of the data set's table; headline: name of the row that represents the data set
    baselines: over all questions; baseline_rows: by baseline, then by row of the table, for tables and figures
    facts: what else results.json states
    """

    protocol: str
    normalisation: str | None
    metrics: dict[str, Estimate]
    baselines: dict[str, Estimate]
    headline: str
    judged: tuple[JudgedAnswer, ...]
    problems: tuple[Problem, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    baseline_rows: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def by_type(self) -> TypeScore:
        """The mean value over all questions and by question type."""
        return average_by_type((item.example.type_name, item.value) for item in self.judged)

    @property
    def headline_estimate(self) -> Estimate:
        """The number that represents the data set."""
        return self.metrics[self.headline]

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
) -> ProtocolScores:
    """Exact match of answer texts with the target, or one of the references, after the normalisation of that name.

    A question without a prediction is wrong. Questions without a published answer are left out. `known`: examples of
    the training split, for the baselines of blind guessing.
    """
    form = NORMALISATIONS[normalisation]
    examples = select_answered(examples)
    rights = [{form(text) for text in list_right_texts(example)} for example in examples]
    judged = []
    for example, right in zip(examples, rights, strict=True):
        answer = None if (prediction := predictions.get(example.id)) is None else prediction.answer
        judged.append(JudgedAnswer(example, answer, float(answer is not None and form(answer) in right)))
    rows = _find_rows(dataset, examples)
    metrics = compute_table(rows, judged, seed)
    if dataset == "activitynet_qa":
        metrics["free_official_script"] = Estimate(_compute_official_free(judged), None, None, len(judged))
    baselines = Baselines(examples, rights)
    if prior := AnswerPrior(known, form):
        baselines.add("train majority", [prior.constant in right for right in rights])
        guesses = [prior.guess(example.prompt) for example in examples]
        baselines.add("train blind", [guess in right for guess, right in zip(guesses, rights, strict=True)])
    return ProtocolScores(
        OPEN,
        normalisation,
        metrics,
        baselines.compute_estimates(),
        find_headline(dataset),
        tuple(judged),
        baseline_rows=baselines.compute_by_row(rows),
    )


def score_wups(
    dataset: str, examples: Sequence[Example], predictions: Mapping[str, Prediction], wups: Wups, seed: int = 0
) -> ProtocolScores:
    """WUPS of answer texts, without a threshold (the headline) and with 0.9. A question without a prediction scores 0.

    Questions without a published answer are left out.
    """
    examples = select_answered(examples)
    answers = [None if (found := predictions.get(example.id)) is None else found.answer for example in examples]

    def judge(answers: Sequence[str | None], threshold: float) -> list[JudgedAnswer]:
        return [
            JudgedAnswer(
                e, text, 0.0 if text is None else wups.score(text, list_right_texts(e), e.question_type, threshold)
            )
            for e, text in zip(examples, answers, strict=True)
        ]

    judged = judge(answers, 0.0)
    rows = find_wups_rows(dataset, [example.type_name for example in examples])
    metrics = compute_table(rows, judged, seed)
    strict = compute_table(rows, judge(answers, WUPS_THRESHOLD), seed)
    metrics |= {f"{name}@{WUPS_THRESHOLD}": estimate for name, estimate in strict.items()}
    common = Counter(example.target for example in examples).most_common(1)
    constant = judge([common[0][0]] * len(examples), 0.0) if common else []
    baselines = Baselines(examples)
    baselines.add("most frequent answer", [item.value for item in constant])
    return ProtocolScores(
        WUPS,
        None,
        metrics,
        baselines.compute_estimates(),
        rows[-1].name,
        tuple(judged),
        facts={"computed_with": wups.facts},
        baseline_rows=baselines.compute_by_row(rows),
    )


def score_choices(
    dataset: str,
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    classes: Sequence[str] = (),
    seed: int = 0,
    known: Sequence[Example] = (),
) -> ProtocolScores:
    """Accuracy of the chosen candidates; with scores of all `classes` also the metrics of a ranking.

    `known`: examples of the training split, for the baseline of blind guessing.

    Raises:
        UserError: a choice or a number of scores that does not fit the candidates.
    """
    examples = select_answered(examples)
    places = [find_right_places(example, classes) for example in examples]
    judged = [
        _judge_choice(e, predictions.get(e.id), classes, right) for e, right in zip(examples, places, strict=True)
    ]
    single = all(len(right) == 1 for right in places)
    metrics, name, rows = {}, find_headline(dataset), _find_rows(dataset, examples)
    ranked = classes and all(p.scores is not None for e in examples if (p := predictions.get(e.id)) is not None)
    if ranked and examples:
        labels = np.zeros((len(examples), len(classes)), dtype=bool)
        for row, right in zip(labels, places, strict=True):
            row[list(right)] = True
        metrics |= compute_class_metrics(examples, predictions, labels, single, seed)
        name = next(iter(metrics))
        rows = (TableRow(name), *rows)
    if not ranked or (single and any(example.question_type for example in examples)):
        metrics |= compute_table(_find_rows(dataset, examples), judged, seed)
    baselines = Baselines(examples if single else (), places if single else ())
    if single and (prior := AnswerPrior(known, keep_unchanged)):
        chosen = [prior.choose(example.prompt, example.candidates or classes) for example in examples]
        baselines.add("train blind", [one in right for one, right in zip(chosen, places, strict=True)])
    facts = {"classes": len(classes)} if classes else {}
    return ProtocolScores(
        CANDIDATES,
        None,
        metrics,
        baselines.compute_estimates() if single else {},
        name,
        tuple(judged),
        facts=facts,
        baseline_rows=baselines.compute_by_row(rows) if single else {},
    )


T = TypeVar("T")


class Baselines(Generic[T]):
    """What each baseline scores on every question: chance and the best constant answer (`rights`: what is right for
    each question), and those that are added."""

    def __init__(self, examples: Sequence[Example], rights: Sequence[Iterable[T]] | None = None):
        self.examples = examples
        self.values: dict[str, Sequence[float | bool]] = {}
        if rights is not None:
            self.add("chance", [compute_chance(example) for example in examples])
            constant = find_most_frequent_right(rights)
            self.add("majority", [constant in set(right) for right in rights])

    def add(self, name: str, values: Sequence[float | bool]) -> None:
        """Adds a baseline by its value on every question."""
        self.values[name] = values

    def compute_estimates(self) -> dict[str, Estimate]:
        """The mean of each baseline over all questions."""
        return {name: Estimate(_compute_mean(values), None, None, len(values)) for name, values in self.values.items()}

    def compute_by_row(self, rows: Sequence[TableRow]) -> dict[str, dict[str, float | None]]:
        """The mean of each baseline over the questions of each row of a table."""
        found: dict[str, dict[str, float | None]] = {}
        for name, values in self.values.items():
            groups: dict[str, list[float | bool]] = defaultdict(list)
            for example, value in zip(self.examples, values, strict=True):
                groups[example.question_type].append(value)
            found[name] = {
                row.name: _compute_mean([value for kind, own in groups.items() if row.includes(kind) for value in own])
                for row in rows
            }
        return found


def _compute_mean(values: Sequence[float | bool]) -> float | None:
    return sum(values) / len(values) if values else None


def select_answered(examples: Sequence[Example]) -> list[Example]:
    """The examples for which the data set publishes an answer."""
    return [example for example in examples if example.target]


def list_right_texts(example: Example) -> tuple[str, ...]:
    """All texts that are right. Those of a clip with several labels are right only together, as in the target."""
    return example.references if example.target in example.references else (example.target,)


def find_right_places(example: Example, classes: Sequence[str]) -> tuple[int, ...]:
    """Indices of the right answers among the candidates, or else the classes."""
    if example.answer_index is not None:
        return (example.answer_index,)
    where = _index_candidates(tuple(example.candidates or classes))
    return tuple(sorted(place for text in set(example.references) or {example.target} for place in where.get(text, ())))


@lru_cache(maxsize=4)
def _index_candidates(candidates: tuple[str, ...]) -> dict[str, list[int]]:
    """Indices of each candidate's text."""
    found: dict[str, list[int]] = {}
    for place, text in enumerate(candidates):
        found.setdefault(text, []).append(place)
    return found


def _judge_choice(
    example: Example, prediction: Prediction | None, classes: Sequence[str], right: Sequence[int]
) -> JudgedAnswer:
    if prediction is None:
        return JudgedAnswer(example, None, 0.0)
    candidates = example.candidates or classes
    choice = prediction.choice
    if prediction.scores is not None:
        if len(prediction.scores) != len(candidates):
            count = len(prediction.scores)
            raise UserError(f"question {example.id!r}: {count} scores for {len(candidates)} candidates: give one each")
        choice = int(np.argmax(prediction.scores))
    if choice is None or not 0 <= choice < len(candidates):
        raise UserError(f"question {example.id!r}: prediction {choice} is out of range: 0 to {len(candidates) - 1}")
    return JudgedAnswer(example, candidates[choice], float(choice in right))


def _find_rows(dataset: str, examples: Sequence[Example]) -> tuple[TableRow, ...]:
    return find_table_rows(dataset, [example.type_name for example in examples])


def compute_table(rows: Sequence[TableRow], judged: Sequence[JudgedAnswer], seed: int = 0) -> dict[str, Estimate]:
    """The numbers of a table: means over the questions of each row."""
    values = np.array([item.value for item in judged])
    groups = np.array([[row.includes(item.example.question_type) for row in rows] for item in judged], dtype=bool)
    groups = groups.reshape(len(judged), len(rows))
    intervals = compute_mean_intervals(values, [item.example.video_name for item in judged], groups, seed)
    return {
        row.name: _estimate_row(values, groups[:, place], interval)
        for place, (row, interval) in enumerate(zip(rows, intervals, strict=True))
    }


def _estimate_row(values: np.ndarray, chosen: np.ndarray, interval: Interval) -> Estimate:
    count = int(chosen.sum())
    return Estimate(float(values[chosen].mean()) if count else None, interval.low, interval.high, count)


def compute_class_metrics(
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    labels: Bool[np.ndarray, "example category"],
    single: bool,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The metrics that papers on these data sets print; `single`: every example has exactly one class."""
    nothing = (-math.inf,) * labels.shape[1]
    found = [predictions.get(example.id) for example in examples]
    scores = np.array([nothing if p is None or p.scores is None else p.scores for p in found])
    videos, n = [example.video_name for example in examples], len(examples)
    metrics = {}
    if single:
        best, among = ranking.is_right_in_top(scores, labels, 1), ranking.is_right_in_top(scores, labels, 5)
        for name, right in (("top-1", best), ("top-5", among)):
            interval = compute_mean_intervals(right, videos, np.ones((n, 1), dtype=bool), seed)[0]
            metrics[name] = Estimate(float(right.mean()), interval.low, interval.high, n)
        present = labels[:, labels.any(axis=0)]
        by_class = [best[column].mean() for column in present.T]
        interval = compute_class_mean_interval(best, videos, present, seed)
        metrics["mean class accuracy"] = Estimate(float(np.mean(by_class)), interval.low, interval.high, n)
    area = ranking.average_over_classes(ranking.area_under_curve, scores, labels)
    precision = ranking.average_over_classes(ranking.average_precision, scores, labels)
    of_precision, of_area = ranking.compute_ranking_intervals(scores, labels, videos, seed)
    # d-prime rises with the area, so its percentiles are those of the area.
    bounds = (ranking.d_prime(math.nan if bound is None else bound) for bound in (of_area.low, of_area.high))
    for name, value, low, high in (
        ("mAP", precision, of_precision.low, of_precision.high),
        ("AUC", area, of_area.low, of_area.high),
        ("d-prime", ranking.d_prime(area), *bounds),
    ):
        metrics[name] = Estimate(_replace_infinite(value), _replace_infinite(low), _replace_infinite(high), n)
    return metrics


def _replace_infinite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _compute_official_free(judged: Sequence[JudgedAnswer]) -> float | None:
    """The "Free" that ActivityNet-QA's script prints: it divides the right answers by the numbers of the types that
    come fourth and later in the order of their first appearance, which are not the types of Free."""
    counts = Counter(item.example.question_type for item in judged)  # keeps the order of first appearance
    divisor = sum(list(counts.values())[3:])
    right = sum(item.value for item in judged if item.example.question_type in FREE)
    return right / divisor if divisor else None


def collect_columns(
    scores: ProtocolScores, controls: Mapping[str, ProtocolScores], others: Mapping[str, ProtocolScores] | None = None
) -> dict[str, dict[str, float | None]]:
    """The columns next to the score, by heading and row: baselines, controls, other checkpoints."""
    columns = {name: {row: values.get(row) for row in scores.metrics} for name, values in scores.baseline_rows.items()}
    scored = {**{name.replace("_", " "): control for name, control in controls.items()}, **(others or {})}
    for name, other in scored.items():
        columns[name] = {
            row: estimate.value if (estimate := other.metrics.get(row)) is not None else None for row in scores.metrics
        }
    return columns


def format_scores(scores: ProtocolScores, controls: Mapping[str, ProtocolScores] | None = None) -> str:
    """The numbers as a text table: percent (except d-prime) with 95 % intervals, then main baselines and controls.

    The other baselines follow in a line. Headings of several words take two lines, which keeps the table narrow.
    """
    columns = collect_columns(scores, controls or {})
    others = {name: estimate for name, estimate in scores.baselines.items() if name not in MAIN_BASELINES}
    columns = {name: values for name, values in columns.items() if name not in others}
    headings = ["", "score", "95 % interval", "n", *columns]
    cells = [[" ".join(heading.split()[:-1]) for heading in headings], [heading.split(" ")[-1] for heading in headings]]
    for name, estimate in scores.metrics.items():
        numbers = [format_number(name, values[name]) for values in columns.values()]
        interval = _format_interval(name, estimate)
        cells.append([name, format_number(name, estimate.value), interval, str(estimate.n), *numbers])
    lines = [f"{scores.protocol}, headline: {scores.headline}", format_table(cells)]
    if others:
        listed = ", ".join(f"{name} {format_number(name, estimate.value)}" for name, estimate in others.items())
        lines.append(f"baselines over all questions: {listed}")
    return "\n".join(lines)


def format_number(name: str, value: float | None) -> str:
    """A number of a table as text: percent with two digits, d-prime with three, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if name == "d-prime" else f"{100 * value:.2f}"


def _format_interval(name: str, estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{format_number(name, estimate.low)}, {format_number(name, estimate.high)}]"
