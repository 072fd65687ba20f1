"""docs/real-recordings.md says what is true: its commands exist, its numbers are those of the code."""

import re
from pathlib import Path

import pytest

from mirasol.cli.main import main
from mirasol.cli.tables.experiment import FOLDS, NAMES, SEEN_HEARD
from mirasol.config.recipe_io import load_recipe
from mirasol.experiments import baselines, digit_clips, digit_scenes
from mirasol.experiments.folder import RESULTS, TABLE, find_recipe
from mirasol.experiments.named import EXPERIMENTS

PAGE = (Path(__file__).parents[2] / "docs" / "real-recordings.md").read_text(encoding="utf-8")
FLAT = " ".join(PAGE.split())
COMMANDS = re.findall(r"^    (mirasol experiment .*)$", PAGE, re.MULTILINE)


def test_every_experiment_has_a_command_and_a_recipe():
    assert {command.split()[2] for command in COMMANDS} == set(NAMES)
    assert set(EXPERIMENTS) == set(FOLDS)
    for name in NAMES:
        load_recipe(find_recipe(name))


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_come_as_far_as_the_recordings(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split()[1:])
    assert ended.value.code == 2 and "no such folder of recordings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        f"C = {baselines.INVERSE_PENALTY}",
        f"{baselines.TREES} trees",
        "the means of four equal parts" if baselines.PARTS == 4 else "?",
        "0, 90 and 180 of 255" if digit_clips.PICTURE_NOISE == (0, 90, 180) else "?",
        "none, 0 dB and -9.5 dB" if digit_clips.SOUND_NOISE == (0, 1, 3) else "?",
        "all nine combinations" if digit_scenes.STEPS**2 == 9 else "?",
        f"Recordings over {digit_clips.LONGEST_SECONDS} s are left out",
        "70, 10 and 20 %" if digit_clips.IMAGE_BLOCKS["test"] == (0.8, 1.0) else "?",
        f"`{TABLE}`, `{RESULTS}`",
    ],
)
def test_its_numbers_and_names_are_those_of_the_code(words):
    assert words in FLAT


def test_it_shows_each_type_of_question():
    sources = digit_scenes.Sources({digit: [digit] for digit in range(10)}, {digit: ["a.wav"] for digit in range(10)})
    scenes = [digit_scenes.make_digit_scene(sources, 0, "test", index) for index in range(200)]
    asked = {
        question.prompt: question.question_type for s in scenes for question in digit_scenes.list_digit_questions(s)
    }
    [table] = re.findall(r"\| type \| example.*?\n\n", PAGE, re.DOTALL)
    shown = re.findall(r"((?:which|are|how)[^?|]*\?)", table)
    assert {asked[prompt] for prompt in shown} == set(asked.values())
    assert SEEN_HEARD in FLAT
