"""A data set in a plain folder, the format for your own data: ROOT/<split>.jsonl or .csv beside media files.

Each line of a jsonl file is one example:

    {"id": "a1", "file": "clips/a.mp4", "prompt": "what plays?", "target": "a bell",
     "start": null, "end": null, "question_type": "hearing", "candidates": ["a bell", "a drum"]}

`file`, `prompt` and `target` are required. `file` is relative to ROOT, `start` and `end` are seconds; an example
without an `id` is called after its line's number. A csv file has a header with the same names; an empty field is null,
and candidates are divided by "|".
"""

import csv
import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.json_values import InvalidJson, parse_json

REQUIRED = ("file", "prompt", "target")
OPTIONAL = ("id", "start", "end", "question_type", "candidates")
SUFFIXES = (".jsonl", ".csv")
_HALF = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can hold escaped and no file can


class BadRow(UserError):
    """A row that is no example; `line` and `column` count from 1, `column` is None where the whole row is meant."""

    def __init__(self, reason: str, line: int = 0, column: int | None = None):
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column

    def __reduce__(self):
        return type(self), (self.reason, self.line, self.column)


def split_names(root: Path) -> list[str]:
    """Names of the splits of a folder, sorted: its jsonl and csv files."""
    return sorted({path.stem for path in Path(root).glob("*") if path.suffix in SUFFIXES})


def split_file(root: Path, split: str) -> Path:
    """The file of a split. Raises UserError where there is none, or both a jsonl and a csv file."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder")
    if split not in split_names(root):
        known = ", ".join(split_names(root)) or "none (no *.jsonl or *.csv file)"
        raise UserError(f"{root} has no split {split!r}; there are: {known}")
    found = [path for path in (root / f"{split}{suffix}" for suffix in SUFFIXES) if path.is_file()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name}: two files for one split: remove one")
    return found[0]


def read_examples(root: Path, split: str) -> list[Example]:
    """All examples of ROOT/<split>.jsonl (or .csv), in the file's order. Blank lines are skipped.

    Raises UserError, naming file and line, for anything that is not an example; whether the media files can be read is
    found out when they are read.
    """
    path = split_file(root, split)
    examples, lines_of_ids = [], {}
    for line, example in rows_of(path):
        if isinstance(example, BadRow):
            column = f" at column {example.column}" if example.column is not None else ""
            raise UserError(f"{path}, line {line}: {example.reason}{column}")
        if example.id in lines_of_ids:
            first = lines_of_ids[example.id]
            raise UserError(f"{path}, line {line}: id {example.id!r} was already used on line {first}")
        lines_of_ids[example.id] = line
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def rows_of(path: Path) -> Iterator[tuple[int, Example | BadRow]]:
    """(line number, its example or what is wrong with it) for every line of a split's file that is not blank."""
    inside = _Inside(path.parent)
    raw = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    for line, row in raw:
        if isinstance(row, BadRow):
            yield line, row
            continue
        try:
            yield line, _parse(row, line, inside)
        except BadRow as error:
            yield line, error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except UnicodeDecodeError:
            row = BadRow("is not UTF-8 text", number)
        except InvalidJson as error:
            row = BadRow(f"is not JSON ({error.reason})", number, error.column)
        if not isinstance(row, dict | BadRow):
            row = BadRow(f'must be an object like {{"id": …, "file": …}}, not {_kind(row)}', number)
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        unknown = [name for name in header if name not in REQUIRED + OPTIONAL]
        if unknown or not set(REQUIRED) <= set(header):
            wanted = f"expected {','.join(REQUIRED)} and any of {','.join(OPTIONAL)}"
            yield 1, BadRow(f"wrong header: {wanted}; found {','.join(header) or 'nothing'}", 1)
            return
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            yield 1, BadRow(f"wrong header: {twice!r} stands in it twice; found {','.join(header)}", 1)
            return
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                yield line, _csv_row(header, fields, line)
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, BadRow(f"is not csv ({error})", line, 1)


def _csv_row(header: list[str], fields: list[str], line: int) -> dict[str, Any] | BadRow:
    if len(fields) != len(header):
        return BadRow(f"{len(fields)} fields, {len(header)} expected", line)
    if any("\udc80" <= letter <= "\udcff" for field in fields if not field.isascii() for letter in field):
        return BadRow("is not UTF-8 text", line)
    row: dict[str, Any] = {name: field for name, field in zip(header, fields, strict=True) if field or name in REQUIRED}
    for name in ("start", "end"):
        if name in row:
            try:
                row[name] = float(row[name])
            except ValueError:
                return BadRow(f"field {name!r} must be seconds, not {row[name]!r}", line)
    if "candidates" in row:
        row["candidates"] = [text.strip() for text in row["candidates"].split("|")]
    return row


class _Inside:
    """Makes sure that a media path stays inside the root, also through links: data sets are untrusted."""

    def __init__(self, root: Path):
        self.root = root
        self.real_root = root.resolve()
        # Where each folder leads: to ask that for every file took most of the reading.
        self.folders: dict[str, Path | None] = {}
        self.passed: dict[str, str] = {}  # many examples share a file: each is looked up on the disk once

    def __call__(self, file: str) -> str:
        if file not in self.passed:
            self.passed[file] = self._check(file)
        return self.passed[file]

    def _check(self, file: str) -> str:
        parts = file.split("/")
        if not parts[0] or ".." in parts or "\0" in file or "\\" in file:
            raise BadRow(f"file {file!r} must be a path inside {self.root}, without '..'")
        parts = [part for part in parts if part not in ("", ".")] or ["."]
        folder = "/".join(parts[:-1])
        if folder not in self.folders:
            self.folders[folder] = self._resolved(folder)
        real = self.folders[folder]
        if real is not None and os.path.islink(f"{real}/{parts[-1]}"):
            real = self._resolved("/".join(parts))
        if real is None:
            raise BadRow(f"file {file!r} leads outside {self.root}")
        return "/".join(parts)

    def _resolved(self, path: str) -> Path | None:
        """Where a path below the root leads, None where that is outside of it."""
        real = (self.real_root / path).resolve()
        return real if real.is_relative_to(self.real_root) else None


def _parse(row: dict[str, Any], line: int, inside: _Inside) -> Example:
    """The example of a row. Raises BadRow."""
    try:
        for name in REQUIRED:
            if name not in row:
                raise BadRow(f"field {name!r} is missing")
        for name in row:
            if name not in REQUIRED + OPTIONAL:
                raise BadRow(f"unknown field {name!r}; fields are {', '.join(REQUIRED + OPTIONAL)}")
        start, end = (_seconds(row.get(name), name) for name in ("start", "end"))
        if start is not None and end is not None and start >= end:
            raise BadRow(f"start {start:g} must lie before end {end:g}")
        return Example(
            id=_text(row.get("id", str(line)), "id"),
            media=inside(_text(row["file"], "file")),
            start=start,
            end=end,
            prompt=_text(row["prompt"], "prompt"),
            target=_text(row["target"], "target"),
            question_type=_text(row.get("question_type", ""), "question_type", may_be_empty=True),
            candidates=_candidates(row.get("candidates", []), row["target"]),
        )
    except BadRow as error:
        error.line = line
        raise


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} must be text, not {_kind(value)}")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"field {name!r} is empty")
    if not value.isascii() and _HALF.search(value):
        raise BadRow(f"field {name!r} is not UTF-8 text")
    return value


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"field {name!r} must be seconds or null, not {_kind(value)}")
    if not math.isfinite(value) or value < 0:
        raise BadRow(f"field {name!r} must be seconds from 0 on, not {value}")
    return float(value)


def _candidates(value: Any, target: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadRow(f"field 'candidates' must be a list, not {_kind(value)}")
    candidates = tuple(_text(item, "candidates") for item in value)
    if candidates and target not in candidates:
        raise BadRow(f"target {target!r} is not among its candidates")
    return candidates
