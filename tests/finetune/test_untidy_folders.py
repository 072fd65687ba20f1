"""Folders as people really have them: nothing is labelled wrongly in silence, and what is left out is told."""

import json
import os
import shutil
import unicodedata

import pytest
from rich.console import Console
from test_layouts import make

from mirasol.checkpoint import load_checkpoint
from mirasol.cli.main import main
from mirasol.data.example import ClipExamples, Example
from mirasol.errors import UserError
from mirasol.finetune.finetune import finetune
from mirasol.finetune.headers import Header
from mirasol.finetune.layouts import read_labels
from mirasol.finetune.measure import check_decodable, decode_some
from mirasol.finetune.settings import Settings
from mirasol.finetune.survey import Survey, is_beyond, list_contradictions, read_headers, survey_folder


def label(root) -> dict[str, set[str]]:
    """The answers of each clip, whatever their split."""
    found: dict[str, set[str]] = {}
    for example in read_labels(root).all_examples:
        found.setdefault(example.media, set()).add(example.target)
    return found


@pytest.mark.parametrize("right", [True, False], ids=["some paths right", "no path right"])
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_a_missing_folders_labels_are_not_given_to_files_of_the_same_name(tmp_path, right, suffix):
    """A name alone finds its file where the whole table is of another machine, and that is told."""
    make(tmp_path, *(f"clips/c{n}.mp4" for n in range(4)))
    first = "clips" if right else "D:\\old\\clips"
    rows = [f"{first}/c{n}{suffix if not right else '.mp4'},dog" for n in range(2)]
    rows += [f"cam2/c{n}.mp4,cat" for n in (range(2) if right else range(2, 4))]
    (tmp_path / "labels.csv").write_text("file,target\n" + "\n".join(rows) + "\n")
    labels, found = read_labels(tmp_path), label(tmp_path)
    if right:
        assert found == {"clips/c0.mp4": {"dog"}, "clips/c1.mp4": {"dog"}}
        assert [problem.kind for problem in labels.problems] == ["missing media"] * 2
    else:
        assert found == {f"clips/c{n}.mp4": {"dog" if n < 2 else "cat"} for n in range(4)}
        assert "4 rows name another folder" in labels.remarks[0]


def test_absolute_paths_below_the_folder_are_paths_in_it(tmp_path):
    root = tmp_path / "mine"
    make(root, "a/x.mp4", "b/x.mp4")
    (tmp_path / "link").symlink_to(root)
    (root / "labels.csv").write_text(f"file,target\n{root}/a/x.mp4,dog\n{root}/b/x.mp4,cat\n")
    assert label(root) == label(tmp_path / "link") == {"a/x.mp4": {"dog"}, "b/x.mp4": {"cat"}}


@pytest.mark.parametrize(
    "answer", ["dog\nbark", " dog  bark ", "dog\u2028bark", "dog\r\nbark", "dog\tbark", "dog bark"]
)
@pytest.mark.parametrize("place", ["csv", "jsonl", "folder", "txt"])
def test_an_answer_is_one_line_however_it_is_written(tmp_path, answer, place):
    if place == "folder":
        make(tmp_path, f"{answer}/a.mp4", "cat/b.mp4")
    else:
        make(tmp_path, "a.mp4", "b.mp4")
    if place == "csv":
        (tmp_path / "labels.csv").write_text(f'file,target\na.mp4,"{answer}"\nb.mp4,cat\n', newline="")
    elif place == "jsonl":
        rows = [{"file": "a.mp4", "target": answer}, {"file": "b.mp4", "target": "cat"}]
        (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif place == "txt":
        (tmp_path / "a.txt").write_text(answer, newline="")
        (tmp_path / "b.txt").write_text("cat")
    assert {target for targets in label(tmp_path).values() for target in targets} == {"dog bark", "cat"}


def test_the_same_letters_are_one_class_and_other_capitals_are_told(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    make(tmp_path, f"{composed}/a.mp4", f"{apart}/b.mp4", "Dog/c.mp4", "dog/d.mp4")
    labels = read_labels(tmp_path)
    assert labels.classes == ("Dog", "café", "dog")
    assert [line for line in list_contradictions(labels) if "Dog, dog" in line]


def test_labels_that_repeat_or_contradict_each_other_are_counted(tmp_path):
    make(tmp_path, *(f"{n}.mp4" for n in range(4)))
    rows = ["0.mp4,dog", "0.mp4,cat", "1.mp4,dog", "1.mp4,dog", "2.mp4,cat", "3.mp4,cat"]
    (tmp_path / "labels.csv").write_text("file,target\n" + "\n".join(rows) + "\n")
    lines = list(list_contradictions(read_labels(tmp_path)))
    assert lines == [
        "1 labels say what another one says, the first: 1.mp4: 'dog'",
        "1 clips are of several classes, the first: 0.mp4: dog, cat",
    ]


@pytest.mark.parametrize("names", [("val", "test"), ("dev", "eval"), ("Validation", "TEST")])
@pytest.mark.parametrize("below", ["", "dog/"])
def test_splits_without_one_that_trains_are_no_classes(tmp_path, names, below):
    make(tmp_path, *(f"{name}/{below}{n}.mp4" for name in names for n in range(3)))
    with pytest.raises(UserError, match="but no train/"):
        read_labels(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path, *(f"{name}/{n}.mp4" for name in ("train", "car", "test") for n in range(3)))
    assert read_labels(tmp_path).classes == ("car", "test", "train")


@pytest.mark.parametrize("meta", ['{"fps": 8}', "[]", "[1]", "not json", '{"caption": ""}'])
def test_the_side_file_that_has_a_caption_is_read(tmp_path, meta):
    make(tmp_path, "a.mp4", "b.mp4")
    for name, caption in (("a", "a dog"), ("b", "a cat")):
        (tmp_path / f"{name}.txt").write_text(caption)
        (tmp_path / f"{name}.json").write_text(meta)
    assert label(tmp_path) == {"a.mp4": {"a dog"}, "b.mp4": {"a cat"}} and not read_labels(tmp_path).problems
    (tmp_path / "a.json").write_text('{"caption": "the json says more"}')
    assert label(tmp_path)["a.mp4"] == {"the json says more"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["labels.xlsx"], "not read: labels.xlsx"),
        (["annotations/labels.csv"], "not read: annotations/labels.csv"),
        (["dog/x.jpg", "dog/y.jpg", "cat/z.rmvb"], "2 .jpg, 1 .rmvb"),
        ([".cat/a.mp4", "dog/.b.mp4"], "2 clips are hidden"),
    ],
)
def test_what_may_have_been_meant_and_is_not_read_is_told(tmp_path, files, words):
    make(tmp_path, "dog/1.mp4", "cat/2.mp4", *files)
    assert any(words in remark for remark in read_labels(tmp_path).remarks)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"file": "a.mp4", "target": NaN}\n{"file": "b.mp4", "target": 1e400}', "field 'target' is nan, no text"),
        ("[1]", "must be an object, not a list"),
    ],
)
def test_rows_that_are_no_labels_are_named(tmp_path, rows, words):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "labels.jsonl").write_text(rows)
    with pytest.raises(UserError, match=words):
        read_labels(tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(tmp_path, end):
    make(tmp_path, "a.mp4", "b.mp4")
    text = end.join(["file,target,", "a.mp4,dog,0", "b.mp4,cat,1", ""])
    (tmp_path / "labels.csv").write_text(text, newline="")
    assert label(tmp_path) == {"a.mp4": {"dog"}, "b.mp4": {"cat"}}
    assert read_labels(tmp_path).remarks == ("labels.csv: columns that are not read: one without a name",)


@pytest.mark.parametrize("split", ["", "train/"])
def test_folders_of_classes_without_clips_are_told(tmp_path, split):
    make(tmp_path, *(f"{split}{name}/c{n}.mp4" for name in ("dog", "cat") for n in range(2)))
    if split:
        make(tmp_path, "test/fish/c0.mp4", "test/cat/c0.mp4")
        (tmp_path / "train" / "fish").mkdir()  # has clips elsewhere
    assert not [remark for remark in read_labels(tmp_path).remarks if "no clips" in remark]
    for name in ("bird", "owl", ".thumbnails", "__pycache__"):
        (tmp_path / split / name).mkdir(parents=True)
    (tmp_path / split / "owl" / "notes.md").write_text("to be filmed")
    assert "no clips in bird, owl: no classes of that name" in read_labels(tmp_path).remarks


def test_one_class_is_said_to_be_what_is_left(tmp_path):
    make(tmp_path, *(f"{n}.mp4" for n in range(4)))
    content = b"file,target\n0.mp4,cat\n1.mp4,cat\n" + "2.mp4,bébé\n3.mp4,bébé\n".encode("latin-1")
    (tmp_path / "labels.csv").write_bytes(content)
    headers = {f"{n}.mp4": Header(1.0, True, True) for n in range(4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirasol.finetune.survey.read_headers", lambda *_: (headers, {}))
        with pytest.raises(UserError, match=r"one class only.*; 2 labels were left out, the first: .*UTF-8"):
            survey_folder(read_labels(tmp_path), 0)


@pytest.mark.parametrize(
    ("start", "end", "beyond"),
    [
        (None, None, False),
        (0.0, 10.4, False),
        (9.9, None, False),
        (10.0, None, True),
        (0.0, 99.0, True),
        (20.0, 30.0, True),
    ],
)
def test_windows_beyond_a_file_are_left_out_before_anything_trains(tmp_path, start, end, beyond):
    headers = {"a.mp4": Header(10.0, True, True), "still.gif": Header(0.0, True, False)}
    assert is_beyond(Example("1", "a.mp4", start, end, "what?", "x"), headers) == beyond
    for unknown in ("other.mp4", "still.gif"):
        assert not is_beyond(Example("1", unknown, start, end, "what?", "x"), headers)
    make(tmp_path, *(f"{n}.mp4" for n in range(8)))
    row = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
    rows = [{"file": f"{n}.mp4", "target": "ab"[n % 2], **(row if n == 7 else {})} for n in range(8)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    known = {f"{n}.mp4": Header(10.0, True, True) for n in range(8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirasol.finetune.survey.read_headers", lambda *_: (known, {}))
        found: Survey = survey_folder(read_labels(tmp_path), 0)
    assert len(found.all_clips) == 8 - beyond and max(found.seconds) <= 10.0
    assert any("1 examples are left out, the first: 7.mp4" in line for line in found.list_remarks()) == beyond
    assert [problem.file for problem in found.left_out] == ["7.mp4"] * beyond


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_pipes_and_folders_named_like_clips_are_unreadable_and_hang_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to("gone.mp4")
    headers, reasons = read_headers(tmp_path, ["folder.mp4", "link.mp4", "pipe.mp4"])
    assert not headers and "pipe" in reasons["pipe.mp4"] and reasons["link.mp4"] == "No such file or directory"


@pytest.fixture
def clips(shapes):
    return sorted((shapes / "clips").rglob("*.mp4"))


def break_off(clip, path):
    """A file whose header is whole, and nothing else: a download that broke off."""
    content = clip.read_bytes()
    place = content.index(b"mdat") + 44
    boxes, moov = content[:place], content[content.index(b"moov") - 4 :]
    path.write_bytes(boxes + bytes(content.index(b"moov") - 4 - place) + moov)


@pytest.mark.parametrize("broken", ["train", "validation", "test"])
def test_a_split_that_cannot_be_decoded_is_told_before_the_training(untrained, clips, tmp_path, broken):
    root, out = tmp_path / "mine", tmp_path / "out"
    for number, (split, name) in enumerate((s, c) for s in ("train", "validation", "test") for c in ("left", "right")):
        (root / split / name).mkdir(parents=True)
        path = root / split / name / f"{number}.mp4"
        (break_off if split == broken else shutil.copy)(clips[number], path)
    with pytest.raises(UserError, match=f"none of 2 {broken} clips can be decoded, the first: "):
        finetune(Settings(str(root), str(untrained), str(out), None, 1, ("device=cpu",)), Console(quiet=True))
    assert not out.exists()


def test_clips_that_cannot_be_decoded_are_counted(untrained, clips, tmp_path):
    loaded = load_checkpoint(untrained)
    shutil.copy(clips[0], tmp_path / "0.mp4")
    for number in (1, 2):
        break_off(clips[number], tmp_path / f"{number}.mp4")
    some = [ClipExamples(f"{n}.mp4", None, None, (Example(str(n), "", None, None, "what?", "x"),)) for n in range(3)]
    [note] = decode_some(loaded, tmp_path, some).describe()
    assert note.startswith("2 of 3 clips that were tried cannot be decoded, the first: ")
    check_decodable(loaded, tmp_path, {"train": some})


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["", "--epochs", "1"], "FOLDER '': is empty"),
        (["FILE"], "is a file: give its folder"),
        (["x" * 300], "File name too long"),
        (["HERE", "--output", "y" * 300], "File name too long"),
        (["HERE", "--output", " "], "--output ' ': is empty"),
        (["HERE", "--minutes", "nan"], "--minutes nan: is not a finite number"),
        (["HERE", "--epochs", "1.5"], "--epochs 1.5: is not a whole number"),
        (["HERE", "--minutes", "0"], "--minutes 0: must be above 0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_one_line(tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "mine/dog/a.mp4", "mine/cat/b.mp4", "file")
    monkeypatch.setattr("mirasol.finetune.finetune.load_checkpoint", lambda *_: pytest.fail("loads before it checks"))
    words = [{"HERE": "mine", "FILE": "file"}.get(word, word) for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and part in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
