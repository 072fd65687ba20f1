"""Suites as files: what they say is what is run, and what is odd is refused in one line."""

import copy
from pathlib import Path

import pytest
import yaml

from mirasol.ablation.plan import plan_suite
from mirasol.ablation.runs import SuiteRuns, choose_task
from mirasol.ablation.suite import read_suite
from mirasol.cost.assumptions import Assumptions
from mirasol.errors import UserError


def change(values, key, value):
    """The values with `value` at a dotted key; None takes the key out."""
    changed = copy.deepcopy(values)
    *path, last = key.split(".")
    part = changed
    for name in path:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return changed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("titel", "x", "unknown key 'titel': did you mean 'title'"),
        ("reference", None, "missing key 'reference'"),
        ("reference", "plane", "'plane' does not exist: did you mean 'plain'"),
        ("rows", {}, "rows: none are left"),
        ("rows.heavy.colour", 1, "rows.heavy: unknown key 'colour'"),
        ("rows.heavy.expected", "greater", "choose better, worse, same"),
        ("rows.plain.expected", "better", "it is the reference itself"),
        ("rows.heavy.against", "light", "rows.heavy.against: 'light' does not exist"),
        ("rows.heavy.pretraining", "last", "rows.heavy.pretraining: 'last' does not exist"),
        ("rows.heavy.paper", "45.4 %", "rows.heavy.paper='45.4 %' must be of type float"),
        ("rows.heavy.paper", True, "rows.heavy.paper=True must be of type float"),
        ("rows.heavy.paper", float("nan"), "rows.heavy.paper=nan: give a number"),
        ("rows.heavy.label", 10, "rows.heavy.label=10: give text"),
        ("rows.heavy.label", ["a"], "rows.heavy.label=['a']: give text"),
        ("rows.heavy.control", "no_sound", "rows.heavy.control: 'no_sound' does not exist"),
        ("rows.heavy.overrides", {"seed": 3}, "rows.heavy.overrides.seed: a suite has its own"),
        ("rows.heavy.overrides", {"output": "x"}, "rows.heavy.overrides.output: a suite has its own"),
        ("metric", {"question_types": "order"}, "metric.question_types='order': give a list"),
        ("metric", {"question_types": []}, "metric.question_types=[]: give a list"),
        ("metric", {"split": 3}, "metric.split=3: give text"),
        ("render", {"a": {"root": 5}}, "render.a.root=5: give text"),
        ("render", {"a": {"root": "x", "kind": "flashs"}}, "render.a.kind='flashs': choose questions, whole"),
        ("preset", "tini", "preset: unknown preset 'tini': did you mean 'tiny'"),
        ("render", {"a": {"root": "x", "train": "many"}}, "render.a.train='many' must be of type int"),
        ("pretraining.first.recipe", 3, "pretraining.first.recipe=3: give text"),
        ("base", [1], "base=[1]: give a recipe's file"),
        ("rows.Heavy Row", {}, "is not a name"),
        ("seeds", 0, "seeds=0: give a positive number"),
        ("seeds", [1, 2, 1], "a seed appears twice"),
        ("seeds", True, "seeds=True"),
        ("margin", 5, "margin=5: give a share"),
        ("metric", {"protocol": "closed"}, "metric.protocol='closed': choose one of open, candidates"),
        ("pretraining.first.recipe", "absent.yaml", "absent.yaml: no such file"),
        ("pretraining.first.after", "first", "first comes after itself"),
        ("base", "absent.yaml", "no such recipe file"),
        ("extends", "other/suite.yaml", "give a file of the same folder"),
        ("extends", "two_rows.yaml", "extends itself"),
    ],
)
def test_odd_suites_are_refused_in_one_line(suite_file, suite_values, key, value, message):
    suite_file.write_text(yaml.safe_dump(change(suite_values, key, value), sort_keys=False))
    with pytest.raises(UserError) as raised:
        read_suite(suite_file)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["seed", "output"])
def test_what_a_suite_sets_itself_is_no_option(suite_file, key):
    with pytest.raises(UserError, match=f"^{key}=9 has no effect"):
        read_suite(suite_file, {key: 9})


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"question_types": ["nothing"]}, "has no 'nothing'"),
        ({"question_types": ["sight", "hearin"]}, "has no 'hearin': did you mean 'hearing'"),
    ],
)
def test_questions_that_the_data_do_not_have_are_refused_before_a_training(
    suite_file, suite_values, metric, message, tmp_path
):
    suite_file.write_text(yaml.safe_dump({**suite_values, "metric": metric}))
    with pytest.raises(UserError, match=message):
        SuiteRuns(read_suite(suite_file), tmp_path / "output").list_rows()


def test_rows_that_appear_twice_are_refused(suite_file):
    text = suite_file.read_text()
    suite_file.write_text(text + "\n  plain:\n    paper: 1.0\n")
    with pytest.raises(UserError, match="'plain' appears twice"):
        read_suite(suite_file)


def test_recipes_of_rows_are_checked_by_name(suite_file, suite_values):
    odd = change(suite_values, "rows.heavy.overrides", {"stages": {"questions": {"stepz": 3}}})
    suite_file.write_text(yaml.safe_dump(odd))
    with pytest.raises(UserError, match="two_rows: row heavy: unknown key 'stages.questions.stepz'"):
        read_suite(suite_file).build_recipe("heavy")


def test_a_suite_extends_another_and_options_reach_all_recipes(suite_file, suite_values, tmp_path):
    (suite_file.parent / "more.yaml").write_text("extends: two_rows.yaml\ntitle: More\nseeds: [4, 7]\n")
    options = {"optimizer": {"learning_rate": 0.5}, "pretraining": {"first": {"stages": {"slots": {"steps": 9}}}}}
    options["metric"] = {"split": "validation"}
    suite = read_suite(suite_file.parent / "more.yaml", options)
    assert (suite.name, suite.title, suite.seeds, list(suite.rows)) == ("more", "More", (4, 7), ["plain", "heavy"])
    assert suite.metric.split == "validation"
    assert suite.build_recipe("heavy").optimizer.learning_rate == 0.5
    assert suite.build_recipe("heavy").stages["questions"].loss_weights.text == 10
    assert suite.build_pretraining("first").stages["slots"].steps == 9
    assert suite.build_pretraining("first").optimizer.learning_rate != 0.5


def test_a_stage_of_another_name_is_not_trained_unnoticed(suite_file):
    """A misspelt override would leave the row as it was, and train another stage after it."""
    suite = read_suite(suite_file, {"stages": {"questoins": {"drop_audio": 1.0}}})
    with pytest.raises(UserError, match=r"row plain: stages\.questoins: .* did you mean 'questions'\?"):
        suite.build_recipe("plain")


def test_rows_that_are_the_same_run_are_named(suite_file, suite_values, tmp_path):
    suite_values["rows"]["other"] = {"pretraining": "first", "label": "an override without effect"}
    suite_file.write_text(yaml.safe_dump(suite_values, sort_keys=False))
    for rows, alike in ((None, True), (["plain", "heavy"], False)):
        runs = SuiteRuns(read_suite(suite_file), tmp_path / "out")
        notes = plan_suite(runs, runs.list_rows(rows), Assumptions(peak_tflops=1.0)).notes
        assert [note for note in notes if "same run" in note] == (
            ["plain, other: the same run in every respect: their numbers will be the same"] if alike else []
        )


def test_runs_of_a_seed_differ_in_nothing_but_their_overrides(suite_file, tmp_path):
    runs = SuiteRuns(read_suite(suite_file), tmp_path / "output")
    plain, heavy = (runs.make_row(name, 1) for name in ("plain", "heavy"))
    assert plain.needs is heavy.needs and plain.recipe.seed == heavy.recipe.seed == 1
    differing = {
        key for key in plain.identity["recipe"] if plain.identity["recipe"][key] != heavy.identity["recipe"][key]
    }
    assert differing == {"stages.questions.loss_weights.text"}
    for part in ("data", "start", "evaluation", "code", "versions"):
        assert plain.identity[part] == heavy.identity[part]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_tasks_cover_every_run_exactly_once(suite_file, tmp_path, count):
    every = SuiteRuns(read_suite(suite_file), tmp_path / "output").list_rows(seeds=range(5))
    parts = [run.name for index in range(count) for run in choose_task(every, f"{index}/{count}")]
    assert sorted(parts) == sorted(run.name for run in every) and len(set(parts)) == 10


@pytest.mark.parametrize("task", ["8/8", "1", "a/2", "-1/2", "1/0", "1/2/3"])
def test_odd_tasks_are_refused(task):
    with pytest.raises(UserError, match="give I/N"):
        choose_task([], task)


def test_missing_data_is_one_line(suite_file, suite_values, tmp_path):
    suite_file.write_text(yaml.safe_dump(change(suite_values, "base.data.root", str(tmp_path / "absent"))))
    with pytest.raises(UserError, match="absent") as raised:
        SuiteRuns(read_suite(suite_file), tmp_path / "output").list_rows()
    assert "\n" not in str(raised.value)


REPOSITORY = Path(__file__).parents[2]
SUITES = sorted(file for file in (REPOSITORY / "recipes" / "ablations").rglob("*.yaml") if "rows:" in file.read_text())


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_the_suites_of_the_project_can_be_read(file: Path):
    suite = read_suite(file)
    for row in suite.rows:
        suite.build_recipe(row)
    for name in suite.pretraining:
        suite.build_pretraining(name)
    assert suite.about and len(suite.seeds) >= 5


@pytest.mark.slow
def test_the_suite_at_equal_flops_has_them_as_its_dry_run_counts(data_root, tmp_path):
    """Within 5 % of the Transformer's, where the rows of `combiners` are as much as a fifth apart."""
    data = {"data": {"root": str(data_root)}}
    spread = {}
    for name in ("combiners_equal_flops", "combiners"):
        file = REPOSITORY / "recipes" / "ablations" / f"{name}.yaml"
        suite = read_suite(file, {**data, "pretraining": {"segments": data}})
        runs = SuiteRuns(suite, tmp_path / name)
        chosen = runs.list_rows(seeds=[0], rows=None if name != "combiners" else ["transformer", "concat", "direct"])
        costs = plan_suite(runs, chosen, Assumptions(peak_tflops=0.1)).runs
        flops = {run.name.partition("/")[0]: costs[run.name].flops for run in chosen}
        spread[name] = {row: count / flops["transformer"] - 1 for row, count in flops.items()}
    equal = spread["combiners_equal_flops"]
    assert len(equal) == 7 and {row: share for row, share in equal.items() if abs(share) > 0.05} == {}
    assert spread["combiners"]["concat"] > 0.1 and spread["combiners"]["direct"] < -0.05
