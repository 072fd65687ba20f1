"""A data set that `mirasol data shard` wrote: the same examples as the data set it was made from."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, AnnotationError, Problem, Published, Retold, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import make_malformed_file_error
from mirasol.data.example import Example
from mirasol.data.media_files import get_index_path, read_tar_index
from mirasol.data.shards.format import EXAMPLES, FORMAT, MANIFEST, PLAN, parse_example_row
from mirasol.errors import BadClip, UserError
from mirasol.json_values import parse_json

_MEDIA = re.compile(r"([^/]+/\d+\.tar)/([^/]+)")


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards, None for any other folder.

    Raises UserError where its shards are unfinished, and AnnotationError for a manifest that cannot be read.
    """
    file = Path(root) / MANIFEST
    if not file.is_file():
        if (Path(root) / PLAN).is_file():
            raise UserError(f"{root}: its shards are unfinished: run the `mirasol data shard` that made it again")
        return None
    try:
        manifest = parse_json(file.read_bytes())
    except ValueError as error:
        raise make_malformed_file_error(f"is not JSON ({error})", MANIFEST) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        return None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file}: shards of format {manifest.get('format')}, this version reads format {FORMAT}")
    return manifest


def list_splits(files: Files) -> list[str]:
    """The splits that were sharded."""
    manifest = read_manifest(files.root)
    return list(manifest["splits"]) if manifest is not None else []


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The examples of a split; those whose member is gone are counted as lost, by shard."""
    manifest = read_manifest(files.root)
    assert manifest is not None
    rows, shown = Rows(), f"{split}/{EXAMPLES}"
    try:
        entry = manifest["splits"][split]
        _repeat_problems(rows, manifest, entry)
        held = {name: _find_members(files.root, name, facts, rows) for name, facts in entry["shards"].items()}
        wanted = entry["sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise make_malformed_file_error(f"is not a manifest of shards ({error!r})", MANIFEST) from error
    lost: Counter[str] = Counter()
    for line, row in _read_lines(files.root / shown, shown, wanted):
        try:
            rows.add(_make_example(row, held, rows.classes, lost), shown, line)
        except (KeyError, TypeError, ValueError) as error:
            raise make_malformed_file_error(f"is no example ({error})", shown, line) from error
    for name, count in lost.items():
        kind, reason = held[name][1:]
        rows.skip(kind, f"{reason}: {count} examples are lost", name, rows=count)
    return rows


def _repeat_problems(rows: Rows, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    rows.retold = Retold(manifest["source"], entry["protocol"])
    rows.classes = tuple(entry["classes"])
    rows.facts.update(entry["facts"])
    rows.published = Published(**entry["published"])
    rows.annotation_files += entry["annotation_files"]
    rows.reasons.update(entry["reasons"])
    for problem in entry["problems"]:
        rows.problems.append(Problem(**problem))


def _find_members(
    root: Path, name: str, facts: Mapping[str, Any], rows: Rows
) -> tuple[Mapping[str, Any] | None, str, str]:  # fmt: skip
    """(the members that a damaged shard still has, None for all; kind of damage; what it is)."""
    path = root / name
    size = path.stat().st_size if path.is_file() else None
    if size == facts["bytes"]:
        if not get_index_path(path).is_file():
            rows.warn("no index", f"{get_index_path(path).name} is missing: the tar's own headers are read", name)
        return None, "", ""
    if size is None:
        return {}, "missing shard", "no such file"
    try:
        index = read_tar_index(path)
    except BadClip as error:
        return {}, "cut short", error.reason
    kind = "cut short" if index.cut else "missing member"
    return index.members, kind, f"{size} bytes, {facts['bytes']} were written{f' ({index.cut})' if index.cut else ''}"


def _read_lines(path: Path, shown: str, wanted: str) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise AnnotationError(Problem("malformed", "no such file", shown))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != wanted:
        raise make_malformed_file_error(
            f"is not what was written (another hash than in {MANIFEST}): cut short or changed", shown
        )
    for line, text in enumerate(content.splitlines(), start=1):
        yield line, parse_json(text)


def _make_example(
    row: Mapping[str, Any], held: Mapping[str, Any], classes: tuple[str, ...], lost: Counter[str]
) -> Example:
    """The example of a row; without media where that was not found or is gone. Raises ValueError."""
    media = row.get("media", "")
    if media:
        match = _MEDIA.fullmatch(media)
        if match is None or match[1] not in held:
            raise ValueError(f"media {media!r} is in no shard")
        members = held[match[1]][0]
        if members is not None and match[2] not in members:
            lost[match[1]] += 1
            media = ""
    return parse_example_row(row, media, classes)


ADAPTER = Adapter("shards of `mirasol data shard`", list_splits, read_split, options=())
