"""Whether two readings of a data set gave the same: one hash of all examples and of the media that they name."""

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from mirasol.data.example import Example
from mirasol.data.media_files import find_stored_file, open_media_file
from mirasol.files import hash_file


@dataclass(frozen=True)
class ExamplesDigest:
    """sha256: in hexadecimal; missing: media that are named and not there, in the examples' order"""

    sha256: str
    missing: tuple[str, ...] = ()


def digest_examples(
    root: Path, examples: Sequence[Example], media: Iterable[str] | None = None, contents: bool = False
) -> ExamplesDigest:
    """SHA-256 of the examples as they are read, and of name and size of each media file that they name.

    It does not depend on where the data is. `media` are the files to look at where that is not all of the examples'.
    With `contents` every one of them is read, and its content counts, too.
    """
    digest, missing = hashlib.sha256(), []
    # The field's own order: asdict would copy every class list, once for each example.
    facts = attrgetter(*(field.name for field in dataclasses.fields(Example)))
    for example in examples:
        digest.update(json.dumps(facts(example), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    for name in dict.fromkeys((example.media for example in examples) if media is None else media):
        size = _find_size(root, name)
        if size is None:
            missing.append(name)
        digest.update(f"{name} {size or 0}\n".encode("utf-8", "surrogatepass"))
        if contents and size is not None:
            with open_media_file(root, name) as path:
                digest.update(hash_file(path).encode())
    return ExamplesDigest(digest.hexdigest(), tuple(missing))


def _find_size(root: Path, media: str) -> int | None:
    """Bytes of the file that holds the media, None where there is none."""
    for path in (f"{root}/{media}", find_stored_file(root, media)):  # few are in a tar, so the path is tried first
        try:
            facts = os.stat(path)
        except OSError:
            continue
        return facts.st_size if stat.S_ISREG(facts.st_mode) else None
    return None
