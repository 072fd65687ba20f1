"""Folders of real recordings: what their names say, what is left out and why, what is never split."""

import os
from collections import Counter
from pathlib import Path

import pytest
from fake_recordings import CLASSES, make_esc10, make_spoken_digits, write_wav
from media_making import tone

from mirasol.errors import UserError
from mirasol.experiments.folds import choose_splits
from mirasol.experiments.recordings import read_esc10, read_spoken_digits


def test_names_say_class_and_fold_and_what_is_left_out_has_a_reason(tmp_path):
    found = read_esc10(make_esc10(tmp_path / "esc"))
    assert found.labels == ("dog bark", "rain")
    assert found.groups == ("1", "2", "3")
    assert len(found.clips) == 2 * 3 * 2 + 1
    reasons = dict(found.left_out)
    assert reasons["002 - Rain/2-88-A.ogg"] == "is empty"
    assert reasons.keys() == {"002 - Rain/2-88-A.ogg", "002 - Rain/rain (copy).ogg", "notes/1-5-A.wav"}
    assert "left out 3" in found.describe()


def test_digits_are_words_and_groups_are_speakers(tmp_path):
    found = read_spoken_digits(make_spoken_digits(tmp_path / "fsdd"))
    assert {(clip.label, clip.group) for clip in found.clips if clip.file == "7_bert_0.wav"} == {("seven", "bert")}
    assert found.groups == ("anna", "bert", "carl")
    assert dict(found.left_out) == {"3_anna_77.wav": "is empty", "README.md": "not named like '7_jackson_32.wav'"}


@pytest.mark.parametrize("tune", [False, True])
def test_a_group_is_never_on_both_sides(tmp_path, tune):
    found = read_esc10(make_esc10(tmp_path / "esc"))
    for split in choose_splits(found, (), tune):
        sides = [{clip.group for clip in clips} for clips in (split.train, split.test)]
        assert not sides[0] & sides[1]
        everywhere = sides[0] | sides[1]
        assert everywhere == set(found.groups) - ({split.group} if tune else set())


def test_clips_of_one_recording_in_two_folds_are_refused(tmp_path):
    root = make_esc10(tmp_path / "esc")
    write_wav(root / CLASSES[0] / "2-1010-B.wav", tone(0.5, 8_000)[0], 8_000)  # 1-1010-A is there
    with pytest.raises(UserError, match="recording 1010 are in folds 1 and 2"):
        read_esc10(root)


def test_other_folders_are_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_esc10(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not ESC-10"):
        read_esc10(make_spoken_digits(tmp_path / "fsdd"))
    with pytest.raises(UserError, match="all recordings are of group anna"):
        read_spoken_digits(make_spoken_digits(tmp_path / "one", ("anna",)))
    found = read_spoken_digits(tmp_path / "fsdd")
    with pytest.raises(UserError, match="--groups dora: the data has no such group: choose anna, bert, carl"):
        choose_splits(found, ("dora",), tune=False)


def test_the_real_data_sets_are_as_published():
    root = Path(os.environ.get("MIRASOL_REAL_DATA", "")) / "real"
    if not (root / "esc10").is_dir():
        pytest.skip("MIRASOL_REAL_DATA names no folder with real/: the real data sets are not shown")
    sounds, speech = read_esc10(root / "esc10"), read_spoken_digits(root / "fsdd")
    assert set(Counter((clip.label, clip.group) for clip in sounds.clips).values()) == {8}
    assert (len(sounds.labels), sounds.groups, sounds.left_out) == (10, ("1", "2", "3", "4", "5"), ())
    assert Counter(clip.group for clip in speech.clips) == dict.fromkeys(speech.groups, 500)
    assert len(speech.groups) == 6
