"""What every data set's adapter takes and gives: options, problems, counts, and the `DatasetSplit` made of them."""

import dataclasses
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.files import Files
from mirasol.data.example import Example
from mirasol.errors import UserError

# Kinds of problems that cost no example: they are warnings.
WARNINGS = (
    "other counts",
    "named otherwise",
    "class without rows",
    "other classes",
    "identical files",
    "video in two splits",
    "no index",
    "ends early",
    "header too short",
    "long text",
    "several recordings",
)


@dataclass(frozen=True)
class Problem:
    """Something wrong with annotations or media. `line` and `column` count from 1; `examples`: how many it costs."""

    kind: str
    message: str
    file: str = ""
    line: int | None = None
    column: int | None = None
    examples: int = 0

    @property
    def severity(self) -> str:
        """ "warning" where nothing is lost, else "error"."""
        return "warning" if self.kind in WARNINGS else "error"

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place += f", line {self.line}"
        if self.column is not None:
            place += f", column {self.column}"
        return f"{place}: {self.message}" if place else self.message

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `mirasol data check --json` prints it."""
        return {"kind": self.kind, "severity": self.severity, **dataclasses.asdict(self)}


class AnnotationError(UserError):
    """An annotation file that cannot be read on; `problem` says what and where."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem

    def __reduce__(self):
        return type(self), (self.problem,)


@dataclass(frozen=True)
class Published:
    """A split's counts as its makers publish them; None where they are not known."""

    examples: int | None = None
    videos: int | None = None
    types: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """n_annotated = n_usable + the sum of `reasons`, which say what became of the others."""

    n_annotated: int
    n_found: int
    n_usable: int
    reasons: Mapping[str, int]


@dataclass(frozen=True)
class Retold:
    """What shards say of the data set they were made from: its name and protocol.

    Its problems, such as missing media and differing counts, were found at that time and are repeated unchanged.
    """

    name: str
    protocol: str


class Places:
    """File and line of each example of a split, in a few bytes each."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._files, self._lines = array("q"), array("q")

    def add(self, file: str, line: int | None) -> None:
        """Adds the place of the next example."""
        number = self._numbers.setdefault(file, len(self._names))
        if number == len(self._names):
            self._names.append(file)
        self._files.append(number)
        self._lines.append(-1 if line is None else line)

    def __getitem__(self, number: int) -> tuple[str, int | None]:
        line = self._lines[number]
        return self._names[self._files[number]], None if line < 0 else line


class Rows:
    """Collects one split's examples and problems while an adapter reads; nothing that it is given gets lost."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.problems: list[Problem] = []
        self.reasons: Counter[str] = Counter()
        self.annotation_files: list[str] = []
        self.classes: tuple[str, ...] = ()
        self.facts: dict[str, str | int] = {}
        self.published: Published | None = None  # where the counts depend on the options
        self.retold: Retold | None = None
        self.missing_at: dict[str, str] = {}  # by video without media: where it is asked for first
        self.found_by_video: set[str] = set()  # media whose names do not say whether they were cut out (`windows`)
        self.places = Places()
        self._ids: dict[str, int | None] = {}
        self._files: dict[str, str] = {}

    def add(self, example: Example, file: str, line: int | None = None, column: int | None = None) -> None:
        """Takes an example; one whose id was there before is left out and counted."""
        if example.id in self._ids:
            first = self._ids[example.id]
            at = f" on line {first}" if first is not None and first != line else ""
            self.skip("duplicate id", f"id {example.id!r} was already used{at}: left out", file, line, column)
            return
        self._ids[example.id] = line
        if example.media in self.found_by_video:
            self._files[example.id] = file
        if not example.media:
            self.missing_at.setdefault(example.video, file if line is None else f"{file}, line {line}")
        self.examples.append(example)
        self.places.add(file, line)

    def seen(self, id: str) -> bool:
        """Whether an example of this id was added."""
        return id in self._ids

    def find_place(self, id: str) -> tuple[str, int | None]:
        """File and line of an example whose media is in `found_by_video`."""
        return self._files.get(id, ""), self._ids.get(id)

    def skip(
        self, kind: str, message: str, file: str = "", line: int | None = None, column: int | None = None, rows: int = 1
    ) -> None:
        """Counts `rows` annotation rows that give no example, and says why."""
        self.problems.append(Problem(kind, message, file, line, column, rows))
        if rows:
            self.reasons[kind] += rows

    def warn(self, kind: str, message: str, file: str = "") -> None:
        """Notes something that costs no example."""
        assert kind in WARNINGS, kind
        self.problems.append(Problem(kind, message, file))


@dataclass(frozen=True)
class Adapter:
    """How one data set is read.

    splits: names of the splits that the files offer, in the order in which they are listed
    read: the rows of one split
    published: counts by split
    overlapping: splits made of the clips of other splits, which a check of all splits leaves aside
    options: names of the `DatasetOptions` that `read` looks at
    protocol: how its answers are scored: "open", "multiple choice", "classes", "labels", "captions"
    ids_are_places: an example's id says where its annotation is
    """

    title: str
    splits: Callable[[Files], list[str]]
    read: Callable[[Files, str, DatasetOptions], Rows]
    published: Mapping[str, Published] = field(default_factory=dict)
    overlapping: tuple[str, ...] = ()
    options: tuple[str, ...] = ("annotations",)
    protocol: str = "open"
    ids_are_places: bool = False


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a data set as it is on disk.

    name: the data set; of shards the one that they were made from, for it says how answers are scored
    read_as: the name that reads it from `root`: `shards` for shards
    annotated: every annotation row that is an example, in the file's order; `media` is "" where it was not found
    problems: everything wrong, missing media included, one entry a video
    reasons: how many annotation rows give no usable example, by reason
    classes: all class names in the order of the data set's class index; empty where answers are open
    facts: what a result made with this dataset has to state: options, number of classes, variant of the annotation
    """

    name: str
    root: Path
    split: str
    protocol: str
    annotated: tuple[Example, ...]
    problems: tuple[Problem, ...]
    reasons: Mapping[str, int]
    classes: tuple[str, ...]
    published: Published
    facts: Mapping[str, str | int]
    annotation_files: tuple[str, ...]
    read_as: str = ""
    places: Places = field(default_factory=Places, compare=False, repr=False)

    def locate(self, ids: Collection[str]) -> dict[str, tuple[str, int | None]]:
        """File and line of the annotations with these ids."""
        return {e.id: self.places[number] for number, e in enumerate(self.annotated) if e.id in ids}

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The examples whose media was found."""
        return tuple(example for example in self.annotated if example.media)

    @cached_property
    def missing(self) -> tuple[Example, ...]:
        """The examples whose media was not found."""
        return tuple(example for example in self.annotated if not example.media)

    @property
    def counts(self) -> Counts:
        """Counts before any media file was opened: what is found counts as usable."""
        found = len(self.examples)
        return Counts(found + sum(self.reasons.values()), found, found, dict(self.reasons))
