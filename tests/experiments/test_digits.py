"""Digits seen and heard: answers follow from what is shown and played, nothing can be guessed from the question, and
test clips show no image and play no speaker of the training."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_recordings import make_spoken_digits
from made_once import make_once

from mirasol.errors import UserError
from mirasol.experiments.digit_clips import (
    GRID,
    LONGEST_SECONDS,
    SAMPLE_RATE,
    choose_sources,
    load_images,
    read_sound,
    render_scene,
    write_digits,
)
from mirasol.experiments.digit_scenes import SLOTS, STEPS, Sources, list_digit_questions, make_digit_scene
from mirasol.experiments.recordings import DIGITS, read_spoken_digits

SOURCES = Sources({digit: [digit] for digit in range(10)}, {digit: [f"{digit}.wav"] for digit in range(10)})
COUNTS = {"train": 2, "validation": 1, "test": 1, GRID: 1}


@pytest.fixture(scope="session")
def spoken(tmp_path_factory) -> Path:
    return make_once(tmp_path_factory, "spoken-digits", make_spoken_digits)


def test_answers_follow_from_the_scene():
    for index in range(200):
        scene = make_digit_scene(SOURCES, 0, "train", index)
        for question in list_digit_questions(scene):
            words = question.prompt.rstrip("?").split()
            named = next((DIGITS.index(word) for word in words if word in DIGITS), None)
            if question.template == "while said":
                assert [scene.written[scene.said.index(named)]] == [DIGITS.index(question.target)]
            elif question.template == "said after":
                assert scene.said[scene.said.index(named) + 1] == DIGITS.index(question.target)
            elif question.template == "written after":
                assert scene.written[scene.written.index(named) + 1] == DIGITS.index(question.target)
            assert question.target in question.candidates
        if scene.is_agreeing:
            assert scene.written == scene.said


def test_no_question_can_be_guessed_from_its_words():
    scenes = [make_digit_scene(SOURCES, 1, "test", index) for index in range(1500)]
    questions = [question for scene in scenes for question in list_digit_questions(scene)]
    for kind in ("sight", "hearing", "either", "bound", "order", "same"):
        own = [question for question in questions if question.question_type == kind]
        chance = 1 / len(own[0].candidates)
        most = Counter(question.target for question in own).most_common(1)[0][1]
        assert most / len(own) < 1.3 * chance, kind
        repeated = sum(question.target in question.prompt.rstrip("?").split() for question in own)
        assert repeated / len(own) < 1.5 * chance, kind


def test_noise_steps_leave_the_scene_as_it_is_and_only_cover_it(spoken):
    sources = choose_sources(read_spoken_digits(spoken))["test"]
    scenes = {
        (picture, sound): make_digit_scene(sources, 0, GRID, 0, (picture, sound), agrees=True)
        for picture in range(STEPS)
        for sound in range(STEPS)
    }
    assert len({scene.seconds for scene in scenes.values()}) == 1
    rendered = {steps: render_scene(scene, spoken) for steps, scene in scenes.items()}
    clean, clean_sound = rendered[0, 0]
    assert clean.shape == (SLOTS * 8, 64, 64, 3) and clean_sound.shape == (1, SLOTS * SAMPLE_RATE)
    far = [np.abs(rendered[step, 0][0].astype(float) - clean).mean() for step in range(STEPS)]
    loud = [np.abs(rendered[0, step][1] - clean_sound).mean() for step in range(STEPS)]
    assert far[0] == 0 < far[1] < far[2] and loud[0] == 0 < loud[1] < loud[2]
    np.testing.assert_array_equal(rendered[2, 0][1], clean_sound)
    np.testing.assert_array_equal(rendered[0, 2][0], clean)


def test_splits_share_neither_speaker_nor_image(spoken):
    sources = choose_sources(read_spoken_digits(spoken))
    images = {split: {image for own in part.images.values() for image in own} for split, part in sources.items()}
    speakers = {
        split: {name.split("_")[1] for own in part.recordings.values() for name in own}
        for split, part in sources.items()
    }
    assert speakers == {"train": {"anna"}, "validation": {"bert"}, "test": {"carl"}}
    assert sum(map(len, images.values())) == len(set.union(*images.values())) == len(load_images()[1])
    said = {name for own in sources["train"].recordings.values() for name in own}
    assert "4_anna_78.wav" not in said  # longer than its second has room for
    assert all(len(read_sound(spoken / name)) <= LONGEST_SECONDS * SAMPLE_RATE for name in said)


def test_what_is_written_is_the_data_sets_own_format_and_the_same_again(spoken, tmp_path):
    from mirasol.data.datasets.folder import read_examples

    found = read_spoken_digits(spoken)
    for name in ("one", "two"):
        write_digits(tmp_path / name, found, COUNTS, seed=5)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len([file for file in files if file.suffix == ".mp4"]) == 2 + 1 + 1 + STEPS**2
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    for split in ("train", "validation", "test", GRID):
        for example in read_examples(tmp_path / "one", split):
            assert (tmp_path / "one" / example.media).is_file()
            assert example.question_type != "second" or example.end - example.start == 1.0
    rows = [json.loads(line) for line in (tmp_path / "one" / "grid.jsonl").read_text().splitlines()]
    assert Counter(row["question_type"] for row in rows) == {"either": SLOTS * STEPS**2}
    with pytest.raises(UserError, match="one"):
        write_digits(tmp_path / "one", found, COUNTS, seed=5)


def test_two_speakers_are_too_few(tmp_path):
    found = read_spoken_digits(make_spoken_digits(tmp_path / "two", ("anna", "bert")))
    with pytest.raises(UserError, match="2 speakers: seen_heard needs three"):
        choose_sources(found)
