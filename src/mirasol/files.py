"""Files that are there whole or not at all, their hashes and locks."""

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mirasol.errors import UserError


def write_whole(file: Path, text: str) -> None:
    """Writes a file such that an interruption, or a power cut, leaves what was there before, or all of the new text."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)


def parse_json(text: str, where: object, fix: str) -> Any:
    """What a JSON text says. Raises UserError for one that is damaged, on one line: `where` it is, and the `fix`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is damaged ({error}): {fix}") from error


def open_as_folder(path: Path) -> None:
    """Whoever may read or write in a file's folder may do so with the file: safetensors writes for its owner alone."""
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)


def file_hash(file: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lock(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file until it is closed, or the process ends; False where its disk has no locks.

    Raises BlockingIOError where another process has it, unless that one is waited for.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True
