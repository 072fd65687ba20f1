"""`mirasol data check`: what it finds in media, what it counts, how it ends."""

import json
import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from mirasol.cli.main import main
from mirasol.data.check import check_dataset, format_report


def write_clip(path, seconds: float = 1.0, container: str = "mp4") -> None:
    """Grey pictures without sound."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(round(seconds * 8)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 9 % 255, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.fixture
def root(tmp_path, shapes):
    """A folder with one of everything: whole, silent, in another container, a page, broken, twice, missing."""
    shutil.copy(sorted((shapes / "clips" / "test").iterdir())[0], tmp_path / "good.mp4")
    write_clip(tmp_path / "silent.mp4", 3.0)
    write_clip(tmp_path / "matroska.mp4", 1.5, "matroska")
    shutil.copy(tmp_path / "silent.mp4", tmp_path / "copy.mp4")
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    names = ["good", "silent", "matroska", "copy", "page", "broken", "missing"]
    rows = [{"file": f"{name}.mp4", "prompt": "what?", "target": "red", "question_type": "sight"} for name in names]
    rows.append({"file": "silent.mp4", "start": 2, "end": 9, "prompt": "what?", "target": "red"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    good = {"file": "good.mp4", "prompt": "what?", "target": "red"}
    (tmp_path / "test.jsonl").write_text(json.dumps(good) + "\n")
    return tmp_path


def test_everything_wrong_is_found_and_counted(root):
    report = check_dataset("folder", root, "train")
    assert not report.good
    assert report.splits["train"]["examples"] == 8
    assert report.splits["train"]["types"] == {"sight": 7, "untyped": 1}
    assert {(p.kind, p.file) for p in report.problems} == {
        ("malformed", "train.jsonl"),
        ("missing media", "missing.mp4"),
        ("not media", "page.mp4"),
        ("undecodable", "broken.mp4"),
        ("named otherwise", "matroska.mp4"),
        ("window outside", "silent.mp4"),
        ("identical files", "silent.mp4"),
    }
    media = report.media
    assert (media["n_annotated"], media["n_found"], media["n_usable"]) == (9, 7, 4)
    assert media["n_annotated"] == media["n_usable"] + sum(media["reasons"].values())
    assert (media["files"], media["missing"], media["undecodable"]) == (6, 1, 2)
    assert (media["without_audio"], media["duplicates"]) == (3, 1)
    histogram = media["seconds"]["histogram"]
    assert sum(histogram.values()) == 4
    assert (histogram["< 2"], histogram["< 5"]) >= (1, 2)


def test_a_file_cut_short_costs_the_examples_that_ask_for_what_is_not_there(tmp_path, capsys):
    write_clip(tmp_path / "cut.mkv", 4.0, "matroska")
    content = (tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 6 // 10])
    windows = [{}, {"start": 0, "end": 0.5}, {"start": 3.5, "end": 4}, {"start": 3, "end": 9}]
    rows = [{"file": "cut.mkv", "prompt": "what?", "target": "red", **window} for window in windows]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_dataset("folder", tmp_path)
    assert [(p.kind, p.file, p.examples) for p in report.problems] == [
        ("cut short", "cut.mkv", 2),
        ("window outside", "cut.mkv", 1),
    ]
    assert report.media["reasons"] == {"cut short": 2, "window outside": 1}
    assert (report.media["n_usable"], report.media["undecodable"]) == (1, 0)
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "folder", str(tmp_path)])
    assert stop.value.code == 1
    assert "cut.mkv: cut short: holds data for" in capsys.readouterr().out


def test_a_file_that_ends_early_is_a_warning_where_no_header_says_how_long_it_is(tmp_path, capsys):
    write_clip(tmp_path / "whole.ts", 4.0, "mpegts")
    (tmp_path / "cut.ts").write_bytes((tmp_path / "whole.ts").read_bytes()[:9000])
    rows = [{"file": name, "prompt": "what?", "target": "red"} for name in ("whole.ts", "cut.ts")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["data", "check", "folder", str(tmp_path)])
    told = capsys.readouterr().out
    assert "warning: ends early (1)\n  cut.ts: cut short: its last packet is incomplete; read as all there is\n" in told
    assert "usable 2" in told


def test_a_file_longer_than_its_header_says_is_a_warning(tmp_path, capsys):
    write_clip(tmp_path / "long.mkv", 4.0, "matroska")
    data = bytearray((tmp_path / "long.mkv").read_bytes())
    struct.pack_into(">d", data, data.index(b"\x44\x89\x88") + 3, 1000.0)
    (tmp_path / "long.mkv").write_bytes(data)
    row = {"file": "long.mkv", "prompt": "what?", "target": "red", "start": 2.0, "end": 4.0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    main(["data", "check", "folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "warning: header too short (1)\n  long.mkv: its header says 1.000 s, it holds 4.0" in printed
    assert "usable 1" in printed


def test_recordings_joined_in_one_file_are_a_warning(tmp_path, capsys):
    write_clip(tmp_path / "one.ts", 2.0, "mpegts")
    (tmp_path / "two.ts").write_bytes((tmp_path / "one.ts").read_bytes() * 2)
    row = {"file": "two.ts", "prompt": "what?", "target": "red", "start": 2.5, "end": 3.5}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    main(["data", "check", "folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "warning: several recordings (1)\n  two.ts: time stamps start over at 2.0" in printed
    assert "usable 1" in printed


def test_the_report_does_not_depend_on_the_number_of_workers(root):
    assert check_dataset("folder", root, workers=3) == check_dataset("folder", root)


def test_a_video_in_two_splits_is_a_warning(root):
    report = check_dataset("folder", root)
    assert [p.file for p in report.problems if p.kind == "video in two splits"] == ["good.mp4"]
    assert list(report.splits) == ["test", "train"]


def test_media_need_not_be_opened(root):
    media = check_dataset("folder", root, "train", open_media=False).media
    assert (media["files"], media["n_usable"], media["reasons"]) == (0, 7, {"malformed": 1, "missing media": 1})


def test_a_file_that_cannot_be_read_on_is_a_problem_of_its_split(tmp_path):
    (tmp_path / "val_qa.json").write_text('[{"answer"')
    report = check_dataset("msrvtt_qa", tmp_path)
    assert report.splits["validation"]["examples"] == 0
    assert [(p.kind, p.line, p.column) for p in report.problems] == [("malformed", 1, 11)]


def test_counts_stand_beside_the_published(tmp_path):
    rows = [{"answer": "red", "category_id": 1, "id": 1, "question": "what is it?", "video_id": 1}]
    (tmp_path / "val_qa.json").write_text(json.dumps(rows))
    text = format_report(check_dataset("msrvtt_qa", tmp_path))
    assert "validation: 1 examples (published 12278), 1 videos (published 497)" in text
    assert "  what: 1 (published 8337)" in text and "  who: 0 (published 3439)" in text


def test_images_are_decoded(tmp_path):
    with av.open(str(tmp_path / "good.jpg"), "w", format="image2") as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff" + bytes(30))
    (tmp_path / "train.csv").write_text("filepath,caption\ngood.jpg,grey\nbad.jpg,grey\n")
    report = check_dataset("image_text", tmp_path)
    assert [(p.kind, p.file) for p in report.problems] == [("undecodable", "bad.jpg")]
    assert report.media["without_audio"] == 0


# The command


def test_the_command_ends_with_1_where_something_is_wrong(root, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "folder", str(root), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1
    assert set(found) == {"splits", "media", "problems"}
    assert all({"examples", "videos", "types"} <= set(entry) for entry in found["splits"].values())
    assert all(problem["message"] and problem["kind"] for problem in found["problems"])


def test_the_command_ends_well_where_nothing_is_wrong(shapes, capsys):
    main(["data", "check", "folder", str(shapes), "--split", "test"])
    assert capsys.readouterr().out.endswith("no problems found\n")


def test_the_help_tells_the_choices_and_where_options_belong(capsys):
    with pytest.raises(SystemExit):
        main(["data", "check", "--help"])
    out = capsys.readouterr().out
    assert "--targets all|one" in out
    assert "Which of --annotations, --class-list," in out and "is in its section there" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nothing", "."], "'nothing' is not known: choose folder, msrvtt_qa"),
        (["folder", "nowhere"], "nowhere: no such data folder"),
        (["audioset", ".", "--targets", "some"], "--targets some: choose all or one"),
        (["msrvtt_qa", ".", "--class-list", "x"], "msrvtt_qa does not have this option"),
    ],
)
def test_what_the_user_mistyped_ends_with_2(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", *arguments])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert part in err and err.count("\n") == 1
