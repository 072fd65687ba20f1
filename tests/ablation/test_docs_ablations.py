"""docs/ablations.md says what is true: its options exist, its suites are there, its example is one."""

import json
import re
import tarfile
from pathlib import Path

import pytest
import yaml

from mirasol.ablation.pack import PACKED
from mirasol.ablation.result import RESULTS, collect_result
from mirasol.ablation.statistics import Spread, compute_t_quantile, judge
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


RUN = sorted((REPOSITORY / "benchmarks" / "results" / "ablations").iterdir())


@pytest.mark.parametrize("folder", RUN, ids=lambda folder: folder.name)
def test_its_tables_are_those_of_the_results(folder):
    table = [line for line in (folder / "table.md").read_text(encoding="utf-8").splitlines() if line]
    missing = [line for line in table if line not in PAGE.splitlines()]
    assert len(table) > 4 and not missing
    assert (REPOSITORY / "docs" / "images" / f"ablations-{folder.name}.png").is_file()


@pytest.mark.parametrize("folder", RUN, ids=lambda folder: folder.name)
def test_the_results_are_of_the_suites_as_they_are(folder):
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    suite = read_suite(REPOSITORY / "recipes" / "ablations" / f"{folder.name}.yaml")
    assert {row["name"] for row in found["rows"]} <= set(suite.rows) and found["suite"]["reference"] == suite.reference
    for row in found["rows"]:
        claim = suite.rows[row["name"]]
        assert (row["paper"], row["expected"]) == (claim.paper, claim.expected)
        if row["verdict"] is not None:
            assert row["verdict"] == judge(Spread(**row["difference"]), claim.expected, suite.margin)


@pytest.mark.parametrize("file", [folder / PACKED for folder in RUN if (folder / PACKED).is_file()], ids=str)
def test_the_results_are_those_of_the_packed_runs(file, tmp_path):
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    stored = json.loads(file.with_name(RESULTS).read_text(encoding="utf-8"))
    drawn = collect_result(tmp_path).to_dict()
    for part in ("suite", "rows", "baselines", "missing", "curves"):
        assert_alike(drawn[part], stored[part], part)


def assert_alike(drawn, stored, where):
    """Equal, numbers up to the last digits, in which processors differ."""
    if isinstance(stored, dict):
        assert drawn.keys() == stored.keys(), where
        for key, value in stored.items():
            assert_alike(drawn[key], value, f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(drawn) == len(stored), where
        for place, pair in enumerate(zip(drawn, stored, strict=True)):
            assert_alike(*pair, f"{where}[{place}]")
    elif isinstance(stored, float):
        assert drawn == pytest.approx(stored, rel=1e-9, abs=1e-12), where
    else:
        assert drawn == stored, where


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
