"""Data sets as they lie on a user's disk: one adapter each, one contract. docs/datasets.md has a section on each."""

from mirasol.data.datasets.contract import Adapter, AnnotationError, Counts, DatasetOptions, Problem, Published, Source
from mirasol.data.datasets.registry import SOURCES, read_source, source_splits, usable_examples

__all__ = [
    "SOURCES",
    "Adapter",
    "AnnotationError",
    "Counts",
    "DatasetOptions",
    "Problem",
    "Published",
    "Source",
    "read_source",
    "source_splits",
    "usable_examples",
]
