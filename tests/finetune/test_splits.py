"""Splits: no video on two sides, every class everywhere as far as it goes, the same for the same seed."""

import dataclasses
import itertools
from collections import Counter

import pytest

from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.finetune.labels import Labels
from mirasol.finetune.splits import NAMES, Videos, find_same_files, split_examples


def make_labels(root, rows: list[tuple[str, str]], split: str = "", contents: dict[str, str] | None = None) -> Labels:
    """Labels of files that hold their own names, or `contents`; rows are (file, answer)."""
    for file, _ in rows:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text((contents or {}).get(file, file))
    examples = tuple(Example(str(n), file, None, None, "what is it?", answer) for n, (file, answer) in enumerate(rows))
    return Labels(root, "made by a test", {split: examples})


def media_of(splits, name: str) -> set[str]:
    return {example.media for example in splits.examples[name]}


@pytest.mark.parametrize("counts", [(3, 1), (2, 1), (3, 3), (5, 4), (20, 7, 3), (1, 1, 1), (40, 2)], ids=str)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_clip_is_in_one_split_and_no_split_is_empty(tmp_path, counts, seed):
    rows = [(f"{name}{n}.mp4", str(name)) for name, count in enumerate(counts) for n in range(count)]
    splits = split_examples(make_labels(tmp_path, rows), seed)
    assert sorted(e.media for name in NAMES for e in splits.examples[name]) == sorted(file for file, _ in rows)
    for name in NAMES:
        answers = Counter(example.target for example in splits.examples[name])
        assert answers
        for answer, count in enumerate(counts):
            if count >= 3 and 2 * len(counts) <= sum(counts):
                assert answers[str(answer)] >= 1, f"{name} lacks a class of {count} clips"
    assert len(splits.examples["train"]) >= len(splits.examples["validation"])


def test_the_seed_decides_and_the_order_does_not(tmp_path):
    rows = [(f"{n}.mp4", "ab"[n % 2]) for n in range(40)]
    one = split_examples(make_labels(tmp_path, rows), 0)
    again = split_examples(make_labels(tmp_path, rows[::-1]), 0)
    other = split_examples(make_labels(tmp_path, rows), 1)
    assert all(media_of(one, name) == media_of(again, name) for name in NAMES)
    assert media_of(one, "test") != media_of(other, "test")


def test_copies_and_cuts_of_a_video_stay_together(tmp_path):
    ids = [f"video{n:06d}" for n in range(12)]
    rows = [(f"{id}_{start:06d}.mp4", "ab"[n % 2]) for n, id in enumerate(ids) for start in (0, 10, 20)]
    copies = {f"copy{n}.mp4": f"video{n:06d}_000000.mp4" for n in range(4)}
    rows += [(file, "a") for file in copies]
    splits = split_examples(make_labels(tmp_path, rows, contents=copies), 3)
    where = {media: name for name in NAMES for media in media_of(splits, name)}
    for id in ids:
        assert len({where[f"{id}_{start:06d}.mp4"] for start in (0, 10, 20)}) == 1
    for copy, original in copies.items():
        assert where[copy] == where[original]
    assert any("copies" in remark for remark in splits.remarks)
    assert any("cuts" in remark for remark in splits.remarks)


def test_names_that_only_look_like_cuts_are_files_of_their_own(tmp_path):
    rows = [(f"recording-{part}_{n:04d}.mp4", "ab"[n % 2]) for part in "12" for n in range(10)]
    labels = make_labels(tmp_path, rows)
    videos = Videos(tmp_path, [file for file, _ in rows])
    assert len({videos.find(file) for file, _ in rows}) == 20
    assert all(split_examples(labels, 0).examples.values())


@pytest.mark.parametrize("given", [("validation",), ("test",), ("validation", "test")], ids=str)
def test_what_a_later_split_has_is_left_out_of_the_earlier_one_and_told(tmp_path, given):
    train = [(f"train/{n}.mp4", "ab"[n % 2]) for n in range(20)]
    examples = dict(make_labels(tmp_path, train, "train").examples)
    for name in given:
        rows = [(f"{name}/{n}.mp4", "ab"[n % 2]) for n in range(4)]
        examples |= make_labels(tmp_path, rows, name, {f"{name}/0.mp4": "train/3.mp4"}).examples
    splits = split_examples(Labels(tmp_path, "", examples), 0)
    assert "train/3.mp4" not in media_of(splits, "train")
    assert "train/3.mp4" in [example.media for example in splits.leaked]
    total = sum(map(len, examples.values()))
    assert sum(map(len, splits.examples.values())) + len(splits.leaked) == total
    assert any("also in a later split" in remark for remark in splits.remarks)
    if "test" in given:
        assert len(splits.examples["test"]) == 4


def test_windows_of_one_file_stay_together(tmp_path):
    examples = []
    for number in range(8):
        (tmp_path / f"{number}.mp4").write_text(str(number))
        for start in range(5):
            ends = (float(start), start + 1.0)
            examples.append(Example(f"{number}-{start}", f"{number}.mp4", *ends, "what is it?", "ab"[start % 2]))
    splits = split_examples(Labels(tmp_path, "", {"": tuple(examples)}), 0)
    for one, other in itertools.combinations(NAMES, 2):
        assert not media_of(splits, one) & media_of(splits, other)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([("a.mp4", "x")], "one class only, 'x', in 1 clips"),
        ([("a.mp4", "x"), ("b.mp4", "x"), ("c.mp4", "x")], "add clips of another class"),
        ([("a.mp4", "x"), ("b.mp4", "y")], "2 videos cannot train, validate and test: 3 are the least"),
    ],
)
def test_too_little_is_refused_with_the_fix(tmp_path, rows, part):
    with pytest.raises(UserError, match=part):
        split_examples(make_labels(tmp_path, rows), 0)


@pytest.mark.parametrize(("media", "is_hinted"), [("x/a.mp4", False), ("x/dog/a.mp4", True), ("train/x/a.mp4", False)])
def test_the_folder_of_the_only_class_is_proposed_only_if_it_holds_folders(tmp_path, media, is_hinted):
    file = tmp_path / media
    file.parent.mkdir(parents=True)
    file.touch()
    labels = dataclasses.replace(make_labels(tmp_path, [(media, "x")]), named_classes=True)
    with pytest.raises(UserError, match="one class only") as refused:
        split_examples(labels, 0)
    assert (f"or give {tmp_path / 'x'}" in str(refused.value)) == is_hinted


def test_few_test_clips_and_unknown_answers_are_told(tmp_path):
    examples = {
        name: make_labels(tmp_path, [(f"{name}{n}.mp4", answer) for n in range(4)], name).examples[name]
        for name, answer in (("train", "x"), ("validation", "x"), ("test", "new"))
    }
    remarks = split_examples(Labels(tmp_path, "", examples), 0).remarks
    assert any("4 clips test the model" in remark for remark in remarks)
    assert any("1 answers of the test are in no training clip ('new')" in remark for remark in remarks)


def test_files_are_the_same_only_where_all_bytes_are(tmp_path):
    block = bytes(2**17)
    contents = {"a": block + b"1" + block, "b": block + b"1" + block, "c": block + b"2" + block, "d": b"", "e": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert find_same_files(tmp_path, [*contents, "gone"]) == [["a", "b"]]
