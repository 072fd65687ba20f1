"""Files that are there whole or not at all, and their hashes."""

import hashlib
import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes a file such that an interruption leaves what was there before, or all of the new text."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def file_hash(file: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
