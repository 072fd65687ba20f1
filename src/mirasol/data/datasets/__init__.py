"""Data sets as they lie on a user's disk: one adapter each, one contract. docs/datasets.md has a section on each."""

from mirasol.data.datasets.contract import (
    Adapter,
    AnnotationError,
    Counts,
    DatasetOptions,
    DatasetSplit,
    Problem,
    Published,
)
from mirasol.data.datasets.registry import DATASETS, list_splits, read_dataset, select_usable_examples

__all__ = [
    "DATASETS",
    "Adapter",
    "AnnotationError",
    "Counts",
    "DatasetOptions",
    "DatasetSplit",
    "Problem",
    "Published",
    "list_splits",
    "read_dataset",
    "select_usable_examples",
]
