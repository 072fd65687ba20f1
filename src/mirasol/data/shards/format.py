"""The files of a sharded data set: what `mirasol data shard` writes and the dataset `shards` reads.

OUT/manifest.json            written last: what it was made from, and of every shard its size and hashes
OUT/train/examples.jsonl     every annotated example of the split, in the data set's order
OUT/train/00000.tar          a WebDataset tar: 000000000.mp4 and 000000000.json, and so on
OUT/train/00000.index.json   of every member offset, size and SHA-256
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirasol.data.example import Example
from mirasol.data.media_files import get_index_path
from mirasol.json_values import parse_json

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"  # next to unfinished shards: what they belong to
EXAMPLES = "examples.jsonl"
# In place of a list of candidates: all classes, which the manifest holds once.
ALL_CLASSES = "classes"

_FIELDS = {f.name: f for f in dataclasses.fields(Example)}
_TUPLES = ("candidates", "references")


def make_example_row(example: Example, classes: tuple[str, ...]) -> dict[str, Any]:
    """An example as plain data, without `media` and without the fields that have their default.

    A video without a name keeps the one that it goes by, its file's (`Example.video_name`): its member has another.
    """
    row = {} if example.video else {"video": example.media}
    for name, field in _FIELDS.items():
        value = getattr(example, name)
        if name == "media" or (value == field.default and value is not dataclasses.MISSING):
            continue
        row[name] = ALL_CLASSES if name == "candidates" and value == classes else value
    return row


def parse_example_row(row: Mapping[str, Any], media: str, classes: tuple[str, ...]) -> Example:
    """The example of a row. Raises TypeError or ValueError for a row that is none."""
    values = {name: row[name] for name in row if name in _FIELDS}
    for name in _TUPLES:
        if name in values:
            values[name] = classes if values[name] == ALL_CLASSES else tuple(values[name])
    return Example(**{**values, "media": media})


@dataclass(frozen=True)
class Sample:
    """One media file and the rows (`make_example_row`) of all its examples; `key` names its members in the tar."""

    key: str
    media: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class ShardJob:
    """All that one shard is made from.

    root: the data set's folder; out: the folder of all shards; name: the tar's path below it, `train/00000.tar`
    reencode: `SIZE` or `SIZE@FPS` as `mirasol.media.transcode.Reencoding` writes it; "" keeps media as they are
    """

    root: str
    out: str
    name: str
    samples: tuple[Sample, ...]
    reencode: str = ""

    @property
    def path(self) -> Path:
        """Where the tar goes."""
        return Path(self.out) / self.name

    def to_json(self) -> str:
        """Text, for a cluster."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ShardJob":
        """The inverse of `to_json`."""
        values = json.loads(text)
        samples = (Sample(s["key"], s["media"], tuple(s["rows"])) for s in values.pop("samples"))
        return cls(**values, samples=tuple(samples))


def read_finished_index(tar: Path) -> dict[str, Any] | None:
    """The index of a shard that is there whole; None where it still has to be written."""
    try:
        index = parse_json(get_index_path(tar).read_bytes())
        return index if tar.stat().st_size == index["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
