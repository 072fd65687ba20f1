import csv
import json
from pathlib import Path

import pytest

from mirasol.data.datasets.folder import read_examples
from mirasol.data.datasets.registry import read_dataset
from mirasol.data.example import Example
from mirasol.data.media_files import open_media_file
from mirasol.errors import UserError

GOOD = {"id": "a", "file": "clips/a.mp4", "prompt": "what plays?", "target": "a bell"}


def write(root: Path, *lines: str | dict) -> None:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "train.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")


def error_of(root: Path, *lines: str | dict) -> str:
    write(root, *lines)
    with pytest.raises(UserError) as caught:
        read_examples(root, "train")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_rows_become_examples(tmp_path):
    full = GOOD | {"id": "b", "start": 1, "end": 2.5, "question_type": "hearing", "candidates": ["a bell", "a drum"]}
    write(tmp_path, GOOD, "", full)
    assert read_examples(tmp_path, "train") == [
        Example("a", "clips/a.mp4", None, None, "what plays?", "a bell"),
        Example("b", "clips/a.mp4", 1.0, 2.5, "what plays?", "a bell", "hearing", ("a bell", "a drum")),
    ]


def test_text_beyond_ascii_and_line_separators_inside_text_survive(tmp_path):
    row = GOOD | {"prompt": "was hört man?\u2028 und dann?"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_examples(tmp_path, "train")[0].prompt == row["prompt"]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"id": "a", ', "is not JSON"),
        ("[1, 2]", "must be an object"),
        ({key: value for key, value in GOOD.items() if key != "target"}, "field 'target' is missing"),
        (GOOD | {"target": 3}, "field 'target' must be text, not a number"),
        (GOOD | {"prompt": " "}, "field 'prompt' is empty"),
        (GOOD | {"id": None}, "field 'id' must be text, not null"),
        (GOOD | {"start": "1 s"}, "field 'start' must be seconds or null, not text"),
        (GOOD | {"start": True}, "field 'start' must be seconds or null, not true or false"),
        (GOOD | {"end": -1}, "field 'end' must be seconds from 0 on, not -1"),
        ('{"id": "a", "file": "a", "prompt": "p", "target": "t", "end": NaN}', "not nan"),
        (GOOD | {"start": 2, "end": 2}, "start 2 must be before end 2"),
        (GOOD | {"candidates": "bell"}, "field 'candidates' must be a list, not text"),
        (GOOD | {"candidates": ["a bell", 2]}, "field 'candidates' must be text, not a number"),
        (GOOD | {"candidates": ["a drum"]}, "target 'a bell' is not among its candidates"),
        (GOOD | {"promt": "?"}, "unknown field 'promt'"),
        (GOOD | {"file": "/etc/passwd"}, "must be a path inside"),
        (GOOD | {"file": "clips/../../a.mp4"}, "must be a path inside"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, part):
    message = error_of(tmp_path, GOOD | {"id": "first"}, line)
    assert f"{tmp_path / 'train.jsonl'}, line 2" in message
    assert part in message


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    row = json.dumps(GOOD | {"prompt": "caf?"}).encode().replace(b"caf?", b"caf\xe9")
    (tmp_path / "train.jsonl").write_bytes(row + b"\n")
    with pytest.raises(UserError, match="line 1: field 'prompt' is not UTF-8 text"):
        read_examples(tmp_path, "train")


def test_a_csv_row_of_another_width_is_named_with_its_column(tmp_path):
    (tmp_path / "train.csv").write_text("file,prompt,target\na.mp4,what?,a bell\na.mp4,what?\n")
    with pytest.raises(UserError, match="train.csv, line 3, column 12: 2 fields, 3 expected"):
        read_examples(tmp_path, "train")


def test_links_of_folders_are_followed_wherever_they_lead(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.mp4").write_bytes(b"film")
    root = tmp_path / "data"
    root.mkdir()
    (root / "clips").symlink_to(tmp_path / "disk")
    write(root, GOOD, GOOD | {"id": "b", "file": "clips/b.mp4"})
    assert [example.media for example in read_examples(root, "train")] == ["clips/a.mp4", "clips/b.mp4"]
    dataset = read_dataset("folder", root, "train")
    assert [example.id for example in dataset.examples] == ["a"] and [e.id for e in dataset.missing] == ["b"]
    with open_media_file(root, dataset.examples[0].media) as path:
        assert path.read_bytes() == b"film"


def test_links_of_files_are_followed_to_where_they_lead(tmp_path):
    root = tmp_path / "data"
    (root / "real").mkdir(parents=True)
    (root / "clips").mkdir()
    (tmp_path / "secret.mp4").write_text("")
    (root / "clips" / "in.mp4").symlink_to(root / "real" / "a.mp4")
    (root / "clips" / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    inside = [GOOD | {"file": file, "id": file} for file in ("clips/in.mp4", "./clips//b.mp4", "a.mp4")]
    write(root, *inside)
    assert [example.media for example in read_examples(root, "train")] == ["clips/in.mp4", "clips/b.mp4", "a.mp4"]
    write(root, GOOD | {"file": "clips/out.mp4"})
    assert [example.media for example in read_dataset("folder", root, "train").examples] == ["clips/out.mp4"]


@pytest.mark.parametrize("id", [7, -1, 10**30])
def test_a_number_is_an_id(tmp_path, id):
    write(tmp_path, GOOD | {"id": id})
    assert [example.id for example in read_examples(tmp_path, "train")] == [str(id)]
    assert f"id '{id}' was already used on line 1" in error_of(tmp_path, GOOD | {"id": id}, GOOD | {"id": str(id)})


@pytest.mark.parametrize("id", [True, 1.5, [1]])
def test_other_values_are_no_ids(tmp_path, id):
    assert "field 'id' must be text" in error_of(tmp_path, GOOD | {"id": id})


@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_tables_as_spreadsheets_write_them(tmp_path, delimiter, encoding):
    rows = [("file", "prompt", "target", "start"), ("a.mp4", "was hört man?", "a, b; c\td", "2.5")]
    mark = "\ufeff" if encoding.endswith("e") else ""
    with (tmp_path / "train.csv").open("w", encoding=encoding, newline="") as stream:
        stream.write(mark)
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    assert read_examples(tmp_path, "train") == [Example("2", "a.mp4", 2.5, None, "was hört man?", "a, b; c\td")]


def test_a_jsonl_file_may_be_utf16(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD) + "\n", encoding="utf-16")
    assert [example.id for example in read_examples(tmp_path, "train")] == ["a"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16-le", "looks like UTF-16 text without a byte order mark: save it as UTF-8"),
        ("utf-16-be", "looks like UTF-16 text without a byte order mark: save it as UTF-8"),
        ("utf-32", "is UTF-32 text: save it as UTF-8"),
    ],
)
def test_other_encodings_are_named(tmp_path, suffix, encoding, message):
    file = tmp_path / f"train.{suffix}"
    file.write_text("file,prompt,target\na.mp4,what?,a bell\n", encoding=encoding)
    with pytest.raises(UserError, match=f"^{file}, line 1, column 1: {message}$"):
        read_examples(tmp_path, "train")


def test_utf16_that_is_cut_is_named_with_its_byte(tmp_path):
    (tmp_path / "train.csv").write_bytes("file,prompt,target\n".encode("utf-16") + b"\0")
    with pytest.raises(UserError, match="is UTF-16 text, damaged at byte 41: save it as UTF-8"):
        read_examples(tmp_path, "train")


def test_a_table_called_tsv_is_not_overlooked(tmp_path):
    (tmp_path / "train.tsv").write_text("file\tprompt\ttarget\na.mp4\twhat?\ta bell\n")
    with pytest.raises(UserError, match=r"train.tsv: rename it to train.csv, which may be separated by tabs"):
        read_examples(tmp_path, "train")


def test_an_id_used_twice_names_both_lines(tmp_path):
    assert "line 3: id 'a' was already used on line 1" in error_of(tmp_path, GOOD, GOOD | {"id": "b"}, GOOD)


def test_an_unknown_split_names_those_that_exist(tmp_path):
    write(tmp_path, GOOD)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="no split 'validation'; there are: test, train"):
        read_examples(tmp_path, "validation")
    with pytest.raises(UserError, match="no split '../data/train'"):
        read_examples(tmp_path, "../data/train")
    with pytest.raises(UserError, match="contains no examples"):
        read_examples(tmp_path, "test")
    with pytest.raises(UserError, match="no such data folder"):
        read_examples(tmp_path / "nowhere", "train")
