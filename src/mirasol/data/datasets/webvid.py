"""WebVid-like csv (Bain et al., ICCV 2021): captions by `videoid`; and VideoCC's, with windows of YouTube videos."""

import re
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import is_whole_number, raise_if_wrong_header, read_csv_header, read_csv_rows
from mirasol.data.datasets.windows import find_segment
from mirasol.data.example import Example

PROMPT = "describe the clip"
COLUMNS = ("videoid", "name")
VIDEO_CC = ("video", "start", "end", "caption")
VIDEO_CC_PATTERNS = ("{id}_{start_ms}_{end_ms}", "{id}_{start:06d}_{end:06d}", "{id}_{start:06d}", "{id}")
MICROSECONDS = 1_000_000
_YOUTUBE_ID = re.compile(r"(?:.*[=/])?([\w-]{11})")


def guess_split(path: Path) -> str:
    """The split that a file's name tells: val or dev, test, else train."""
    name = path.stem.lower()
    if re.search(r"val|dev", name):
        return "validation"
    return "test" if "test" in name else "train"


def find_webvid_files(files: Files) -> list[Path]:
    """All csv files that have WebVid's columns. Raises AnnotationError where none of those there has them."""
    tables = [path for path in files.annotation_paths if path.suffix.lower() == ".csv"]
    found = [path for path in tables if set(COLUMNS) <= set(read_csv_header(path))]
    if tables and not found:
        raise_if_wrong_header(read_csv_header(tables[0]), COLUMNS, files.shown(tables[0]))
    return found


def list_webvid_splits(files: Files) -> list[str]:
    """The splits that the files' names tell."""
    return sorted({guess_split(path) for path in find_webvid_files(files)})


def read_webvid(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The captions of a split; ids are `videoid`. Media: `videos/{page_dir}/{videoid}.mp4`, or anywhere by its name."""
    rows = Rows()
    for path in find_webvid_files(files):
        if guess_split(path) != split:
            continue
        shown = files.shown(path)
        rows.annotation_files.append(shown)
        for line, row in read_csv_rows(path, shown, rows, COLUMNS, optional=("page_dir",)):
            id, caption = row["videoid"].strip(), row["name"].strip()
            if not caption or not id:
                rows.skip("empty text", "the caption or the videoid is empty", shown, line)
                continue
            media = files.media([id], row.get("page_dir", "").split("/")) or ""
            rows.add(Example(id, media, None, None, options.prompt or PROMPT, caption, video=id), shown, line)
    return rows


def find_video_cc_files(files: Files) -> list[Path]:
    """All csv files whose name has "video_cc" or "videocc" in it."""
    return [p for p in files.annotation_paths if p.suffix.lower() == ".csv" and re.search("video_?cc", p.stem.lower())]


def list_video_cc_splits(files: Files) -> list[str]:
    """The splits that the files' names tell."""
    return sorted({guess_split(path) for path in find_video_cc_files(files)})


def read_video_cc(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The captions of a split; ids are `{id}_{start in milliseconds}`. Media: cut clips, or whole videos `{id}`."""
    rows = Rows()
    for path in find_video_cc_files(files):
        if guess_split(path) != split:
            continue
        shown = files.shown(path)
        rows.annotation_files.append(shown)
        for line, row in read_csv_rows(path, shown, rows, VIDEO_CC, header=False):
            id, stamps, caption = (
                _YOUTUBE_ID.fullmatch(row["video"]),
                (row["start"], row["end"]),
                row["caption"].strip(),
            )
            if line == 1 and not any(letter.isnumeric() for stamp in stamps for letter in stamp):
                continue  # a header
            if id is None or not all(map(is_whole_number, stamps)) or int(stamps[0]) >= int(stamps[1]):
                message = "expected video, start and end in microseconds, caption; found " + ",".join(row.values())[:80]
                rows.skip("malformed", message, shown, line)
            elif not caption:
                rows.skip("empty text", "the caption is empty", shown, line)
            else:
                rows.add(
                    _make_example(files, options, rows, id[1], int(stamps[0]), int(stamps[1]), caption), shown, line
                )
    return rows


def _make_example(
    files: Files, options: DatasetOptions, rows: Rows, id: str, start: int, end: int, caption: str
) -> Example:
    window = start / MICROSECONDS, end / MICROSECONDS
    place = find_segment(files, options, VIDEO_CC_PATTERNS, id, window, rows)
    return Example(f"{id}_{start // 1000}", *place, options.prompt or PROMPT, caption, video=id)


WEBVID = Adapter(
    "WebVid-like csv", list_webvid_splits, read_webvid, options=("annotations", "prompt"), protocol="captions"
)
VIDEO_CC_ADAPTER = Adapter(
    "VideoCC", list_video_cc_splits, read_video_cc, options=("annotations", "prompt", "pattern"), protocol="captions"
)  # fmt: skip
