"""The answers of an unfinished evaluation on disk, one appended line per clip, from which it resumes."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mirasol.errors import UserError
from mirasol.files import lock_file

NAME = "journal.jsonl"


class Journal:
    """Lines of answered clips after a first line that identifies the evaluation.

    Lines are on disk before `append` returns. A last line that an interruption cut short is removed when the journal is
    opened, and its clip is asked again.
    """

    def __init__(self, file: Path, rows: list[dict[str, Any]], stream: Any):
        self.file, self.rows, self._stream = file, rows, stream

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path, identity: dict[str, Any]) -> Iterator["Journal"]:
        """Opens the journal of this evaluation, or creates it.

        Raises UserError where it belongs to another evaluation, or another process writes it; on a disk without locks
        the latter cannot be detected, which is a warning.
        """
        with file.open("a+b") as stream:
            try:
                is_locked = lock_file(stream.fileno())
            except BlockingIOError as error:
                raise UserError(
                    f"{file}: another evaluation writes here: wait for it or give another --output"
                ) from error
            if not is_locked:
                warnings.warn(
                    f"{file}: this disk has no locks: a second evaluation could write here unnoticed", stacklevel=3
                )
            stream.seek(0)
            lines = stream.read().split(b"\n")
            stream.truncate(sum(len(line) + 1 for line in lines[:-1]))
            parsed = [_parse_line(line, file, number) for number, line in enumerate(lines[:-1], start=1)]
            if parsed:
                _check_same(parsed[0], identity, file)
            journal = cls(file, parsed[1:], stream)
            if not parsed:
                journal._write([identity])
            yield journal

    @staticmethod
    def end(folder: Path) -> None:
        """Removes the journal of a folder whose evaluation is complete."""
        (folder / NAME).unlink(missing_ok=True)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends lines and waits until they are on disk."""
        rows = list(rows)
        self._write(rows)
        self.rows += rows

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self._stream.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _parse_line(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}, line {number}: damaged: delete the folder and evaluate again") from error


def _check_same(found: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{file}: was started with {name}={found.get(name)!r}, now it is {wanted.get(name)!r}: "
                "evaluate as before to resume, or give another --output"
            )
