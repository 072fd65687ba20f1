"""The bytes behind an example's `media`: a file below the root, or a member of a tar, `00000.tar/00000003.mp4`."""

import contextlib
import functools
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mirasol.errors import BadClip
from mirasol.json_values import parse_json

IMAGE = (".jpg", ".jpeg", ".png", ".webp")
_MEMBER = re.compile(r"(.+?\.tar)/(.+)", re.IGNORECASE)
_BLOCK = 512
_NAME = 100  # bytes of a name in the header of a tar's member
_COPIED = 2**20
_EXTENSIONS = {
    "matroska": (".mkv", ".webm"),
    "mp4": (".mp4", ".mov", ".m4v", ".m4a", ".3gp"),
    "avi": (".avi",),
    "jpeg": (".jpg", ".jpeg"),
    "png": (".png",),
    "webp": (".webp",),
}


def has_wrong_extension(name: str, kind: str) -> bool:
    """Whether a file's extension says another kind than its content."""
    extensions = _EXTENSIONS.get(kind)
    return extensions is not None and not name.lower().endswith(extensions)


def is_image(media: str) -> bool:
    """Whether a media file is a still image, by its name; what it holds is found out when it is read."""
    return media.lower().endswith(IMAGE)


@dataclass(frozen=True)
class TarIndex:
    """Where each member's bytes lie, in the tar's order: name → (offset, size).

    cut: why the tar ends early, or ""; written: known from an index file, not from the tar's own headers
    """

    members: dict[str, tuple[int, int]]
    cut: str
    written: bool = False


def get_index_path(tar: Path) -> Path:
    """The index file next to a tar, in which `mirasol data shard` records the offsets of its members."""
    return tar.with_suffix(".index.json")


def read_tar_index(path: Path) -> TarIndex:
    """The offsets of a tar's members, from the index file next to it or, if that belongs to another tar, from the tar.

    A tar that was cut short gives its complete members. Raises BadClip where there is no tar.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise BadClip(path, "no such file") from error
    return _read_tar_index(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_tar_index(path: Path, size: int, changed: int) -> TarIndex:
    written = _read_written_index(path, size)
    return TarIndex(written, "", True) if written is not None else scan_tar(path)


def _read_written_index(path: Path, size: int) -> dict[str, tuple[int, int]] | None:
    """The members that the index file of a tar of `size` bytes tells; None where there is none, or one of another."""
    try:
        index = parse_json(get_index_path(path).read_bytes())
        if index["tar"] != path.name or index["bytes"] != size:
            return None
        return {name: (int(offset), int(length)) for name, (offset, length, _) in index["members"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def scan_tar(path: Path) -> TarIndex:
    """As `read_tar_index`, from the tar's own headers. Reads nothing else of it."""
    size = path.stat().st_size
    members: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.offset_data + member.size > size:
                    return TarIndex(members, f"member {member.name} ends behind the end of the file")
                if member.isreg():
                    members[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        if not members:
            raise BadClip(path, f"not a tar file that can be read ({error})") from error
        return TarIndex(members, str(error))
    return TarIndex(members, "" if size >= end + _BLOCK else "it ends without the mark that ends a tar")


def split_member_path(media: str) -> tuple[str, str] | None:
    """(tar, member) of a media path that goes through a tar, else None."""
    match = _MEMBER.fullmatch(media)
    return (match[1], match[2]) if match else None


def find_stored_file(root: Path, media: str) -> Path:
    """The file on disk that holds the media: itself, or its tar."""
    path = root / media
    parts = split_member_path(media)
    return root / parts[0] if parts is not None and not path.exists() else path


def read_member(path: Path, name: str, limit: int = -1) -> bytes:
    """The bytes of a tar's member, the first `limit` of them where that is not negative. Raises BadClip.

    No other part of the tar is read, and none is left open.
    """
    with open_member(path, name) as (stream, size):
        wanted = size if limit < 0 else min(limit, size)
        content = stream.read(wanted)
    if len(content) < wanted:
        raise BadClip(path, f"cut short: member {name} is not all there")
    return content


@contextlib.contextmanager
def open_member(path: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """The tar, open where the member's bytes begin, and how many they are. Raises BadClip."""
    index = read_tar_index(path)
    try:
        offset, size = index.members[name]
    except KeyError as error:
        raise BadClip(path, f"has no member {name}{f' ({index.cut})' if index.cut else ''}") from error
    with path.open("rb") as stream:
        if index.written:
            # The name is in the header just before: the index of another tar would silently give other media.
            stream.seek(offset - _BLOCK)
            if stream.read(_BLOCK)[:_NAME].rstrip(b"\0") != name.encode():
                raise BadClip(path, f"member {name} is not where its index says: see `mirasol data check shards`")
        else:
            stream.seek(offset)
        yield stream, size


def get_media_size(root: Path, media: str) -> int:
    """Bytes of a media file, or of a tar's member. Raises BadClip where it is not there."""
    stored = find_stored_file(root, media)
    parts = split_member_path(media)
    if parts is not None and stored != root / media:
        with open_member(stored, parts[1]) as (_, size):
            return size
    try:
        return stored.stat().st_size
    except OSError as error:
        raise BadClip(stored, "no such file") from error


@contextlib.contextmanager
def open_media_file(root: Path, media: str) -> Iterator[Path]:
    """A path under which the media can be read; a tar's member is copied out for as long as the context lasts.

    Raises BadClip where it is not there.
    """
    stored = find_stored_file(root, media)
    parts = split_member_path(media)
    if parts is None or stored == root / media:
        yield stored
        return
    handle, name = tempfile.mkstemp(prefix="mirasol-", suffix=os.path.splitext(parts[1])[1])
    try:
        with os.fdopen(handle, "wb") as copy, open_member(stored, parts[1]) as (stream, size):
            while size:
                block = stream.read(min(size, _COPIED))
                if not block:
                    raise BadClip(stored, f"cut short: member {parts[1]} is not all there")
                copy.write(block)
                size -= len(block)
        yield Path(name)
    finally:
        os.unlink(name)
