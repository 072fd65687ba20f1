"""Your own data: ROOT/<split>.jsonl or .csv next to media files.

Each line of a jsonl file is one example:

    {"id": "a1", "file": "clips/a.mp4", "prompt": "what plays?", "target": "a bell",
     "start": null, "end": null, "question_type": "hearing", "candidates": ["a bell", "a drum"]}

`file`, `prompt` and `target` are required. `file` is relative to ROOT, `start` and `end` are seconds; an example
without an `id` is called after its line's number. A csv file has a header with the same names; an empty field is null,
and candidates are separated by "|". Its fields may be separated by tabs or semicolons as well. Any of these files may
be UTF-16.

With the option `annotations` the tables are in another folder, and with `class_list` every target is one of its
classes, which are the candidates of examples that have none of their own.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.classes import ClassList, find_class_list
from mirasol.data.datasets.contract import Adapter, AnnotationError, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import describe_type, is_utf8, read_csv_rows, read_json_lines
from mirasol.data.example import Example
from mirasol.errors import UserError

REQUIRED = ("file", "prompt", "target")
OPTIONAL = ("id", "start", "end", "question_type", "candidates")
SUFFIXES = (".jsonl", ".csv")


class BadRow(Exception):
    """A row that is not an example; `kind` is that of the `Problem`."""

    def __init__(self, message: str, kind: str = "malformed"):
        super().__init__(message)
        self.kind = kind


def list_folder_splits(root: Path) -> list[str]:
    """Names of the splits of a folder, sorted: its jsonl and csv files."""
    return sorted({path.stem for path in Path(root).glob("*") if path.suffix in SUFFIXES})


def find_split_file(root: Path, split: str) -> Path:
    """The file of a split. Raises UserError where there is none, or both a jsonl and a csv file."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder")
    if split not in list_folder_splits(root):
        if (root / f"{split}.tsv").is_file():
            raise UserError(f"{root / split}.tsv: rename it to {split}.csv, which may be separated by tabs")
        known = ", ".join(list_folder_splits(root)) or "none (no *.jsonl or *.csv file)"
        raise UserError(f"{root} has no split {split!r}; there are: {known}")
    found = [path for path in (root / f"{split}{suffix}" for suffix in SUFFIXES) if path.is_file()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name}: two files for one split: remove one")
    return found[0]


def read_examples(root: Path, split: str) -> list[Example]:
    """All examples of ROOT/<split>.jsonl (or .csv), in the file's order. Blank lines are skipped.

    Whether the media files can be read is found out when they are read.

    Raises:
        AnnotationError: the first row that is not an example, with file, line and, where it is known, column.
        UserError: no examples.
    """
    path, rows = find_split_file(root, split), Rows()
    for line, example in _read_rows(path, str(path), rows):
        rows.add(example, str(path), line)
        if rows.problems:
            break
    if rows.problems:
        raise AnnotationError(rows.problems[0])
    if not rows.examples:
        raise UserError(f"{path}: contains no examples")
    return rows.examples


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The rows of a split. A file that is named but does not exist is missing; its name stays in the messages."""
    path = find_split_file(files.annotation_root, split)
    rows, exists, shown = Rows(), {}, files.shown(path)
    rows.annotation_files.append(shown)
    rows.classes = (find_class_list(files, options) if options.class_list is not None else None) or ()
    classes = ClassList(rows.classes)
    for line, example in _read_rows(path, shown, rows):
        if rows.classes and not example.candidates:
            name = classes.find(example.target)
            if name is None:
                reason = f"label {example.target!r} is not among the {len(rows.classes)} classes"
                rows.skip("unknown label", reason, shown, line)
                continue
            example = replace(example, target=name, candidates=rows.classes)
        name = example.media
        if name not in exists:
            exists[name] = os.path.isfile(os.path.join(files.root, name))
        rows.add(example if exists[name] else replace(example, media="", video=name), shown, line)
    return rows


def _read_rows(path: Path, file: str, rows: Rows) -> Iterator[tuple[int, Example]]:
    """(line number, example) of every row; those that are not an example are skipped in `rows`."""
    is_csv = path.suffix == ".csv"
    if is_csv:
        table = read_csv_rows(path, file, rows, REQUIRED, optional=OPTIONAL, refuse_others=True)
    else:
        table = read_json_lines(path, file, rows, dict.fromkeys(REQUIRED, str))
    for line, row in table:
        try:
            example = parse_row(parse_csv_fields(row) if is_csv else row, line, path.parent)
        except BadRow as error:
            rows.skip(error.kind, str(error), file, line)
            continue
        yield line, example


def parse_csv_fields(fields: dict[str, str]) -> dict[str, Any]:
    """The fields of a csv row as a jsonl file would have them; empty ones are left out. Raises BadRow."""
    row: dict[str, Any] = {name: field for name, field in fields.items() if field or name in REQUIRED}
    for name in ("start", "end"):
        if name in row:
            try:
                row[name] = float(row[name])
            except ValueError as error:
                raise BadRow(f"field {name!r} must be seconds, not {row[name]!r}") from error
    if "candidates" in row:
        row["candidates"] = [text.strip() for text in row["candidates"].split("|")]
    return row


def _check_path(file: str, root: Path) -> str:
    """The path without empty parts. Raises BadRow for one that is not below the root.

    Links are followed wherever they lead, as for all data sets: the root's owner made them.
    """
    parts = file.split("/")
    if not parts[0] or ".." in parts or "\0" in file or "\\" in file:
        raise BadRow(f"file {file!r} must be a path inside {root}, without '..'")
    return "/".join(part for part in parts if part not in ("", ".")) or "."


def parse_row(row: dict[str, Any], line: int, root: Path) -> Example:
    """The example of a row of the table on `line`, whose media is below `root`. Raises BadRow."""
    for name in row:
        if name not in REQUIRED and name not in OPTIONAL:
            raise BadRow(f"unknown field {name!r}; fields are {', '.join(REQUIRED + OPTIONAL)}")
    start, end = _check_seconds(row.get("start"), "start"), _check_seconds(row.get("end"), "end")
    if start is not None and end is not None and start >= end:
        raise BadRow(f"start {start:g} must be before end {end:g}")
    return Example(
        id=_check_id(row.get("id", line)),
        media=_check_path(_check_text(row["file"], "file"), root),
        start=start,
        end=end,
        prompt=_check_text(row["prompt"], "prompt"),
        target=_check_text(row["target"], "target"),
        question_type=_check_text(row.get("question_type", ""), "question_type", may_be_empty=True),
        candidates=_check_candidates(row.get("candidates", []), row["target"]),
    )


def _check_text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} must be text, not {describe_type(value)}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"field {name!r} is empty", "empty text")
    if not is_utf8(value):
        raise BadRow(f"field {name!r} is not UTF-8 text", "not UTF-8")
    return value


def _check_id(value: Any) -> str:
    """The id as text: whole numbers are ids too."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return _check_text(str(value) if is_number else value, "id")


def _check_seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"field {name!r} must be seconds or null, not {describe_type(value)}")
    if not math.isfinite(value) or value < 0:
        raise BadRow(f"field {name!r} must be seconds from 0 on, not {value}")
    return float(value)


def _check_candidates(value: Any, target: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadRow(f"field 'candidates' must be a list, not {describe_type(value)}")
    candidates = tuple(_check_text(item, "candidates") for item in value)
    if candidates and target not in candidates:
        raise BadRow(f"target {target!r} is not among its candidates")
    return candidates


ADAPTER = Adapter(
    "your own folder",
    lambda files: list_folder_splits(files.annotation_root),
    read_split,
    options=("annotations", "class_list"),
)
