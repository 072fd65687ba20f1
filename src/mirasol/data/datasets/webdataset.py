"""Captioned clips and images as video2dataset and img2dataset download them: samples of files with one key, in tars
(webdataset) or in folders (files).

video2dataset stores failed downloads as samples without media, and a 404 page can be an `.mp4` with status "success",
as webm can: media are recognised by content. img2dataset only counts failed downloads, in its statistics.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, Rows
from mirasol.data.datasets.files import VIDEO, Files
from mirasol.data.datasets.image_text import PROMPT as IMAGE_PROMPT
from mirasol.data.datasets.webvid import PROMPT as CLIP_PROMPT
from mirasol.data.example import Example
from mirasol.data.media_files import IMAGE, read_member, read_tar_index
from mirasol.errors import BadClip, UserError
from mirasol.json_values import parse_json
from mirasol.media.formats.content import detect_content_kind

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_SHARD = re.compile(r"\d+")
_CAPTIONS = (".json", ".txt")
_BEGINNING = 512  # bytes that tell what a file is


@dataclass(frozen=True)
class _Shard:
    """One tar, or one folder of the `files` format. `read(name, limit)` gives a member's first bytes, -1 all."""

    path: str
    members: tuple[str, ...]
    read: Callable[[str, int], bytes]
    cut: str = ""

    def samples(self, media: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
        """(key, {extension: member}) of samples that have files with the extensions `media`.

        A key is all before the first dot of a member's name, its folder included, as webdataset has it. Where that
        gives no media, or media and a caption have a longer name in common, keys with dots are meant ("22.05.mp4").
        """
        samples: dict[str, dict[str, str]] = {}
        for name in self.members:
            folder, slash, base = name.removeprefix("./").rpartition("/")
            key, _, extension = base.partition(".")
            more, dot, last = f".{extension}".rpartition(".")
            samples.setdefault(f"{folder}{slash}{key}", {})[f"{more}{dot}{last.lower()}"] = name
        for key, members in samples.items():
            dotted = _group_dotted(members, media)
            rest = {end: name for end, name in members.items() if end.rpartition(".")[0] not in dotted}
            if rest or not dotted:
                yield key, rest
            yield from ((f"{key}{more}", own) for more, own in dotted.items())


def _group_dotted(members: dict[str, str], media: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The samples among one key's members whose own keys contain dots: what follows the key, e.g. ".05", and their
    members by extension."""
    groups: dict[str, dict[str, str]] = {}
    for extension, name in members.items():
        more, dot, last = extension.rpartition(".")
        if more:
            groups.setdefault(more, {})[f"{dot}{last}"] = name
    with_media = {more for more, own in groups.items() if not own.keys().isdisjoint(media)}
    with_caption = {more for more, own in groups.items() if not own.keys().isdisjoint(_CAPTIONS)}
    if not members.keys().isdisjoint(media):
        chosen = with_media & with_caption
    else:
        chosen = with_media | with_caption if with_media else set()
    return {more: own for more, own in groups.items() if more in chosen}


def guess_split(path: str) -> str:
    """The split that a shard belongs to: by a folder called train, val or test, else train."""
    return next((SPLITS[part] for part in path.lower().split("/")[:-1] if part in SPLITS), "train")


def find_shards(files: Files) -> list[str]:
    """All tars, or where there are none the numbered folders of the `files` format.

    Raises UserError where only parquet files are there.
    """
    tars = [path for path in files.paths if path.lower().endswith(".tar")]
    if tars:
        return tars
    folders = {path.rpartition("/")[0] for path in files.paths if path.endswith(".json") and "/" in path}
    numbered = sorted(folder for folder in folders if _SHARD.fullmatch(folder.rpartition("/")[2]))
    if not numbered and any(path.endswith(".parquet") for path in files.paths):
        raise UserError(f"{files.root}: holds parquet files only: download with output_format=webdataset or files")
    return numbered


def list_splits(files: Files) -> list[str]:
    """The splits of all shards."""
    return sorted({guess_split(f"{path}/") for path in find_shards(files)})


def _read_shards(
    files: Files,
    split: str,
    options: DatasetOptions,
    *,
    extensions: tuple[str, ...],
    prompt: str,
    failures_inside: bool,
) -> Rows:
    """The samples of a split's shards that have a file of one of `extensions` and a caption.

    `failures_inside`: failed downloads are samples without media (video2dataset); else (img2dataset) only the shard's
    `_stats.json` counts them.
    """
    rows = Rows()
    for path in find_shards(files):
        if guess_split(f"{path}/") != split:
            continue
        rows.annotation_files.append(path)
        try:
            shard = _open_shard(files, path)
        except BadClip as error:
            rows.skip("cut short", error.reason, path, rows=_read_statistics(files, path, rows).get("count", 0))
            continue
        _read_shard(files, shard, options.prompt or prompt, extensions, failures_inside, rows)
    return rows


def _open_shard(files: Files, path: str) -> _Shard:
    full = files.root / path
    if full.is_dir():
        names = tuple(p.rpartition("/")[2] for p in files.paths if p.rpartition("/")[0] == path)
        return _Shard(path, names, lambda name, limit: _read_file(full / name, limit))
    index = read_tar_index(full)
    return _Shard(path, tuple(index.members), lambda name, limit: read_member(full, name, limit), index.cut)


def _read_file(path: Path, limit: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(limit)


def _read_shard(
    files: Files, shard: _Shard, prompt: str, extensions: tuple[str, ...], failures_inside: bool, rows: Rows
) -> None:
    seen = 0
    for key, members in shard.samples(extensions):
        seen += 1
        name = next((members[extension] for extension in extensions if extension in members), None)
        place = f"{shard.path}/{key}"
        caption = _read_caption(shard, members, place, rows)
        if caption is None:
            continue
        if name is None:
            rows.skip("missing member", f"no member {' or '.join(extensions)}", place)
            continue
        if detect_content_kind(shard.read(name, _BEGINNING)) == "html":
            rows.skip("not media", f"{name} is an HTML page: its download failed", place)
            continue
        video = place.removesuffix(".tar")
        rows.add(Example(place, f"{shard.path}/{name}", None, None, prompt, caption, video=video), place)
    stated = _read_statistics(files, shard.path, rows)
    lost = max(stated.get("count", seen) - seen, 0)
    if shard.cut:
        rows.skip(
            "cut short", f"shard cut short: {shard.cut}; its first {seen} samples are read", shard.path, rows=lost
        )
    elif lost and failures_inside:
        message = f"{seen} samples, but its stats count {stated['count']}"
        rows.skip("missing member", message, shard.path, rows=lost)
    elif lost:
        reasons = {str(k): v for k, v in stated.get("status_dict", {}).items() if k != "success"}
        message = f"{lost} downloads failed: " + ", ".join(f"{reason} ({n})" for reason, n in reasons.items())
        rows.skip("download failed", message, shard.path, rows=lost)


def _read_caption(shard: _Shard, members: dict[str, str], place: str, rows: Rows) -> str | None:
    """A sample's caption; None, with the reason in `rows`, where it has none to use."""
    facts = {}
    if ".json" in members:
        try:
            facts = parse_json(shard.read(members[".json"], -1))
        except ValueError as error:
            rows.skip("malformed", f"{members['.json']} is not JSON ({error})", place)
            return None
    if not isinstance(facts, dict):
        rows.skip("malformed", f"{members['.json']} must hold an object", place)
        return None
    if facts.get("status", "success") != "success":
        rows.skip("download failed", f"{facts['status']}: {facts.get('error_message')}", place)
        return None
    try:
        text = shard.read(members[".txt"], -1).decode("utf-8") if ".txt" in members else facts.get("caption") or ""
    except UnicodeDecodeError:
        rows.skip("not UTF-8", f"{members['.txt']} is not UTF-8 text", place)
        return None
    if not isinstance(text, str) or not text.strip():
        rows.skip("empty text", "the caption is empty", place)
        return None
    return text.strip()


def _read_statistics(files: Files, path: str, rows: Rows) -> dict:
    """What a shard's `_stats.json` says; empty where there is none to read."""
    file = files.root / f"{path.removesuffix('.tar')}_stats.json"
    if not file.is_file():
        return {}
    try:
        stated = parse_json(file.read_bytes())
    except ValueError as error:
        rows.warn("other counts", f"{file.name} is not JSON ({error})", path)
        return {}
    return stated if isinstance(stated, dict) and isinstance(stated.get("count", 0), int) else {}


def read_clips(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The clips of video2dataset's shards; ids are `{shard}/{key}`."""
    return _read_shards(files, split, options, extensions=VIDEO, prompt=CLIP_PROMPT, failures_inside=True)


def read_images(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The images of img2dataset's shards; ids are `{shard}/{key}`."""
    return _read_shards(files, split, options, extensions=IMAGE, prompt=IMAGE_PROMPT, failures_inside=False)


VIDEO2DATASET = Adapter(
    "video2dataset shards", list_splits, read_clips, options=("prompt",), protocol="captions", ids_are_places=True
)
IMG2DATASET = Adapter(
    "img2dataset shards", list_splits, read_images, options=("prompt",), protocol="captions", ids_are_places=True
)
