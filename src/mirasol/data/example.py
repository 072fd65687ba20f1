"""What every data set becomes: examples, each a clip (or a window of it), a prompt and a target."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One prompt about one clip and the target text the model should give.

    `media` is a path relative to the data set's root. `start` and `end` are seconds on the media's own timeline; None
    means the clip's own start or end. `candidates` holds every answer that a blind guesser has to consider (empty where
    answers are open), so chance is 1 / len(candidates).
    """

    id: str
    media: str
    start: float | None
    end: float | None
    prompt: str
    target: str
    question_type: str = ""
    candidates: tuple[str, ...] = ()

    @property
    def type_name(self) -> str:
        """The question type as scores and logs name it; "untyped" where there is none."""
        return self.question_type or "untyped"


@dataclass(frozen=True)
class ClipExamples:
    """All examples about one clip: the same media file and the same window in seconds."""

    media: str
    start: float | None
    end: float | None
    examples: tuple[Example, ...]


def group_by_clip(examples: Iterable[Example]) -> list[ClipExamples]:
    """Gathers examples that share (media, start, end), so that one encoding serves them all.

    Clips come in the order of their first example, examples in the order they were given.
    """
    groups: dict[tuple[str, float | None, float | None], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.media, example.start, example.end), []).append(example)
    return [ClipExamples(*window, tuple(members)) for window, members in groups.items()]
