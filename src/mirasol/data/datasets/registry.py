"""Every data set by the name that commands and recipes call it, and how a split of one is read."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets import (
    activitynet_qa,
    audioset,
    epic_sounds,
    folder,
    image_text,
    kinetics_sound,
    msrvtt_qa,
    nextqa,
    vggsound,
    webdataset,
    webvid,
)
from mirasol.data.datasets.contract import Adapter, DatasetSplit, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.windows import recognise_cut_files
from mirasol.data.example import Example
from mirasol.data.shards.read import ADAPTER as SHARDS
from mirasol.errors import UserError

DATASETS: dict[str, Adapter] = {
    "folder": folder.ADAPTER,
    "msrvtt_qa": msrvtt_qa.ADAPTER,
    "activitynet_qa": activitynet_qa.ADAPTER,
    "nextqa_mc": nextqa.MULTIPLE_CHOICE,
    "nextqa_oe": nextqa.OPEN_ENDED,
    "vggsound": vggsound.ADAPTER,
    "epic_sounds": epic_sounds.ADAPTER,
    "kinetics_sound": kinetics_sound.ADAPTER,
    "audioset": audioset.ADAPTER,
    "webvid": webvid.WEBVID,
    "videocc": webvid.VIDEO_CC_ADAPTER,
    "video2dataset": webdataset.VIDEO2DATASET,
    "image_text": image_text.ADAPTER,
    "img2dataset": webdataset.IMG2DATASET,
    "shards": SHARDS,
}
# Other words for a split, for data sets that do not have the word itself.
SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation", "test": "eval"}
ANY = DatasetOptions()


def list_splits(name: str, root: Path, options: DatasetOptions = ANY) -> list[str]:
    """The splits that a data set's files below `root` offer. Raises UserError where there are none."""
    find_adapter(name, options)
    return list_listed_splits(name, Files(root, options.annotations))


def read_dataset(
    name: str, root: Path, split: str, options: DatasetOptions = ANY, open_media: bool = True
) -> DatasetSplit:
    """One split of the data set `name` (a key of `DATASETS`) below `root`.

    Whatever is wrong in single rows is in the result's `problems`, and so is media that was not found; nothing is left
    out unsaid. `val` means `validation`. Files whose names do not say whether they were cut out are opened for their
    length (`recognise_cut_files`), unless `open_media` is False: for those who need the texts alone.

    Raises:
        UserError: an unknown data set, split or option; AnnotationError, one of them, where a file cannot be read on.
    """
    find_adapter(name, options)  # reports a mistyped name before a large folder is walked
    return read_listed_split(name, Files(root, options.annotations), split, options, open_media)


def read_listed_split(
    name: str, files: Files, split: str, options: DatasetOptions = ANY, open_media: bool = True
) -> DatasetSplit:
    """As `read_dataset`, of files that were listed already."""
    adapter = find_adapter(name, options)
    known = list_listed_splits(name, files)
    if split not in known and SPLIT_NAMES.get(split) in known:
        split = SPLIT_NAMES[split]
    if split not in known:
        raise UserError(f"{files.root} has no split {split!r} of {name}; there are: {', '.join(known)}")
    rows = adapter.read(files, split, options)
    recognise_cut_files(files, rows, open_media)
    published = rows.published or adapter.published.get(split, Published())
    if not rows.examples and not rows.reasons and name != "folder":
        rows.skip("no examples", "contains no examples", ", ".join(rows.annotation_files), rows=0)
    if rows.retold is None:
        _list_missing(rows)
        _compare_counts(rows, published)
    return DatasetSplit(
        name=name if rows.retold is None else rows.retold.name,
        root=files.root,
        split=split,
        protocol=adapter.protocol if rows.retold is None else rows.retold.protocol,
        annotated=tuple(rows.examples),
        problems=tuple(rows.problems),
        reasons=dict(rows.reasons),
        classes=rows.classes,
        published=published,
        facts={**({"classes": len(rows.classes)} if rows.classes else {}), **options.list_changed(), **rows.facts},
        annotation_files=tuple(rows.annotation_files),
        read_as=name,
        places=rows.places,
    )


def find_published(name: str, split: str) -> Published:
    """A split's counts as its makers publish them, without reading its files; none where they depend on them."""
    adapter = DATASETS.get(name)
    return Published() if adapter is None else adapter.published.get(split, Published())


def locate_examples(name: str, root: Path, split: str, options: DatasetOptions, ids: Collection[str]) -> dict[str, str]:
    """The places ("FILE, line N") of the annotations with these ids; a split's files are read once more for it, unless
    its ids say it."""
    if find_adapter(name, options).ids_are_places:
        return {id: id for id in ids}
    found = read_dataset(name, root, split, options).locate(ids)
    return {id: file if line is None else f"{file}, line {line}" for id, (file, line) in found.items()}


def select_usable_examples(dataset: DatasetSplit, on_problem: str = "error") -> list[Example]:
    """The examples to train or score with, those whose media was found.

    `on_problem="error"`: UserError at the first problem that costs examples; "skip": they are left out (and counted in
    `dataset.counts`). UserError also where nothing is left.
    """
    costly = [problem for problem in dataset.problems if problem.severity == "error"]
    if costly and on_problem == "error":
        counts = dataset.counts
        raise UserError(
            f"{dataset.name} {dataset.split}: {counts.n_annotated - counts.n_usable} of {counts.n_annotated} annotated "
            f"examples cannot be used, the first: {costly[0]}; see them all with `mirasol data check`, or skip them"
        )
    if not dataset.examples:
        reason = f", the first problem: {costly[0]}" if costly else ""
        raise UserError(f"{dataset.root}: no usable example in split {dataset.split!r} of {dataset.name}{reason}")
    return list(dataset.examples)


def find_adapter(name: str, options: DatasetOptions) -> Adapter:
    """The adapter of a data set. Raises UserError for an unknown name, and for an option that it does not have."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r} is not known: choose {', '.join(DATASETS)}")
    adapter = DATASETS[name]
    for option in options.list_changed():
        if option not in adapter.options:
            can = ", ".join(adapter.options) or "none"
            raise UserError(f"{option}={getattr(options, option)}: {name} does not have this option; it has {can}")
    return adapter


def list_listed_splits(name: str, files: Files) -> list[str]:
    """As `list_splits`, of files that were listed already."""
    known = DATASETS[name].splits(files)
    if not known:
        raise UserError(f"{files.annotation_root}: no annotation file of {name}: see its section in docs/datasets.md")
    return known


def _list_missing(rows: Rows) -> None:
    """One problem for each video that has annotations and no media."""
    missing = Counter(example.video for example in rows.examples if not example.media)
    for video, count in missing.items():
        questions = f" ({count} examples)" if count > 1 else ""
        place = f"; asked for in {rows.missing_at[video]}" if video in rows.missing_at else ""
        rows.skip("missing media", f"no media file of {video!r} was found{questions}{place}", video, rows=count)


def _compare_counts(rows: Rows, published: Published) -> None:
    """Warns where a split's counts are not the published ones."""
    count, files = len(rows.examples), ", ".join(rows.annotation_files)
    if published.examples is not None and count != published.examples:
        rows.warn("other counts", f"{count} examples, {published.examples} are published", files)
    elif published.types:
        found = Counter(example.question_type for example in rows.examples)
        other = [f"{kind} {found[kind]} (published {n})" for kind, n in published.types.items() if found[kind] != n]
        if other:
            rows.warn("other counts", f"counts by type: {', '.join(other)}", files)
