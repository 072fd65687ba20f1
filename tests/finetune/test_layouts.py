"""How folders are understood: every clip is labelled, told to have no label, or named with what is wrong."""

import itertools
import json

import pytest

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.registry import read_dataset
from mirasol.errors import UserError
from mirasol.finetune.headers import Header
from mirasol.finetune.layouts import read_labels
from mirasol.finetune.splits import NAMES, split_examples
from mirasol.finetune.survey import CLASS_LIST, Survey, write_splits

CLASSES = ("dog bark", "Regen", "a_b", "números", "[x] #1")
FILES = ("a.mp4", "B.MKV", "c d.webm", "ü.wav", "a.b.mov", "100%.flac")


def make(root, *files: str) -> None:
    """Files with contents of their own: what is in a clip does not matter here."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())


def list_media(root) -> set[str]:
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name for name in names if name.rpartition(".")[2].lower() in ("mp4", "mkv", "webm", "wav", "mov", "flac")}


def assert_nothing_is_lost(root, labels) -> None:
    named = {example.media for example in labels.all_examples}
    assert named | set(labels.unlabelled) == list_media(root)
    assert not named & set(labels.unlabelled)


def rows_of(labels) -> dict[str, set[tuple]]:
    return {split: {(e.media, e.prompt, e.target) for e in own} for split, own in labels.examples.items()}


@pytest.mark.parametrize(
    "splits",
    [(), ("train", "val", "test"), ("Train", "Validation", "TEST"), ("training", "dev", "eval"), ("train", "test")],
    ids=str,
)
@pytest.mark.parametrize("below", ["", "2024/"])
def test_folders_are_classes_also_below_splits(tmp_path, splits, below):
    tops = [f"{split}/" for split in splits] or [""]
    make(tmp_path, *(f"{top}{name}/{below}{file}" for top in tops for name in CLASSES for file in FILES))
    make(tmp_path, f"{tops[0]}loose.mp4", "README.md", "dog bark/._a.mp4", f"{tops[0]}Regen/Thumbs.db")
    labels = read_labels(tmp_path)
    names = {"val": "validation", "dev": "validation", "training": "train", "eval": "test"}
    assert set(labels.examples) == ({names.get(split.lower(), split.lower()) for split in splits} or {""})
    assert labels.classes == tuple(sorted(CLASSES))
    for own in labels.examples.values():
        assert len(own) == len(CLASSES) * len(FILES)
        assert all(example.target in example.media.split("/") for example in own)
    assert labels.unlabelled == (f"{tops[0]}loose.mp4",)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".mp4.txt"])
@pytest.mark.parametrize("top", ["", "clips/"])
def test_a_text_next_to_a_clip_is_its_caption(tmp_path, suffix, top):
    captions = {f"{top}{n}": f"A  dog\n number {n}: “wüff”" for n in range(6)}
    make(tmp_path, *(f"{name}.mp4" for name in captions), f"{top}alone.mp4")
    for name, text in captions.items():
        (tmp_path / f"{name}{suffix}").write_text(json.dumps({"caption": text}) if suffix == ".json" else text)
    (tmp_path / f"{top}gone.txt").write_text("a clip that is not there")
    labels = read_labels(tmp_path)
    wanted = {f"{n}.mp4": " ".join(text.split()) if suffix != ".json" else text for n, text in captions.items()}
    assert {example.media: example.target for example in labels.all_examples} == wanted
    assert {example.prompt for example in labels.all_examples} == {"describe the clip"}
    assert (labels.classes, labels.unlabelled, labels.orphans) == ((), (f"{top}alone.mp4",), (f"{top}gone.txt",))
    assert_nothing_is_lost(tmp_path, labels)


def test_a_side_file_may_hold_several_questions_and_says_what_is_wrong(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    asked = [{"question": "what?", "answer": "red", "start": 1, "end": 2}, "a red ball", {"start": 1}, 3]
    (tmp_path / "a.json").write_text(json.dumps(asked))
    (tmp_path / "b.json").write_text("{broken")
    (tmp_path / "c.txt").write_text("  \n")
    labels = read_labels(tmp_path)
    found = [(example.media, example.start, example.target) for example in labels.all_examples]
    assert found == [("a.mp4", 1.0, "red"), ("a.mp4", None, "a red ball")]
    assert sorted(problem.file for problem in labels.problems) == ["a.json", "a.json", "b.json", "c.txt"]


@pytest.mark.parametrize(
    "columns",
    [("file", "target"), ("path", "label"), ("Video", "Class"), ("filename", "category"), ("clip", "answer")],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("place", ["clips/", ""])
def test_one_table_labels_all_clips(tmp_path, columns, suffix, place):
    make(tmp_path, *(f"{place}{n}.mp4" for n in range(6)))
    rows = [(f"{place}{n}.mp4", CLASSES[n % 2]) for n in range(5)] + [("gone.mp4", "dog bark")]
    if suffix == ".jsonl":
        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        text = "".join(("," if suffix == ".csv" else "\t").join(row) + "\n" for row in [columns, *rows])
    (tmp_path / f"labels{suffix}").write_text(text)
    labels = read_labels(tmp_path)
    assert rows_of(labels) == {"": {(file, "what is it?", target) for file, target in rows[:5]}}
    assert labels.unlabelled == (f"{place}5.mp4",)
    assert [problem.kind for problem in labels.problems] == ["missing media"]
    assert_nothing_is_lost(tmp_path, labels)


@pytest.mark.parametrize("name", ["a.mp4", "a", "./deep/er/a.mp4", "elsewhere\\a.mp4"])
def test_a_row_finds_its_clip_by_name_where_only_one_has_it(tmp_path, name):
    make(tmp_path, "deep/er/a.mp4", "b.mp4", "c/b.mp4")
    rows = [{"file": name, "label": "x"}, {"file": "b.mp4", "label": "y"}, {"file": "gone/b.mp4", "label": "y"}]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = read_labels(tmp_path)
    assert [example.media for example in labels.all_examples] == ["deep/er/a.mp4", "b.mp4"]
    assert [problem.line for problem in labels.problems] == [3], "two files are called b.mp4"


def test_a_column_may_say_the_split_and_others_are_told(tmp_path):
    make(tmp_path, *(f"{n}.mp4" for n in range(4)))
    lines = ["file,label,split,camera", "0.mp4,x,train,1", "1.mp4,y,val,2", "2.mp4,x,TEST,1", "3.mp4,x,later,1"]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    labels = read_labels(tmp_path)
    assert {split: len(own) for split, own in labels.examples.items()} == {"train": 1, "validation": 1, "test": 1}
    assert labels.remarks == ("all.csv: columns that are not read: camera",)
    assert [(problem.line, "later" in problem.message) for problem in labels.problems] == [(5, True)]


@pytest.mark.parametrize(
    "names", [("train.jsonl", "validation.csv", "test.jsonl"), ("train.csv", "val.csv"), ("train.tsv",)], ids=str
)
def test_tables_of_splits_are_read_as_they_are(tmp_path, names):
    make(tmp_path, "a.mp4", "b.mp4")
    for name in names:
        row = {"file": "a.mp4", "prompt": "what?", "target": "red", "candidates": ["red", "blue"], "start": 0, "end": 1}
        if name.endswith(".jsonl"):
            (tmp_path / name).write_text(json.dumps(row) + "\n")
        else:
            tab = "\t" if name.endswith(".tsv") else ","
            fields = ["a.mp4", "what?", "red", "red|blue", "0", "1"]
            (tmp_path / name).write_text(tab.join(row) + "\n" + tab.join(fields))
    labels = read_labels(tmp_path)
    assert len(labels.examples) == len(names)
    assert all(own[0].candidates == ("red", "blue") and own[0].end == 1.0 for own in labels.examples.values())
    assert labels.classes == ()


@pytest.mark.parametrize(
    ("files", "tables", "part"),
    [
        ([], {}, "no video or sound file"),
        (["a.pdf", "b/c.txt"], {}, "1 .pdf, 1 .txt"),
        ([], {"labels.csv": "file,label\na.mp4,x\n"}, "labels.csv has labels, but the clips"),
        (["a.mp4"], {"labels.csv": "file,label\nb.mp4,x\n"}, "no media file 'b.mp4'"),
        (["a.mp4", "b.mp4"], {}, "2 clips without labels: put the clips of each class into a folder"),
        (["a.mp4"], {"labels.csv": "name,kind\na.mp4,x\n"}, "no column 'file' (or path, video"),
        (["a.mp4"], {"one.csv": "file,label\n", "two.csv": "file,label\n"}, "none of them train.csv"),
        (["a.mp4"], {"val.csv": "file,label\n", "dev.csv": "file,label\n"}, "two tables for validation"),
        (["a.mp4"], {"x.csv": "file,label,split\na.mp4,x,train\na.mp4,y,\n"}, "some rows name a split and some none"),
        (["a.mp4"], {"x.jsonl": "{broken\n"}, "is not JSON"),
    ],
)
def test_what_cannot_be_understood_is_one_line_with_the_fix(tmp_path, files, tables, part):
    make(tmp_path, *files)
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_labels(tmp_path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["folders", "captions", "table"])
def test_the_splits_that_are_written_are_read_back_the_same(tmp_path, layout):
    root = tmp_path / "mine"
    names = [f"{CLASSES[n % 3]}/{n} é.mp4" for n in range(24)]
    make(root, *names)
    if layout == "captions":
        for name in names:
            (root / name).with_suffix(".txt").write_text(f"clip {name}: a “text”, with \u2028 marks")
    elif layout == "table":
        rows = [{"file": name, "label": n % 2, "start": n % 4, "end": 9} for n, name in enumerate(names)]
        (root / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = read_labels(root)
    splits = split_examples(labels, seed=0)
    survey = Survey(labels, splits, dict.fromkeys(names, Header(2.0, True, True)), len(names), 0, ())
    write_splits(tmp_path / "data", survey)
    chosen = DatasetOptions(str(tmp_path / "data"), str(tmp_path / "data" / CLASS_LIST) if labels.classes else None)
    assert bool(labels.classes) == (layout != "captions")
    for name in NAMES:
        found = read_dataset("folder", root, name, chosen)
        assert not found.problems
        kept = [(e.id, e.media, e.start, e.end, e.prompt, e.target) for e in found.examples]
        assert kept == [(e.id, e.media, e.start, e.end, e.prompt, e.target) for e in splits.examples[name]]
        assert all(e.candidates == labels.classes for e in found.examples)


def test_how_files_are_ordered_changes_nothing(tmp_path):
    for place, order in enumerate((FILES, FILES[::-1])):
        make(tmp_path / str(place), *(f"{name}/{file}" for name, file in itertools.product(CLASSES, order)))
    one, other = (read_labels(tmp_path / str(place)) for place in range(2))
    assert one.examples == other.examples
