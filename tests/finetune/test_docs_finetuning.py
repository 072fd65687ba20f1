"""docs/finetuning.md says what is true: its lines are printed, its names and numbers are those of the rules."""

import re
import shutil
from pathlib import Path

import pytest

from mirasol.cli.main import make_parser
from mirasol.finetune import choices, measure, splits, survey
from mirasol.finetune.labels import ALIASES
from mirasol.finetune.layouts import read_labels

PAGE = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
FLAT = " ".join(PAGE.split())


def test_its_five_lines_are_those_of_such_a_folder(shapes, tmp_path, monkeypatch):
    for number, file in enumerate(sorted((shapes / "clips").rglob("*.mp4"))):
        folder = tmp_path / "data" / "mine" / ("left", "right")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    monkeypatch.chdir(tmp_path)
    [shown] = re.findall(r"```\n(folder: .*?)```", PAGE, re.DOTALL)
    assert survey.survey_folder(read_labels(Path("data/mine")), 0).format_lines() == shown.splitlines()


@pytest.mark.parametrize("words", [line.split() for line in re.findall(r"`?(mirasol [^`\n]*)", PAGE)], ids=" ".join)
def test_its_commands_can_be_typed(words):
    known = {action for action in make_parser([])._subcommands_action._name_parser_map}  # noqa: C416
    if words[1] not in known:
        pytest.skip("prose")
    options = make_parser([])._subcommands_action._name_parser_map[words[1]].format_help()
    for option in (word for word in words if word.startswith("--") and word != "--config"):
        assert option in options


def test_it_names_every_column():
    for name in ("file", "target", "prompt"):
        for alias in ALIASES[name]:
            assert f"`{alias}`" in PAGE or alias in ("file_name", "description"), alias


@pytest.mark.parametrize(
    "words",
    [
        f"about {choices.STEPS_WANTED} steps, {choices.FEWEST_EPOCHS} to {choices.MOST_EPOCHS} epochs",
        f"as a power of two, {choices.SMALLEST_BATCH} to {choices.LARGEST_BATCH}",
        f"the median, at most {choices.MOST_QUESTIONS}",
        f"within {measure.MEMORY_SHARE:.0%} of the free memory".replace("%", " %"),
        f"√({choices.REFERENCE_WIDTH} / width of the text decoder) × √(clips of a step / {choices.REFERENCE_BATCH})",
        f"more than {choices.LARGE_MODEL // 10**6}M parameters and fewer than {choices.FEW_CLIPS:,} clips",
        f"{choices.VALIDATIONS} times, on up to {choices.MOST_VALIDATED} clips",
        f"with {choices.ENOUGH_FOR_ACCURACY} validation clips or more",
        f"{choices.PATIENCE} validations without a better one",
        f"of more than {choices.DECODED_BEFORE:,} clips `ahead`",
        f"of more than {survey.MOST_HEADERS:,} files a sample is opened",
        "a fifth of the videos test" if splits.TEST_SHARE == 0.2 else "?",
        "a seventh validate" if round(1 / splits.VALIDATION_SHARE) == 7 else "?",
    ],
)
def test_its_numbers_are_those_of_the_rules(words):
    assert words in FLAT
