"""The examples that a recipe trains and validates on, whatever data set they come from."""

from pathlib import Path

from mirasol.data.example import Example
from mirasol.data.folder import read_examples
from mirasol.data.sources import Options, read_source, usable_examples
from mirasol.errors import UserError
from mirasol.training.clip_cache import BadWindow
from mirasol.training.recipe import DataRecipe


def read_split(data: DataRecipe, split: str) -> tuple[list[Example], list[BadWindow]]:
    """The examples of a split, and what its annotations name that is not there.

    (Of your own folder all that is named: what cannot be read is found when clips are decoded.)

    Raises UserError for annotations that cannot be read, and, unless the recipe skips them, for the first bad row or
    missing clip; and where the split has no answers to learn.
    """
    if data.source == "folder" and data.options == Options():
        return read_examples(Path(data.root), split), []
    source = read_source(data.source, Path(data.root), split, data.options)
    examples = usable_examples(source, data.on_bad_clip)
    unlabelled = next((example for example in examples if not example.target), None)
    if unlabelled is not None:
        raise UserError(
            f"{data.source} {split}: example {unlabelled.id!r} has no answer to learn: choose a split with labels"
        )
    costly = (problem for problem in source.problems if problem.severity == "error")
    return examples, [BadWindow(problem.file, None, None, str(problem)) for problem in costly]


def tokenizer_texts(examples: list[Example]) -> list[str]:
    """The texts a tokenizer is trained on. A class list that many examples share counts once."""
    texts: list[str] = []
    class_lists: set[int] = set()
    for example in examples:
        texts += [example.prompt, example.target]
        if example.random_target:
            texts += example.references
        if id(example.candidates) not in class_lists:
            class_lists.add(id(example.candidates))
            texts += example.candidates
    return texts
