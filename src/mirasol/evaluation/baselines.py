"""What guessing scores without any clip: by chance, or from the questions and answers of the training split."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import DatasetSplit
from mirasol.data.datasets.registry import list_splits, read_dataset
from mirasol.data.example import Example
from mirasol.errors import UserError

T = TypeVar("T")
TRAIN = "train"


def compute_chance(example: Example) -> float:
    """What guessing among the example's candidates scores on average: 1 / their number, 0 for open answers."""
    return 1 / len(example.candidates) if example.candidates else 0.0


def find_most_frequent_right(rights: Sequence[Iterable[T]]) -> T | None:
    """The constant answer that is right most often, None without any; `rights` are the right answers by question."""
    counts = Counter(answer for answers in rights for answer in set(answers))
    return counts.most_common(1)[0][0] if counts else None


def read_training_examples(dataset: DatasetSplit, options: DatasetOptions) -> tuple[tuple[Example, ...], str]:
    """The annotated examples of the data set's training split, with or without media, and where they come from.

    No examples for the training split itself, where there is no readable training split (the text says why), and
    for data sets whose questions have no single right answer.
    """
    if dataset.split == TRAIN or dataset.protocol in ("labels", "captions"):
        return (), "none"
    try:
        if TRAIN not in list_splits(dataset.read_as, Path(dataset.root), options):
            return (), "none: there is no training split"
        found = read_dataset(dataset.read_as, Path(dataset.root), TRAIN, options, open_media=False)
    except UserError as error:
        return (), f"none: {error}"
    known = tuple(example for example in found.annotated if example.target)
    return known, f"{len(known)} examples of {', '.join(found.annotation_files)}"


class AnswerPrior:
    """How often each answer was right in training, to the same prompt and to any prompt. Blind guessing answers with
    the most frequent one. `form` is the normalisation under which answers are compared."""

    def __init__(self, known: Iterable[Example], form: Callable[[str], str]):
        self.form = form
        self._all: Counter[str] = Counter()
        self._by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
        for example in known:
            answer = form(example.target)
            self._all[answer] += 1
            self._by_prompt[example.prompt][answer] += 1
        self.constant = _find_most_frequent(self._all)

    def __bool__(self) -> bool:
        return bool(self._all)

    def guess(self, prompt: str) -> str:
        """The most frequent answer to the prompt, or to any prompt where this one is new; ties go by alphabet."""
        return _find_most_frequent(self._by_prompt[prompt]) if prompt in self._by_prompt else self.constant

    def choose(self, prompt: str, candidates: Sequence[str]) -> int:
        """Index of the candidate that was right most often to this prompt, then to any prompt; of equals the first."""
        to_prompt = self._by_prompt.get(prompt, Counter())
        forms = [self.form(candidate) for candidate in candidates]
        return max(range(len(forms)), key=lambda place: (to_prompt[forms[place]], self._all[forms[place]], -place))


def _find_most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")
