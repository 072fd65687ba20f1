"""Images with captions in a csv or tsv, as img2dataset takes them (CC3M's tsv without a header among them).

The images are found below the root by the path in the column `filepath`, or by the last part of their url. Whatever
could be one of several images is left out and listed: a caption must not go to another's image.
"""

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import raise_if_wrong_header, read_csv_header, read_csv_rows
from mirasol.data.datasets.webvid import guess_split
from mirasol.data.example import Example

PROMPT = "describe the image"
FILE_COLUMNS = ("filepath", "file", "image")
CAPTION_COLUMNS = ("caption", "title", "text")


def _detect_format(path: Path) -> tuple[str, str, bool] | None:
    """(column of the caption, column of the image, whether it has a header); None for no such table."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        return None
    header = read_csv_header(path, _choose_delimiter(path))
    caption = next((name for name in CAPTION_COLUMNS if name in header), None)
    image = next((name for name in (*FILE_COLUMNS, "url") if name in header), None)
    if caption is not None and image is not None:
        return caption, image, True
    if suffix == ".tsv" and len(header) == 2 and "://" in header[1]:
        return "caption", "url", False
    return None


def _choose_delimiter(path: Path) -> str | None:
    return "\t" if path.suffix.lower() == ".tsv" else None


def list_splits(files: Files) -> list[str]:
    """The splits that the tables' names tell. Raises AnnotationError where no table there is one of captions."""
    tables = [path for path in files.annotation_paths if path.suffix.lower() in (".csv", ".tsv")]
    found = sorted({guess_split(path) for path in tables if _detect_format(path)})
    if tables and not found:
        raise_if_wrong_header(
            read_csv_header(tables[0], _choose_delimiter(tables[0])), ("caption", "filepath"), files.shown(tables[0])
        )
    return found


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The captions of a split; ids are `{table}:{line}`."""
    rows = Rows()
    tables = {
        files.shown(path): path
        for path in files.annotation_paths
        if guess_split(path) == split and _detect_format(path)
    }
    rows.annotation_files += tables
    pairs = [(shown, *pair) for shown, path in tables.items() for pair in _read_pairs(path, shown, rows)]
    images = _Images(files, (image for *_, image in pairs))
    prompt = options.prompt or PROMPT
    for shown, line, caption, image in pairs:
        if not caption:
            rows.skip("empty text", "the caption is empty", shown, line)
            continue
        media, others = images.find(image, tables[shown].parent)
        if others:
            rows.skip("ambiguous name", f"{image}: {others}: which image is meant is not known", shown, line)
            continue
        id = f"{tables[shown].stem}:{line}"
        rows.add(Example(id, media, None, None, prompt, caption, video=image), shown, line)
    return rows


def _read_pairs(path: Path, shown: str, rows: Rows) -> Iterator[tuple[int, str, str]]:
    known = _detect_format(path)
    assert known is not None
    caption, image, header = known
    # CC3M's tsv, the one without a header, quotes nothing: a caption may begin with a quote that does not end.
    table = read_csv_rows(
        path, shown, rows, (caption, image), header=header, delimiter=_choose_delimiter(path), quoted=header
    )
    for line, row in table:
        yield line, row[caption].strip(), row[image].strip()


class _Images:
    """Finds the images that a split's tables name, `names`."""

    def __init__(self, files: Files, names: Iterable[str]):
        self.files = files
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in files.paths:
            self._by_name[path.rpartition("/")[2]].append(path)
        self._urls: dict[str, set[str]] = defaultdict(set)  # by their last part, of those that some file could be
        for name in names:
            last = _find_last_part(name)
            if "://" in name and last in self._by_name:
                self._urls[last].add(name)

    def find(self, name: str, folder: Path) -> tuple[str, str]:
        """(the image's path, "" where it is not there; what else it could be, "" where nothing).

        A path counts from the root or from its table's `folder`, or is the end of one file's path; a url goes by its
        last part.
        """
        last = _find_last_part(name)
        found = self._by_name.get(last, [])
        if "://" in name:
            urls = len(self._urls[last]) if found else 0
            if urls > 1:
                return "", f"{last!r} is the last part of {urls} urls (give a column filepath)"
        else:
            for path in (name, posixpath.normpath(self.files.shown(folder / name))):
                if path in self.files.known:
                    return path, ""
            found = [path for path in found if f"/{path}".endswith(f"/{name}")]
        if len(found) > 1:
            return "", f"{len(found)} files are called so"
        return (found[0] if found else ""), ""


def _find_last_part(name: str) -> str:
    if "://" not in name:
        return name.rpartition("/")[2]
    path = name.partition("#")[0].partition("?")[0]
    return (unquote(path) if "%" in path else path).rpartition("/")[2]


ADAPTER = Adapter(
    "image-text csv",
    list_splits,
    read_split,
    options=("annotations", "prompt"),
    protocol="captions",
    ids_are_places=True,
)
