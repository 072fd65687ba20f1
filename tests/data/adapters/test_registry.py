"""What holds for every data set: nothing is lost, what is unknown is refused by name, missing media is listed."""

import json
from pathlib import Path

import pytest

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import AnnotationError
from mirasol.data.datasets.registry import DATASETS, list_splits, read_dataset, select_usable_examples
from mirasol.errors import UserError

ROWS = [
    {"answer": "red", "category_id": 1, "id": number, "question": f"what is {number}?", "video_id": number // 2}
    for number in range(6)
]


def test_every_row_is_usable_or_has_a_reason(data):
    data.put("val_qa.json", json.dumps([*ROWS, ROWS[0], {"answer": 3}, {**ROWS[1], "id": 9, "question": " "}]))
    data.put("video1.mp4")
    dataset = read_dataset("msrvtt_qa", data.root, "val")
    counts = dataset.counts
    assert counts.reasons == {"missing media": 4, "duplicate id": 1, "malformed": 1, "empty text": 1}
    assert (counts.n_annotated, counts.n_found) == (9, 2)
    assert counts.n_annotated == counts.n_usable + sum(counts.reasons.values())
    assert len(dataset.examples) + len(dataset.missing) == len(dataset.annotated) == 6
    missing = [(p.file, p.examples) for p in dataset.problems if p.kind == "missing media"]
    told = [str(p) for p in dataset.problems if p.kind == "missing media"]
    assert all("; asked for in " in words for words in told), told
    assert missing == [("video0", 2), ("video2", 2)]


def test_missing_media_stops_or_is_skipped(data):
    data.put("val_qa.json", json.dumps(ROWS))
    data.put("video1.mp4")
    dataset = read_dataset("msrvtt_qa", data.root, "val")
    with pytest.raises(UserError, match="4 of 6 annotated examples cannot be used, the first: video0: no media file"):
        select_usable_examples(dataset)
    assert [e.media for e in select_usable_examples(dataset, "skip")] == ["video1.mp4"] * 2
    (data.root / "video1.mp4").unlink()
    with pytest.raises(UserError, match="no usable example in split 'validation'"):
        select_usable_examples(read_dataset("msrvtt_qa", data.root, "val"), "skip")


def test_counts_other_than_the_published_are_a_warning(data):
    data.put("val_qa.json", json.dumps(ROWS))
    [warning] = [p for p in read_dataset("msrvtt_qa", data.root, "val").problems if p.kind == "other counts"]
    assert warning.severity == "warning" and "6 examples, 12278 are published" in warning.message


def test_unknown_names_are_refused_with_those_that_exist(data):
    with pytest.raises(UserError, match="'msrvtt' is not known: choose folder, msrvtt_qa"):
        read_dataset("msrvtt", data.root, "val")
    with pytest.raises(UserError, match="no annotation file of msrvtt_qa"):
        read_dataset("msrvtt_qa", data.root, "val")
    data.put("val_qa.json", "[]")
    with pytest.raises(UserError, match="has no split 'test' of msrvtt_qa; there are: validation"):
        read_dataset("msrvtt_qa", data.root, "test")
    with pytest.raises(UserError, match="no such data folder"):
        read_dataset("msrvtt_qa", data.root / "nowhere", "val")
    with pytest.raises(UserError, match="targets=one: msrvtt_qa does not have this option; it has annotations"):
        read_dataset("msrvtt_qa", data.root, "val", DatasetOptions(targets="one"))


def test_annotations_may_lie_elsewhere_and_must_not_be_ambiguous(data, tmp_path):
    data.put("videos/video1.mp4")
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa" / "val_qa.json").write_text(json.dumps(ROWS[2:4]))
    options = DatasetOptions(annotations=str(tmp_path / "qa"))
    assert [e.media for e in read_dataset("msrvtt_qa", data.root, "val", options).examples] == ["videos/video1.mp4"] * 2
    data.put("a/val_qa.json", "[]")
    data.put("b/val_qa.json", "[]")
    with pytest.raises(UserError, match="two annotation files"):
        list_splits("msrvtt_qa", data.root)
    assert not read_dataset("msrvtt_qa", data.root, "val", DatasetOptions(annotations="a")).annotated
    with pytest.raises(UserError, match="annotations=nowhere: no such file or folder"):
        list_splits("msrvtt_qa", data.root, DatasetOptions(annotations="nowhere"))


def test_media_is_found_through_links_and_loops_end(data, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "video1.mp4").touch()
    (tmp_path / "disk" / "back").symlink_to(data.root)
    (data.root / "videos").symlink_to(tmp_path / "disk")
    data.put("val_qa.json", json.dumps(ROWS[2:3]))
    assert read_dataset("msrvtt_qa", data.root, "val").examples[0].media == "videos/video1.mp4"


def test_of_several_links_to_one_folder_the_first_by_name_counts_on_every_disk(data, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "video1.mp4").touch()
    for number in (5, 2, 8, 1, 9, 4, 7, 3, 6):
        (data.root / f"link{number}").symlink_to(tmp_path / "disk")
    data.put("val_qa.json", json.dumps(ROWS[2:3]))
    assert read_dataset("msrvtt_qa", data.root, "val").examples[0].media == "link1/video1.mp4"


def test_your_own_folder_lists_all_that_is_wrong(data):
    data.put("clips/a.mp4")
    data.put(
        "train.csv",
        "file,start,end,prompt,target\nclips/a.mp4,0.5,2,what?,a bell\nclips/b.mp4,,,what?,a drum\n"
        "clips/a.mp4,2,1,what?,a bell\nclips/a.mp4,,,what?,\nclips/a.mp4,soon,,what?,a bell\n",
    )
    dataset = read_dataset("folder", data.root, "train")
    [example] = dataset.examples
    assert (example.id, example.media, example.start, example.end) == ("2", "clips/a.mp4", 0.5, 2.0)
    assert dataset.reasons == {"malformed": 2, "empty text": 1, "missing media": 1}
    assert [p.line for p in dataset.problems][:3] == [4, 5, 6]
    data.put("train.csv", "file,prompt,answer\n")
    with pytest.raises(AnnotationError, match="train.csv, line 1, column 1: wrong header: expected file,prompt,target"):
        read_dataset("folder", data.root, "train")
    data.put("train.csv", "file,prompt,target,prompt\n")
    with pytest.raises(AnnotationError, match="column 'prompt' appears twice"):
        read_dataset("folder", data.root, "train")


@pytest.mark.parametrize("field", ["file", "prompt", "target", "id", "question_type"])
def test_halves_of_characters_are_no_text(data, field):
    data.put("a.mp4")
    row = {"file": "a.mp4", "prompt": "what?", "target": "é", field: "a\ud800"}
    data.put("test.jsonl", json.dumps(row) + "\n" + json.dumps({**row, field: "a.mp4"}))
    dataset = read_dataset("folder", data.root, "test")
    assert dataset.reasons == {"not UTF-8": 1} and f"field {field!r} is not UTF-8" in dataset.problems[0].message
    assert len(dataset.examples) == 1


@pytest.mark.parametrize(
    ("name", "file", "content", "part"),
    [
        ("nextqa_mc", "val.csv", "a,b\n1,2\n", "wrong header: expected video,question,answer,qid,type,a0.*; found a,b"),
        ("webvid", "train.csv", "a,b\n1,2\n", "wrong header: expected videoid,name; found a,b"),
        ("epic_sounds", "EPIC_Sounds_train.csv", "a,b\n", "wrong header: expected annotation_id,.*; found a,b"),
        ("kinetics_sound", "val.csv", "", "wrong header: expected label,youtube_id,.*; found nothing"),
        ("image_text", "train.csv", "a,b\n1,2\n", "wrong header: expected caption,filepath; found a,b"),
        ("activitynet_qa", "test_q.json", "{}", "must hold an array of objects, not an object"),
    ],
)
def test_a_file_of_another_shape_is_told_as_such(data, name, file, content, part):
    data.put(file, content)
    with pytest.raises(AnnotationError, match=f"{file}, line 1, column 1: {part}"):
        read_dataset(name, data.root, list_splits(name, data.root)[0])


def test_a_file_without_rows_is_an_error(data):
    data.put("val_qa.json", "[]")
    assert "no examples" in [p.kind for p in read_dataset("msrvtt_qa", data.root, "val").problems]


def test_every_data_set_has_its_section_in_the_docs():
    text = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
    for name, adapter in DATASETS.items():
        assert f"`{name}`" in text, name
        assert all(f"`{option}`" in text for option in adapter.options)
