"""Whether shards are still what `mirasol data shard` wrote: tars against indices, bytes against hashes."""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mirasol.data.datasets.contract import DatasetSplit, Problem
from mirasol.data.media_files import get_index_path, open_member, scan_tar
from mirasol.data.shards.read import read_manifest
from mirasol.errors import BadClip
from mirasol.files import hash_file
from mirasol.json_values import parse_json

_BLOCK = 2**20  # read at a time: members may be videos of many gigabytes


def find_shard_problems(
    root: Path, datasets: Sequence[DatasetSplit], known: Collection[str] = (), *, hashes: bool = False
) -> list[Problem]:
    """What is wrong with the shards of the datasets, which `read_dataset` gave.

    Every index is compared with its hash in the manifest and with its tar's headers; `hashes` reads every member and
    compares that with its hash. `known`: media whose examples other problems count already. Shards of another length,
    or missing ones, are problems that the datasets have told.
    """
    manifest = read_manifest(root)
    assert manifest is not None
    asked = Counter(example.media for dataset in datasets for example in dataset.examples)
    problems = []
    for dataset in datasets:
        for name, facts in manifest["splits"][dataset.split]["shards"].items():
            path = root / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                continue
            wrong = _find_index_problems(path, name, facts)
            if not wrong:
                wrong = _find_member_problems(path, name, hashes)
            for kind, message, member in wrong:
                media = f"{name}/{member}" if member else name
                cost = asked[media] if media not in known else 0
                problems.append(Problem(kind, message, media, examples=cost))
    return problems


def _find_index_problems(path: Path, name: str, facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(kind, message, member or "") for an index that is not the one that was written."""
    index = get_index_path(path)
    if not index.is_file():
        return []  # told by the dataset: the tar is read without it
    if hash_file(index) != facts["index_sha256"]:
        return [("wrong index", f"{index.name} is not what was written: shard the data set again, or delete it", "")]
    return []


def _find_member_problems(path: Path, name: str, hashes: bool) -> list[tuple[str, str, str]]:
    try:
        there = scan_tar(path).members
    except BadClip as error:
        return [("wrong index", error.reason, "")]
    if not get_index_path(path).is_file():
        return []
    try:
        listed = parse_json(get_index_path(path).read_bytes())["members"]
        entries = [(member, offset, size, digest) for member, (offset, size, digest) in listed.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [("wrong index", "its index file cannot be read", "")]
    problems = []
    for member, offset, size, digest in entries:
        if there.get(member) != (offset, size):
            held = "is missing" if member not in there else "lies elsewhere"
            problems.append(("wrong index", f"{held} in the tar, unlike its index says", member))
        elif hashes and _hash_member(path, member) != digest:
            problems.append(("wrong hash", "its bytes are not those that were written", member))
    return problems


def _hash_member(path: Path, member: str) -> str:
    digest = hashlib.sha256()
    with open_member(path, member) as (stream, size):
        while size and (block := stream.read(min(size, _BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
