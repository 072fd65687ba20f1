"""Exact match after normalisation, and the blind guesses it has to be held against."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mirasol.data.example import Example
from mirasol.evaluation.normalisation import normalise


def is_right(answer: str, target: str) -> bool:
    """Whether an answer matches the target exactly, both normalised."""
    return normalise(answer) == normalise(target)


@dataclass(frozen=True)
class Answered:
    """A question and what was answered."""

    example: Example
    answer: str

    @property
    def right(self) -> bool:
        return is_right(self.answer, self.example.target)


@dataclass(frozen=True)
class UnusableClip:
    """A clip whose questions could not be asked; `start` and `end` in seconds, None for the clip's own."""

    media: str
    start: float | None
    end: float | None
    reason: str
    questions: int


@dataclass(frozen=True)
class Score:
    """Share of right answers over all `n` questions and over those of each type.

    Questions about clips that could not be read are in neither: they are listed in `unusable`.
    """

    accuracy: float
    by_type: dict[str, float]
    n: int
    answers: tuple[Answered, ...] = ()
    unusable: tuple[UnusableClip, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """`{"accuracy", "by_type", "n"}`, as it stands in metrics.json."""
        return {"accuracy": self.accuracy, "by_type": self.by_type, "n": self.n}


def score(answers: Iterable[Answered], unusable: Iterable[UnusableClip] = ()) -> Score:
    """The score of answers."""
    answers = tuple(answers)
    mean = _mean_by_type((answered.example, float(answered.right)) for answered in answers)
    return Score(mean.accuracy, mean.by_type, mean.n, answers, tuple(unusable))


def chance(examples: Iterable[Example]) -> Score:
    """What guessing among the candidates scores on average: 1 / len(candidates) of each question, 0 for open ones."""
    return _mean_by_type((example, 1 / len(example.candidates) if example.candidates else 0.0) for example in examples)


def blind(known: Iterable[Example], asked: Sequence[Example]) -> Score:
    """What answering with the most frequent answer that `known` gives to the very same prompt scores on `asked`.

    The best guess of somebody who has read all training questions and looks at no clip. Ties go to the answer that
    comes first in the alphabet; a prompt that `known` does not hold is answered with nothing.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for example in known:
        counts[example.prompt][normalise(example.target)] += 1
    guesses = {
        prompt: min(counter, key=lambda answer: (-counter[answer], answer)) for prompt, counter in counts.items()
    }
    return score(Answered(example, guesses.get(example.prompt, "")) for example in asked)


def _mean_by_type(values: Iterable[tuple[Example, float]]) -> Score:
    groups: dict[str, list[float]] = defaultdict(list)
    for example, value in values:
        groups[example.type_name].append(value)
    everything = [value for group in groups.values() for value in group]
    by_type = {name: sum(group) / len(group) for name, group in groups.items()}
    return Score(sum(everything) / max(len(everything), 1), by_type, len(everything))
