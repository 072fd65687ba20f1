"""docs/ablations.md says what is true: its options exist, its suites are there, its example is one."""

import re
from pathlib import Path

import pytest
import yaml

from mirasol.ablation.statistics import compute_t_quantile
from mirasol.ablation.suite import read_suite
from mirasol.cli.main import make_parser
from mirasol.synthetic.synthesize import KINDS

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "ablations.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    re.findall(r"^(mirasol ablate [^#\n]*)", PAGE.replace("\\\n", " "), re.MULTILINE),
    ids=lambda line: line[:60],
)
def test_its_commands_can_be_typed(line):
    shown = make_parser([])._subcommands_action._name_parser_map["ablate"].format_help()
    for option in re.findall(r"--[a-z-]+(?![\w.-])", line):
        assert option in shown
    for suite in re.findall(r"recipes/\S+\.yaml", line):
        assert read_suite(REPOSITORY / suite).rows


def test_its_suites_are_those_of_the_project():
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    files = [file for file in (REPOSITORY / "recipes" / "ablations").glob("*.yaml") if "rows:" in file.read_text()]
    assert named == {file.stem for file in files}


def test_its_kinds_and_numbers_are_those_of_the_code():
    for kind in re.findall(r"`(\w*flashes)`", PAGE):
        assert kind in KINDS
    assert f"{compute_t_quantile(4):.2f} for five seeds" in PAGE


def test_its_example_is_a_suite(suite_file):
    [example] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    values = yaml.safe_load(example)
    base = yaml.safe_load(suite_file.read_text())["base"]
    del values["extends"]
    file = suite_file.with_name("example.yaml")
    file.write_text(yaml.safe_dump({**values, "base": base}))
    suite = read_suite(file)
    assert suite.rows["silent"].control == "no_audio" and suite.metric.question_types == ["order", "range"]
    assert suite.build_recipe("text_high").stages["questions"].loss_weights.text == 10
