"""What the data sets of classes share: class lists, and the names that ten-second clips of YouTube videos go by."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import read_names
from mirasol.errors import UserError


@dataclass(frozen=True)
class ClassList:
    """The class names in the order of their index."""

    names: tuple[str, ...]

    @cached_property
    def _known(self) -> dict[str, str]:
        # Some lists write blanks as underscores.
        return {**{name.replace(" ", "_"): name for name in self.names}, **{name: name for name in self.names}}

    def find(self, label: str) -> str | None:
        """The class that a label names, None where it names none."""
        return self._known.get(label) or self._known.get(label.strip())


def find_class_list(files: Files, options: DatasetOptions, *names: str) -> tuple[str, ...] | None:
    """The class list that the user names, or the annotation file with one of `names`; None without one."""
    if options.class_list is not None:
        path = Path(options.class_list)
        path = path if path.is_file() else files.root / path
        if not path.is_file():
            raise UserError(
                f"class_list={options.class_list}: no such file: give a text file with one class name per line"
            )
        return read_names(path, str(options.class_list))
    found = files.annotation(*names) if names else None
    return read_names(found, files.shown(found)) if found is not None else None


def _format_clip_stems(patterns: Iterable[str], id: str, start: float, end: float) -> Iterator[str]:
    """A clip's file names without extension. Raises UserError for a pattern with a field that clips do not have.

    `start` and `end` are the seconds as the annotation has them, `start_ms` and `end_ms` milliseconds.
    """
    fields = {"id": id, "start": int(start), "end": int(end), "start_ms": int(start * 1000), "end_ms": int(end * 1000)}
    for pattern in patterns:
        try:
            yield pattern.format_map(fields)
        except (KeyError, ValueError, IndexError) as error:
            known = ", ".join(fields)
            raise UserError(f"pattern={pattern!r}: its fields are {known}, e.g. '{{id}}_{{start:06d}}'") from error


def find_clip_media(
    files: Files,
    options: DatasetOptions,
    patterns: Iterable[str],
    id: str,
    window: tuple[float, float],
    folders: Iterable[str],
) -> str | None:
    """The file of a clip that was cut out already, by the user's pattern or else by the first known one that fits."""
    if options.pattern is not None:
        return files.media(_format_clip_stems([options.pattern], id, *window), folders)
    # Most lists name many clips that are gone: nothing is spelled out for those.
    return files.media(_format_clip_stems(patterns, id, *window), folders) if id in files.youtube_ids else None
