"""What is told of clips before anything trains: lengths, sound, what is left out; five lines and remarks."""

import shutil

import numpy as np
import pytest
from media_making import Audio, tone, write_media
from untrained import only_stream

from mirasol.errors import UserError
from mirasol.finetune.layouts import read_labels
from mirasol.finetune.splits import NAMES
from mirasol.finetune.survey import choose_media, read_headers, survey_folder


@pytest.fixture
def clips(shapes, tmp_path):
    """A folder with two classes of three rendered clips each."""
    files = sorted((shapes / "clips").rglob("*.mp4"))[:6]
    for number, file in enumerate(files):
        folder = tmp_path / "mine" / ("left", "right")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    return tmp_path / "mine"


def survey(root):
    return survey_folder(read_labels(root), 0)


def test_five_lines_say_what_was_understood(clips):
    (clips / "left" / "page.mp4").write_text("<!DOCTYPE html><html></html>")
    (clips / "right" / "cut.mp4").write_bytes(next((clips / "right").iterdir()).read_bytes()[:500])
    shutil.copy(next((clips / "left").glob("t*.mp4")), clips / "loose.mp4")
    found = survey(clips)
    lines = found.format_lines()
    assert len(lines) == 5
    assert "folders named after classes" in lines[0]
    assert "2 classes to 'what is it?': left 3, right 3" in lines[1]
    assert lines[2].startswith("clips:    6 in 8 files")
    assert "2 unreadable, 1 without a label, 0 labels without a clip; 0 clips have no sound" in lines[3]
    assert "drawn by video, seed 0" in lines[4]
    assert {problem.kind for problem in found.left_out} == {"unreadable", "without a label"}
    [named] = [remark for remark in found.list_remarks() if "cannot be read" in remark]
    assert "left/page.mp4: " in named and "right/cut.mp4: " in named
    assert sum(len(found.splits.examples[name]) for name in NAMES) == 6
    assert all(4 <= seconds <= 6.1 for seconds in found.seconds)


def test_clips_without_sound_or_pictures_are_told(clips, tmp_path):
    for kind, lost in (("video", "sound"), ("audio", "pictures")):
        root = tmp_path / kind
        for file in clips.rglob("*.mp4"):
            only_stream(kind, file, root / file.relative_to(clips).with_suffix(".mkv"))
        found = survey(root)
        assert f"6 {'clips have no sound' if lost == 'sound' else 'no pictures'}" in found.format_lines()[3]
        assert any(remark.startswith(f"no clip has {lost}") for remark in found.list_remarks())


def test_very_short_and_very_long_clips_together_are_told(tmp_path):
    for name, seconds in (("a/short.wav", 0.1), ("a/long.wav", 700.0), ("b/one.wav", 1.0), ("b/two.wav", 2.0)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_media(tmp_path / name, Audio([(0.0, tone(seconds, 8000))], rate=8000, codec="pcm_s16le"))
    found = survey(tmp_path)
    assert found.seconds == pytest.approx([0.1, 1.0, 2.0, 700.0], abs=0.02)
    assert any("0.1 s and of 700 s together" in remark for remark in found.list_remarks())


def test_nothing_readable_is_one_line(tmp_path):
    for name in ("a/1.mp4", "b/2.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(900))
    with pytest.raises(UserError, match=r"none of 2 clips can be read, the first: a/1\.mp4"):
        survey(tmp_path)


def test_of_many_files_the_same_sample_is_opened(clips):
    media = [f"{number}.mp4" for number in range(1000)]
    assert len(set(choose_media(media, 10))) == 10
    assert choose_media(media, 10) == choose_media(media, 10) == choose_media(media[::-1], 10)
    assert choose_media(media, 1000) == media
    headers, reasons = read_headers(clips, ["left/gone.mp4"])
    assert not headers and reasons == {"left/gone.mp4": "No such file or directory"}
