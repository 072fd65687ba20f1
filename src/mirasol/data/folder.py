"""A data set in a plain folder, the format for your own data: ROOT/<split>.jsonl beside media files.

Each line of a jsonl file is one example:

    {"id": "a1", "file": "clips/a.mp4", "prompt": "what plays?", "target": "a bell",
     "start": null, "end": null, "question_type": "hearing", "candidates": ["a bell", "a drum"]}

`id`, `file`, `prompt` and `target` are required. `file` is relative to ROOT, `start` and `end` are seconds.
"""

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from mirasol.data.example import Example
from mirasol.errors import UserError

REQUIRED = ("id", "file", "prompt", "target")
OPTIONAL = ("start", "end", "question_type", "candidates")


def split_names(root: Path) -> list[str]:
    """Names of the splits of a folder, sorted: its jsonl files."""
    return sorted(path.stem for path in Path(root).glob("*.jsonl"))


def read_examples(root: Path, split: str) -> list[Example]:
    """All examples of ROOT/<split>.jsonl, in the file's order. Blank lines are skipped.

    Raises UserError, naming file and line, for anything that is not an example; whether the media files can be read is
    found out when they are read.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder")
    path = root / f"{split}.jsonl"
    if split not in split_names(root):
        known = ", ".join(split_names(root)) or "none (no *.jsonl file)"
        raise UserError(f"{root} has no split {split!r}; there are: {known}")
    examples, lines_of_ids = [], {}
    inside = _Inside(root)
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        example = _parse(line, f"{path}, line {number}", inside)
        if example.id in lines_of_ids:
            first = lines_of_ids[example.id]
            raise UserError(f"{path}, line {number}: id {example.id!r} was already used on line {first}")
        lines_of_ids[example.id] = number
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


class _Inside:
    """Makes sure that a media path stays inside the root, also through links: data sets are untrusted."""

    def __init__(self, root: Path):
        self.root = root
        self.real_root = root.resolve()
        self.passed: dict[str, str] = {}  # many examples share a file: each is looked up on the disk once

    def __call__(self, file: str, place: str) -> str:
        if file not in self.passed:
            self.passed[file] = self._check(file, place)
        return self.passed[file]

    def _check(self, file: str, place: str) -> str:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\0" in file or "\\" in file:
            raise UserError(f"{place}: file {file!r} must be a path inside {self.root}, without '..'")
        if not (self.real_root / path).resolve().is_relative_to(self.real_root):
            raise UserError(f"{place}: file {file!r} leads outside {self.root}")
        return path.as_posix()


def _parse(line: bytes, place: str, inside: _Inside) -> Example:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise UserError(f'{place}: must be an object like {{"id": …, "file": …}}, not {_kind(row)}')
    for name in REQUIRED:
        if name not in row:
            raise UserError(f"{place}: field {name!r} is missing")
    for name in row:
        if name not in REQUIRED + OPTIONAL:
            raise UserError(f"{place}: unknown field {name!r}; fields are {', '.join(REQUIRED + OPTIONAL)}")
    start, end = (_seconds(row.get(name), name, place) for name in ("start", "end"))
    if start is not None and end is not None and start >= end:
        raise UserError(f"{place}: start {start:g} must lie before end {end:g}")
    return Example(
        id=_text(row["id"], "id", place),
        media=inside(_text(row["file"], "file", place), place),
        start=start,
        end=end,
        prompt=_text(row["prompt"], "prompt", place),
        target=_text(row["target"], "target", place),
        question_type=_text(row.get("question_type", ""), "question_type", place, may_be_empty=True),
        candidates=_candidates(row.get("candidates", []), row["target"], place),
    )


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _text(value: Any, name: str, place: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} must be text, not {_kind(value)}")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{place}: field {name!r} is empty")
    return value


def _seconds(value: Any, name: str, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: field {name!r} must be seconds or null, not {_kind(value)}")
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{place}: field {name!r} must be seconds from 0 on, not {value}")
    return float(value)


def _candidates(value: Any, target: str, place: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UserError(f"{place}: field 'candidates' must be a list, not {_kind(value)}")
    candidates = tuple(_text(item, "candidates", place) for item in value)
    if candidates and target not in candidates:
        raise UserError(f"{place}: target {target!r} is not among its candidates")
    return candidates
