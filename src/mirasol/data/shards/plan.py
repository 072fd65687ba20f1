"""Which clips go into which shard, and how much that is: decided before anything is written."""

import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import DatasetSplit
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.registry import find_adapter, list_listed_splits, read_listed_split, select_usable_examples
from mirasol.data.media_files import get_media_size
from mirasol.data.shards.format import FORMAT, Sample, ShardJob, make_example_row, read_finished_index
from mirasol.errors import BadClip, UserError
from mirasol.media.transcode import Reencoding


@dataclass(frozen=True)
class Sharding:
    """How a data set is cut into shards.

    A shard holds at most `shard_bytes` of media, measured before re-encoding, and at most
    `clips_per_shard`; a medium of more than `shard_bytes` is a shard of its own. `reencode`: None keeps the media's
    own bytes.
    """

    shard_bytes: int = 500_000_000
    clips_per_shard: int = 10_000
    reencode: Reencoding | None = None

    def __post_init__(self):
        for name in ("shard_bytes", "clips_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class ShardPlan:
    """What will be written, decided to the last member.

    jobs: the shards of each split, in order; sizes: bytes of every medium by split, as it is on disk
    """

    root: Path
    out: Path
    options: DatasetOptions
    sharding: Sharding
    datasets: tuple[DatasetSplit, ...]
    jobs: dict[str, list[ShardJob]]
    sizes: dict[str, dict[str, int]]

    @property
    def bytes(self) -> int:
        """Bytes of media in all shards, by their size on disk; a video in two splits counts twice."""
        return sum(sum(of_split.values()) for of_split in self.sizes.values())

    @property
    def larger(self) -> dict[str, int]:
        """Media larger than a shard may be, each a shard of its own, with their bytes."""
        limit = self.sharding.shard_bytes
        return {media: size for sizes in self.sizes.values() for media, size in sizes.items() if size > limit}

    def count_bytes_left(self) -> int:
        """Bytes of media in the shards that are not finished yet."""
        return sum(
            self.sizes[split][sample.media]
            for split, jobs in self.jobs.items()
            for job in jobs
            if read_finished_index(job.path) is None
            for sample in job.samples
        )

    def find_free_bytes(self) -> int:
        """Bytes that the disk of `out` has room for."""
        there = next(path for path in (self.out, *self.out.parents) if path.exists())
        return shutil.disk_usage(there).free

    def settings(self) -> dict[str, Any]:
        """All that determines the bytes: only shards of the same plan are continued."""
        digest = hashlib.sha256()
        for dataset in self.datasets:
            digest.update(json.dumps([dataset.split, dataset.facts, dataset.classes]).encode() + b"\n")
            for example in dataset.annotated:
                digest.update(json.dumps([example.media, make_example_row(example, dataset.classes)]).encode() + b"\n")
            for media, size in self.sizes[dataset.split].items():
                digest.update(json.dumps([media, size]).encode() + b"\n")
        reencode = self.sharding.reencode
        return {
            "format": FORMAT,
            "data set": self.datasets[0].name,
            "splits": [dataset.split for dataset in self.datasets],
            "options": self.options.list_changed(),
            "shard_bytes": self.sharding.shard_bytes,
            "clips_per_shard": self.sharding.clips_per_shard,
            "reencode": str(reencode) if reencode is not None else None,
            "PyAV": importlib.metadata.version("av") if reencode is not None else None,
            "content of the data set": digest.hexdigest(),
            "shards": {split: len(jobs) for split, jobs in self.jobs.items()},
            "bytes of media": self.bytes,
        }


def plan_shards(
    name: str,
    root: Path,
    out: Path,
    split: str | None = None,
    options: DatasetOptions = DatasetOptions(),  # noqa: B008 - frozen
    sharding: Sharding = Sharding(),
    *,
    on_bad_clip: Literal["error", "skip"] = "error",
) -> ShardPlan:
    """Reads the annotations, and the sizes of the media, of a data set or of one split; writes nothing.

    Raises:
        UserError: an unknown data set, split, option; `out` within the data set; with `on_bad_clip="error"`
            annotations that cannot be used.
    """
    root, out = Path(root).absolute(), Path(out).absolute()  # other processes may work elsewhere
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out}: lies within the data set {root}: give a folder outside of it")
    adapter = find_adapter(name, options)
    files = Files(root, options.annotations)
    known = list_listed_splits(name, files)
    chosen = [split] if split is not None else [s for s in known if s not in adapter.overlapping] or known
    datasets = [read_listed_split(name, files, one, options) for one in chosen]
    for dataset in datasets:
        select_usable_examples(dataset, on_bad_clip)
    sizes = {dataset.split: _find_sizes(dataset) for dataset in datasets}
    jobs = {dataset.split: _make_jobs(dataset, out, sharding, sizes[dataset.split]) for dataset in datasets}
    return ShardPlan(root, out, options, sharding, tuple(datasets), jobs, sizes)


def _find_sizes(dataset: DatasetSplit) -> dict[str, int]:
    """Bytes of each medium, in the order of its first example."""
    sizes = {}
    for media in dict.fromkeys(example.media for example in dataset.examples):
        try:
            sizes[media] = get_media_size(dataset.root, media)
        except BadClip:
            sizes[media] = 0  # found to be bad when its shard is written
    return sizes


def _make_jobs(dataset: DatasetSplit, out: Path, sharding: Sharding, sizes: dict[str, int]) -> list[ShardJob]:
    """Which clips go into which shard: each medium once, in the order of its first example."""
    rows: dict[str, list[dict[str, Any]]] = {media: [] for media in sizes}
    for example in dataset.examples:
        rows[example.media].append(make_example_row(example, dataset.classes))
    shards: list[list[Sample]] = [[]]
    filled = 0
    for number, (media, size) in enumerate(sizes.items()):
        if shards[-1] and (filled + size > sharding.shard_bytes or len(shards[-1]) >= sharding.clips_per_shard):
            shards.append([])
            filled = 0
        shards[-1].append(Sample(f"{number:09d}", media, tuple(rows[media])))
        filled += size
    reencode = str(sharding.reencode) if sharding.reencode is not None else ""
    return [
        ShardJob(str(dataset.root), str(out), f"{dataset.split}/{number:05d}.tar", tuple(samples), reencode)
        for number, samples in enumerate(shards)
    ]
