"""What guessing scores: somebody who has read the training split's questions and answers and sees no clip."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mirasol.data.datasets import DatasetOptions, DatasetSplit, list_splits, read_dataset
from mirasol.data.example import Example
from mirasol.errors import UserError

TRAIN = "train"


def training_examples(dataset: DatasetSplit, options: DatasetOptions) -> tuple[tuple[Example, ...], str]:
    """The annotated examples of the data set's training split, media or not, and where they come from, in words.

    No examples where the split is itself the training split, where there is none (or none that can be read: the words
    say why), and for data sets without one right answer.
    """
    if dataset.split == TRAIN or dataset.protocol in ("labels", "captions"):
        return (), "none"
    try:
        if TRAIN not in list_splits(dataset.read_as, Path(dataset.root), options):
            return (), "none: there is no training split"
        found = read_dataset(dataset.read_as, Path(dataset.root), TRAIN, options)
    except UserError as error:
        return (), f"none: {error}"
    known = tuple(example for example in found.annotated if example.target)
    return known, f"{len(known)} examples of {', '.join(found.annotation_files)}"


class Prior:
    """How often each answer was right in training: to the very same prompt, and at all. `form` is the normalisation
    under which answers are compared."""

    def __init__(self, known: Iterable[Example], form: Callable[[str], str]):
        self.form = form
        self._all: Counter[str] = Counter()
        self._by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
        for example in known:
            answer = form(example.target)
            self._all[answer] += 1
            self._by_prompt[example.prompt][answer] += 1
        self.constant = _most_frequent(self._all)

    def __bool__(self) -> bool:
        return bool(self._all)

    def guess(self, prompt: str) -> str:
        """The most frequent answer to the prompt, to any prompt where it is a new one; ties go by the alphabet."""
        return _most_frequent(self._by_prompt[prompt]) if prompt in self._by_prompt else self.constant

    def choose(self, prompt: str, candidates: Sequence[str]) -> int:
        """The place of the candidate that was right most often, to the prompt before at all; the first of equals."""
        to_prompt = self._by_prompt.get(prompt, Counter())
        forms = [self.form(candidate) for candidate in candidates]
        return max(range(len(forms)), key=lambda place: (to_prompt[forms[place]], self._all[forms[place]], -place))


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")
