"""Images with captions in a csv or tsv, as img2dataset takes them (CC3M's tsv without a header among them).

The images lie below the root under the name in the column `filepath`, or under the last part of their url.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mirasol.data.example import Example
from mirasol.data.sources.contract import Adapter, Options, Rows
from mirasol.data.sources.files import Files
from mirasol.data.sources.tables import csv_header, csv_rows
from mirasol.data.sources.webvid import split_of

PROMPT = "describe the image"
FILE_COLUMNS = ("filepath", "file", "image")
CAPTION_COLUMNS = ("caption", "title", "text")


def _format(path: Path) -> tuple[str, str, bool] | None:
    """(column of the caption, column of the image, whether it has a header); None for no such table."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        return None
    header = csv_header(path, _delimiter(path))
    caption = next((name for name in CAPTION_COLUMNS if name in header), None)
    image = next((name for name in (*FILE_COLUMNS, "url") if name in header), None)
    if caption is not None and image is not None:
        return caption, image, True
    if suffix == ".tsv" and len(header) == 2 and "://" in header[1]:
        return "caption", "url", False
    return None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def splits(files: Files) -> list[str]:
    """The splits that the tables' names tell."""
    return sorted({split_of(path) for path in files.annotation_paths if _format(path)})


def read(files: Files, split: str, options: Options) -> Rows:
    """The captions of a split; ids are `{table}:{line}`."""
    rows = Rows()
    by_name = {path.rpartition("/")[2]: path for path in reversed(files.paths)}
    for path in files.annotation_paths:
        if split_of(path) != split or _format(path) is None:
            continue
        shown = files.shown(path)
        rows.annotation_files.append(shown)
        for line, caption, image in _pairs(path, shown, rows):
            if not caption:
                rows.skip("empty text", "the caption is empty", shown, line)
                continue
            name = unquote(urlsplit(image).path if "://" in image else image)
            media = name if "://" not in image and name in files.known else by_name.get(name.rpartition("/")[2], "")
            prompt = options.prompt or PROMPT
            rows.add(Example(f"{path.stem}:{line}", media, None, None, prompt, caption, video=image), shown, line)
    return rows


def _pairs(path: Path, shown: str, rows: Rows) -> Iterator[tuple[int, str, str]]:
    known = _format(path)
    assert known is not None
    caption, image, header = known
    for line, row in csv_rows(path, shown, rows, (caption, image), header=header, delimiter=_delimiter(path)):
        yield line, row[caption].strip(), row[image].strip()


ADAPTER = Adapter("image-text csv", splits, read, options=("annotations", "prompt"), protocol="captions")
