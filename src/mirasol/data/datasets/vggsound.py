"""VGG-Sound (Chen et al., ICASSP 2020): ten-second clips of 309 sound classes; the class name is the target."""

from collections.abc import Iterator
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.classes import ClassList, find_class_list
from mirasol.data.datasets.contract import Adapter, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import is_whole_number, read_csv_header, read_csv_rows, read_strict_csv
from mirasol.data.datasets.windows import find_segment
from mirasol.data.example import Example

PROMPT = "what is the sound?"
SECONDS = 10
ID = 11  # letters of a YouTube id, which may hold and begin with "-" and "_"
PATTERNS = ("{id}_{start:06d}", "{id}_{start_ms}_{end_ms}", "{id}_{start}", "{id}")
PUBLISHED = {"train": Published(183_730), "test": Published(15_446)}


def list_splits(files: Files) -> list[str]:
    """Both where the public file is there, else those whose own list is."""
    if files.annotation("vggsound.csv"):
        return ["train", "test"]
    return [split for split in PUBLISHED if _find_list(files, split)]


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The clips of a split; ids are `{id}_{start:06d}`, for some videos occur twice with other starts."""
    rows = Rows()
    path = files.annotation("vggsound.csv")
    parsed = list(_read_public(path, files.shown(path), rows) if path else _read_own(files, split, rows))
    path = path or _find_list(files, split)
    shown = files.shown(path)
    rows.annotation_files.append(shown)
    classes = ClassList(_read_classes(files, options, [label for _, _, _, label, _ in parsed], rows))
    rows.classes = classes.names
    for line, id, start, label, of_split in parsed:
        if of_split != split:
            continue
        if not label.strip():
            rows.skip("empty text", "the label is empty", shown, line)
            continue
        name = classes.find(label)
        if name is None:
            rows.skip("unknown label", f"label {label!r} is not among the {len(classes.names)} classes", shown, line)
            continue
        window, folders = (start, start + SECONDS), (split, name, name.replace(" ", "_"))
        example = Example(
            f"{id}_{start:06d}", *find_segment(files, options, PATTERNS, id, window, rows, folders),
            options.prompt or PROMPT, name, candidates=classes.names, video=id,
        )  # fmt: skip
        rows.add(example, shown, line)
    return rows


def _read_public(path: Path, shown: str, rows: Rows) -> Iterator[tuple[int, str, int, str, str]]:
    for line, row in read_csv_rows(path, shown, rows, ("id", "start", "label", "split"), header=False):
        if len(row["id"]) != ID or not is_whole_number(row["start"]) or row["split"] not in PUBLISHED:
            message = "expected YouTube id, start in whole seconds, label, train or test; found "
            rows.skip("malformed", message + ",".join(row.values())[:80], shown, line)
            continue
        yield line, row["id"], int(row["start"]), row["label"], row["split"]


def _read_own(files: Files, split: str, rows: Rows) -> Iterator[tuple[int, str, int, str, str]]:
    path = _find_list(files, split)
    shown = files.shown(path)
    for line, row in read_csv_rows(path, shown, rows, ("file", "label"), header=False):
        stem = row["file"].rpartition(".")[0] or row["file"]
        if not is_whole_number(stem[ID + 1 :]):
            rows.skip("malformed", f"expected a file {{id}}_{{start}}.mp4, found {row['file']!r}", shown, line)
            continue
        yield line, stem[:ID], int(stem[ID + 1 :]), row["label"], split


def _find_list(files: Files, split: str) -> Path | None:
    """train.csv or test.csv of VGG-Sound: two columns, the first a file's name."""
    path = files.annotation(f"{split}.csv")
    if path is None:
        return None
    first = read_csv_header(path)
    return path if len(first) == 2 and first[0][ID : ID + 1] == "_" else None


def _read_classes(files: Files, options: DatasetOptions, labels: list[str], rows: Rows) -> tuple[str, ...]:
    """The authors' class index is the place in the sorted list of stat.csv."""
    stat = files.annotation("stat.csv") if options.class_list is None else None
    if stat is not None:
        table = read_strict_csv(stat, files.shown(stat), ("class", "count", "group"), header=False)
        return tuple(sorted(row["class"] for row in table))
    given = find_class_list(files, options, "classes_sorted.txt")
    if given is None:
        rows.facts["class_list"] = "the labels that occur: stat.csv is not there"
    return given or tuple(sorted({label for label in labels if label.strip()}))


ADAPTER = Adapter(
    "VGG-Sound",
    list_splits,
    read_split,
    PUBLISHED,
    options=("annotations", "class_list", "prompt", "pattern"),
    protocol="classes",
)
