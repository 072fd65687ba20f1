"""The examples that a recipe trains and validates on, whatever data set they come from."""

import os
from dataclasses import replace
from pathlib import Path

from mirasol.config.recipe import DataRecipe, DatasetOptions, DataSetRecipe
from mirasol.data.clip_cache import BadWindow
from mirasol.data.datasets.folder import read_examples
from mirasol.data.datasets.registry import read_dataset, select_usable_examples
from mirasol.data.example import Example
from mirasol.errors import UserError


def read_data(data: DataRecipe, part: str) -> tuple[dict[str, list[Example]], list[BadWindow]]:
    """The examples of every data set, media relative to `data.folder`, and what annotations name that is not there.

    `part` is "train" or "validation"; data sets without a validation split are left out there. Raises UserError as
    `read_split` does.
    """
    examples, absent = {}, []
    for name, data_set in data.data_sets.items():
        split = data_set.train_split if part == "train" else data_set.validation_split
        if split is None:
            continue
        own, missing = read_split(data_set, split, data.on_bad_clip)
        inside = os.path.relpath(os.path.abspath(data_set.root), data.folder) if data.mixture else "."
        if inside != ".":
            own = [replace(example, media=f"{inside}/{example.media}") for example in own]
        examples[name] = own
        absent += missing
    return examples, absent


def read_split(data: DataSetRecipe, split: str, on_bad_clip: str = "error") -> tuple[list[Example], list[BadWindow]]:
    """The examples of a split, and what its annotations name that is not there.

    (Of your own folder all that is named: what cannot be read is found when clips are decoded.)

    Raises UserError for annotations that cannot be read, and, unless they are skipped, for the first bad row or missing
    clip; and where the split has no answers to learn.
    """
    if data.dataset == "folder" and data.options == DatasetOptions():
        return read_examples(Path(data.root), split), []
    dataset = read_dataset(data.dataset, Path(data.root), split, data.options)
    examples = select_usable_examples(dataset, on_bad_clip)
    unlabelled = next((example for example in examples if not example.target), None)
    if unlabelled is not None:
        raise UserError(
            f"{data.dataset} {split}: example {unlabelled.id!r} has no answer to learn: choose a split with labels"
        )
    costly = (problem for problem in dataset.problems if problem.severity == "error")
    return examples, [BadWindow(problem.file, None, None, str(problem)) for problem in costly]


def collect_tokenizer_texts(examples: list[Example]) -> list[str]:
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
