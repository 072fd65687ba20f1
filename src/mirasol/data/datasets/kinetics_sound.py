"""Kinetics-Sound (Arandjelović & Zisserman, ICCV 2017): the clips of Kinetics-400 whose class can be seen and heard.

Which classes those are differs from paper to paper (the 36 of Mirasol3B are not published), so the class list is an
option and the number of classes belongs to every result.
"""

from collections import Counter
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.classes import ClassList, find_class_list
from mirasol.data.datasets.contract import Adapter, AnnotationError, Problem, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import is_whole_number, read_csv_header, read_csv_rows
from mirasol.data.datasets.windows import Place, find_segment, place_segment
from mirasol.data.example import Example

PROMPT = "what is happening?"
PATTERNS = ("{id}_{start:06d}_{end:06d}", "{id}")
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
REPLACEMENTS = "replacement_for_corrupted_k400"
# The 32 that most papers after 2020 use; names as in Kinetics-400.
CLASSES = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing",
    "mowing lawn", "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet",
    "playing drums", "playing guitar", "playing harmonica", "playing keyboard", "playing organ", "playing piano",
    "playing saxophone", "playing trombone", "playing trumpet", "playing violin", "playing xylophone",
    "ripping paper", "shoveling snow", "shuffling cards", "singing", "stomping grapes", "strumming guitar",
    "tap dancing", "tapping guitar", "tapping pen", "tickling",
)  # fmt: skip
# OGM-GE's lists index the classes without it.
CLASSES_OF_OGM_GE = tuple(name for name in CLASSES if name != "strumming guitar")
FILES = {
    "train": ("kinetics-400_train.csv", "kinetics_400_train.csv", "k400_train.csv", "train.csv"),
    "validation": ("kinetics-400_val.csv", "kinetics_400_val.csv", "k400_val.csv", "val.csv", "validate.csv"),
    "test": ("kinetics-400_test.csv", "kinetics_400_test.csv", "k400_test.csv", "test.csv"),
    "ogm_ge_train": ("my_train.txt", "ogmge_my_train.txt"),
    "ogm_ge_test": ("my_test.txt", "ogmge_my_test.txt"),
}
# Rows of Kinetics-400's validation file, by class list.
VALIDATION = {
    frozenset(CLASSES_OF_OGM_GE): 1_544,
    frozenset(CLASSES): 1_594,
    frozenset((*CLASSES, "using computer")): 1_643,
}
PUBLISHED = {"ogm_ge_train": Published(14_799), "ogm_ge_test": Published(2_597)}


def list_splits(files: Files) -> list[str]:
    """The splits of which Kinetics-400's csv, or OGM-GE's list, is there."""
    return [split for split, names in FILES.items() if files.annotation(*names)]


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The clips of the class list's classes; clips of other classes are none of this data set's."""
    path = files.annotation(*FILES[split])
    assert path is not None
    rows, shown = Rows(), files.shown(path)
    rows.annotation_files.append(shown)
    default = CLASSES_OF_OGM_GE if split.startswith("ogm_ge") else CLASSES
    given = find_class_list(files, options)
    rows.classes = given or default
    rows.facts["class_list"] = options.class_list or f"the default {len(default)}"
    replaced = {path.rpartition("/")[2][:11]: path for path in files.media_in(REPLACEMENTS)}
    if split.startswith("ogm_ge"):
        _read_ogm_ge(path, shown, files, options, rows)
        return rows
    _read_csv(path, shown, files, options, rows, replaced)
    if split == "validation":
        rows.published = Published(VALIDATION.get(frozenset(rows.classes)))
    absent = sorted(set(rows.classes) - {example.target for example in rows.examples})
    if absent:
        message = (
            f"{len(absent)} of {len(rows.classes)} classes have no row, {', '.join(map(repr, absent[:5]))} among them"
        )
        rows.warn("class without rows", message + ": are they spelled as Kinetics-400 spells them?", shown)
    return rows


def _read_csv(
    path: Path, shown: str, files: Files, options: DatasetOptions, rows: Rows, replaced: dict[str, str]
) -> None:
    if "label" not in read_csv_header(path) and "youtube_id" in read_csv_header(path):
        message = f"wrong header: expected {','.join(COLUMNS)}; found {','.join(read_csv_header(path))}"
        raise AnnotationError(Problem("wrong header", message + " (a test file with labels is CVDF's)", shown, 1, 1))
    classes = ClassList(rows.classes)
    others: Counter[str] = Counter()
    for line, row in read_csv_rows(path, shown, rows, COLUMNS):
        name, id = classes.find(row["label"]), row["youtube_id"]
        if name is None:
            others[row["label"]] += 1
            continue
        if not (is_whole_number(row["time_start"]) and is_whole_number(row["time_end"])):
            message = f"expected whole seconds, found {row['time_start']!r} and {row['time_end']!r}"
            rows.skip("malformed", message, shown, line)
            continue
        window = int(row["time_start"]), int(row["time_end"])
        folders = (name, name.replace(" ", "_"))
        if id in replaced:
            stem = replaced[id].rpartition("/")[2].rpartition(".")[0]
            place = place_segment(replaced[id], window, rows, named_by_start=stem != id)
        else:
            place = find_segment(files, options, PATTERNS, id, window, rows, folders)
        rows.add(_make_example(f"{id}_{window[0]:06d}_{window[1]:06d}", id, place, name, options, rows), shown, line)
    if others:
        rows.facts["rows_of_other_classes"] = others.total()
        named = ", ".join(map(repr, sorted(others)[:3]))
        message = f"{others.total()} rows of {len(others)} classes outside the class list ({named}, …) are left aside"
        rows.warn("other classes", message, shown)


def _read_ogm_ge(path: Path, shown: str, files: Files, options: DatasetOptions, rows: Rows) -> None:
    """Lines are `{name of the file},10,{class index}`; the index counts the sorted class list."""
    names = sorted(rows.classes)
    for line, row in read_csv_rows(path, shown, rows, ("file", "seconds", "class"), header=False):
        if not is_whole_number(row["class"]) or int(row["class"]) >= len(names):
            message = f"class index {row['class']!r} is out of range: 0 to {len(names) - 1}"
            rows.skip("answer out of range", message, shown, line)
            continue
        stem, name = row["file"], names[int(row["class"])]
        media = files.media([stem], (name, name.replace(" ", "_"))) or ""  # the list has no times
        rows.add(_make_example(stem, stem[:11], (media, None, None), name, options, rows), shown, line)


def _make_example(id: str, video: str, place: Place, name: str, options: DatasetOptions, rows: Rows) -> Example:
    prompt = options.prompt or PROMPT
    return Example(id, *place, prompt, name, candidates=rows.classes, video=video)


ADAPTER = Adapter(
    "Kinetics-Sound",
    list_splits,
    read_split,
    PUBLISHED,
    overlapping=("ogm_ge_train", "ogm_ge_test"),
    options=("annotations", "class_list", "prompt", "pattern"),
    protocol="classes",
)
