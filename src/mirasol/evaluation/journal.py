"""What an evaluation has answered so far, on disk: one line per clip, appended; an interrupted evaluation goes on."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mirasol.errors import UserError
from mirasol.files import lock

NAME = "journal.jsonl"


class Journal:
    """Lines of answered clips below a first line that says what is being evaluated.

    Lines reach the disk before `append` returns. A last line that an interruption cut short is taken off again when the
    journal is opened, and its clip is asked anew.
    """

    def __init__(self, file: Path, rows: list[dict[str, Any]], stream: Any):
        self.file, self.rows, self._stream = file, rows, stream

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path, identity: dict[str, Any]) -> Iterator["Journal"]:
        """The journal of this evaluation, begun where there is none.

        Raises UserError where the one there is of another evaluation, or another process writes it; on a disk without
        locks that cannot be told, which is a warning.
        """
        with file.open("a+b") as stream:
            try:
                is_locked = lock(stream.fileno())
            except BlockingIOError as error:
                raise UserError(
                    f"{file}: another evaluation writes here: wait for it or give another --output"
                ) from error
            if not is_locked:
                warnings.warn(
                    f"{file}: this disk has no locks: nothing keeps a second evaluation from writing here", stacklevel=3
                )
            stream.seek(0)
            lines = stream.read().split(b"\n")
            whole = sum(len(line) + 1 for line in lines[:-1])
            stream.truncate(whole)
            parsed = [_parse(line, file, number) for number, line in enumerate(lines[:-1], start=1)]
            if parsed:
                _same(parsed[0], identity, file)
            journal = cls(file, parsed[1:], stream)
            if not parsed:
                journal._write([identity])
            yield journal

    @staticmethod
    def end(folder: Path) -> None:
        """Removes the journal of a folder: its evaluation is complete."""
        (folder / NAME).unlink(missing_ok=True)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds lines, and waits until they are on disk."""
        rows = list(rows)
        self._write(rows)
        self.rows += rows

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self._stream.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _parse(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}, line {number}: is damaged: delete the folder and evaluate again") from error


def _same(found: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{file}: was begun with {name}={found.get(name)!r}, now it is {wanted.get(name)!r}: "
                "evaluate as before to go on, or give another --output"
            )
