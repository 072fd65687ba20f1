"""The files below a data set's root, walked once and found by name."""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from mirasol.errors import UserError

VIDEO = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".3gp")
AUDIO = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus")


class Files:
    """All files below `root`, which links may lead out of: they are the user's own. `annotations`:
    see `DatasetOptions`.

    Paths are strings relative to `root`, with "/". Raises UserError where a folder is missing.
    """

    def __init__(self, root: Path, annotations: str | None = None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such data folder")
        self.annotations = annotations
        if annotations is not None and not self.annotation_root.exists():
            raise UserError(f"annotations={annotations}: no such file or folder")

    @property
    def annotation_root(self) -> Path:
        """The folder (or file) that annotation files are looked for in."""
        if self.annotations is None:
            return self.root
        given = Path(self.annotations)
        return given if given.exists() else self.root / given

    @cached_property
    def paths(self) -> list[str]:
        """Every file, sorted."""
        return _walk(self.root)

    @cached_property
    def known(self) -> frozenset[str]:
        """`paths`, to ask whether a file is there."""
        return frozenset(self.paths)

    @cached_property
    def annotation_paths(self) -> list[Path]:
        """Every file that may be an annotation file, those nearest to the root first."""
        if self.annotations is None:
            below = [self.root / path for path in self.paths]
        elif self.annotation_root.is_file():
            return [self.annotation_root]
        else:
            below = [self.annotation_root / path for path in _walk(self.annotation_root)]
        return sorted(below, key=lambda path: (len(path.parts), path))

    def annotation(self, *names: str) -> Path | None:
        """The annotation file of one of these names: the first name that exists, the one nearest to the root.

        Raises UserError for two of one name at the same depth: the user must choose.
        """
        by_name = self._annotations_by_name
        for name in names:
            found = by_name.get(name.lower(), [])
            if len(found) > 1 and len(found[0].parts) == len(found[1].parts):
                raise UserError(f"{found[0]} and {found[1]}: two annotation files: choose one with annotations=FOLDER")
            if found:
                return found[0]
        return None

    @cached_property
    def _annotations_by_name(self) -> dict[str, list[Path]]:
        by_name: dict[str, list[Path]] = {}
        for path in self.annotation_paths:
            by_name.setdefault(path.name.lower(), []).append(path)
        return by_name

    def shown(self, path: Path) -> str:
        """An annotation file as messages name it: relative to the root if it is below it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Media by name without extension (its case matters: ids differ in it)."""
        by_stem: dict[str, list[str]] = {}
        for path in self.paths:
            stem, dot, extension = path.rpartition("/")[2].rpartition(".")
            if dot and f".{extension.lower()}" in VIDEO + AUDIO:
                by_stem.setdefault(stem, []).append(path)
        return by_stem

    @cached_property
    def youtube_ids(self) -> frozenset[str]:
        """What media names begin with, as long as a YouTube id is, after a `Y` too (as PANNs writes them)."""
        return frozenset(part for stem in self._by_stem for part in (stem[:11], stem[1:12]))

    def media(self, stems: Iterable[str], folders: Iterable[str] = ()) -> str | None:
        """The media file of the first of `stems` that has one, None where none has.

        Of several files of one name a video is preferred to a sound file, then one in a folder with one of the names
        `folders`.
        """
        for stem in stems:
            found = self._by_stem.get(stem)
            if found is None:
                continue
            if len(found) > 1:
                wanted = set(folders)
                videos = [path for path in found if path.lower().endswith(VIDEO)] or found
                return max(videos, key=lambda path: len(wanted.intersection(path.split("/")[:-1])))
            return found[0]
        return None

    def media_in(self, folder: str) -> list[str]:
        """All media files directly in a folder of this name."""
        return [p for paths in self._by_stem.values() for p in paths if p.split("/")[-2:-1] == [folder]]


def _walk(root: Path) -> list[str]:
    paths: list[str] = []
    entered = {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(names):
            # A link may lead back above itself: a folder is entered once, by the first name that leads there.
            real = os.path.realpath(os.path.join(folder, name)) if os.path.islink(os.path.join(folder, name)) else None
            if real is None or real not in entered:
                kept.append(name)
                if real is not None:
                    entered.add(real)
        names[:] = kept
        prefix = os.path.relpath(folder, root).replace(os.sep, "/")
        paths += files if prefix == "." else [f"{prefix}/{name}" for name in files]
    return sorted(paths)
