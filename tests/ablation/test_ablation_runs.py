"""Runs: killed and continued they are what they were, and nothing of another recipe, code or data is taken for them."""

import dataclasses
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

import pytest
import yaml
from suite_making import SMALL_MODEL, list_results

from mirasol.ablation import identity, run
from mirasol.ablation.execute import choose_executor, make_runs, run_here
from mirasol.ablation.figures import draw_forest
from mirasol.ablation.plan import _find_text_length, plan_suite
from mirasol.ablation.report import write_result
from mirasol.ablation.result import collect_result
from mirasol.ablation.runs import SuiteRuns
from mirasol.ablation.suite import read_suite
from mirasol.ablation.tables import format_text
from mirasol.checkpoint import load_processor
from mirasol.cli.main import main
from mirasol.config.recipe import TokenizerRecipe
from mirasol.cost.assumptions import Assumptions
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.files import hold_folder, write_file_atomically


@pytest.fixture
def runs(finished_suite, tmp_path) -> SuiteRuns:
    """A copy of the finished suite, for tests to change."""
    shutil.copytree(finished_suite.parent, tmp_path / "copy")
    # Recipes name the folder of the pretraining, and identities do not: the copy is as finished as the original.
    return SuiteRuns(read_suite(tmp_path / "copy" / "suite" / "two_rows.yaml"), tmp_path / "copy" / "output")


def test_a_finished_suite_is_left_as_it_is(runs, monkeypatch):
    monkeypatch.setattr(run, "_train", lambda one: pytest.fail("trained again"))
    monkeypatch.setattr(run, "_evaluate", lambda one: pytest.fail("evaluated again"))
    chosen = runs.list_rows()
    make_runs(runs.list_left(chosen), run_here, lambda name, facts: pytest.fail(name))
    assert all(one.finished for one in chosen)


def test_rows_start_from_the_same_pretraining_and_differ_by_seed(finished_suite):
    found = list_results(finished_suite)
    assert sorted(found) == ["heavy/seed-0", "heavy/seed-1", "plain/seed-0", "plain/seed-1"]
    assert len({weights for weights, _, _ in found.values()}) == 4
    assert len({tuple(answers["id"]) for _, _, answers in found.values()}) == 1
    assert len(list((finished_suite / "shared" / "pretraining").iterdir())) == 1


def test_rows_begin_as_soon_as_their_own_pretraining_is_finished(suite_file, suite_values, tmp_path):
    """A row from scratch is made while the pretraining of another one cannot go on."""
    model = {"new": None, "preset": "tiny", "overrides": SMALL_MODEL}
    suite_values["rows"]["scratch"] = {"overrides": {"model": model, "tokenizer": {"vocab_size": 300}}}
    suite_file.write_text(yaml.safe_dump({**suite_values, "seeds": 1}, sort_keys=False))
    runs = SuiteRuns(read_suite(suite_file), tmp_path / "output")
    left, finished = runs.list_left(runs.list_rows()), []
    pretraining = left[0].folder
    pretraining.mkdir(parents=True)
    with ExitStack() as held:
        held.enter_context(hold_folder(pretraining))
        too_late = Timer(120, held.close)  # where rows wait for all pretrainings, the order is wrong and nothing hangs
        held.callback(too_late.cancel)
        too_late.start()

        def report(name: str, facts: dict) -> None:
            finished.append(name)
            held.close()

        make_runs(left, choose_executor("local", 2), report)
    assert finished[0] == "scratch/seed-0" and finished[1] == "pretraining/first"
    assert sorted(finished[2:]) == ["heavy/seed-0", "plain/seed-0"]


class Killed(BaseException):
    """What nothing catches, as a kill."""


def test_killed_between_any_two_writes_a_run_ends_as_if_it_was_not(runs, finished_suite, monkeypatch):
    shutil.rmtree(runs.output / "runs" / "heavy" / "seed-1")
    shutil.rmtree(runs.shared / "rows")  # which would have it copied
    written = []

    def write_and_die(file: Path, text: str) -> None:
        write_file_atomically(file, text)
        if file.name not in written:
            written.append(file.name)
            raise Killed

    monkeypatch.setattr(run, "write_file_atomically", write_and_die)
    chosen = runs.list_rows()
    for _ in range(10):
        try:
            make_runs(runs.list_left(chosen), run_here, lambda name, facts: None)
            break
        except Killed:
            continue
    assert written == ["identity.json", "trained.json", "answers.json", "done.json"]
    assert list_results(runs.output)["heavy/seed-1"] == list_results(finished_suite)["heavy/seed-1"]
    assert not (runs.output / "runs" / "heavy" / "seed-1" / "evaluation" / "journal.jsonl").exists()


def change_suite(runs: SuiteRuns, key: str, value) -> SuiteRuns:
    file = Path(runs.suite.folder) / "two_rows.yaml"
    values = yaml.safe_load(file.read_text())
    part, (*path, last) = values, key.split(".")
    for name in path:
        part = part[name]
    part[last] = value
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return SuiteRuns(read_suite(file), runs.output)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("base.optimizer", {"warmup_steps": 1}, "recipe optimizer.warmup_steps"),
        ("rows.plain.control", "no_audio", "evaluation control"),
        ("metric", {"question_types": ["sight"]}, "evaluation question_types"),
    ],
)
def test_results_of_another_recipe_are_refused_by_name(runs, key, value, named):
    changed = change_suite(runs, key, value)
    with pytest.raises(UserError, match="begun with another") as raised:
        make_runs(changed.list_left(changed.list_rows()), run_here, lambda name, facts: None)
    assert named in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("rows", ["plain", "heavy"])
def test_rows_that_are_not_chosen_are_checked_too(runs, rows):
    """The table shows them, under the recipe that the suite has now."""
    change_suite(runs, "rows.heavy.overrides", {"stages": {"questions": {"loss_weights": {"text": 7.0}}}})
    before = (runs.output / "suite.json").read_bytes()
    file = runs.output.parent / "suite" / "two_rows.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["ablate", str(file), "--output", str(runs.output), "--rows", rows])
    assert ended.value.code == 2 and (runs.output / "suite.json").read_bytes() == before


def test_a_finished_run_of_nobody_knows_what_is_refused(runs):
    folder = runs.output / "runs" / "heavy" / "seed-1"
    (folder / "identity.json").unlink()
    with pytest.raises(UserError, match=r"seed-1: finished, but without identity.json"):
        runs.list_left(runs.list_rows())
    (folder / "identity.json").write_text("[1]")
    with pytest.raises(UserError, match=r"identity.json: is damaged"):
        runs.list_left(runs.list_rows())


def test_a_figure_explains_the_marks_that_it_has(finished_suite):
    result = collect_result(finished_suite)
    without = dataclasses.replace(
        result, rows=tuple(dataclasses.replace(row, paper=None) for row in result.rows), baselines={}
    )
    shown = [[axes.get_xlabel() for axes in draw_forest(one).axes] for one in (result, without)]
    assert shown == [
        ["percent right (dashed: chance)", "difference in points (diamond: the paper's)"],
        ["percent right", "difference in points"],
    ]


def test_labels_seeds_and_claims_may_change(runs):
    changed = change_suite(change_suite(runs, "rows.heavy.label", "heavier"), "rows.heavy.expected", "worse")
    assert all(one.finished for one in changed.list_rows())


def test_results_of_another_pretraining_are_refused(runs):
    file = Path(runs.suite.folder) / "pretrain.yaml"
    file.write_text(file.read_text().replace("warmup_steps: 2", "warmup_steps: 1"))
    changed = SuiteRuns(read_suite(file.with_name("two_rows.yaml")), runs.output)
    with pytest.raises(UserError, match="another start pretraining"):
        changed.list_rows()[0].check_same()


def test_results_of_other_code_are_refused(runs, monkeypatch):
    monkeypatch.setattr(identity, "hash_code", lambda: "0" * 64)
    with pytest.raises(UserError, match="another version of mirasol's code"):
        SuiteRuns(runs.suite, runs.output).list_rows()[0].check_same()


def test_results_of_other_data_are_refused(runs, data_root, shared_cache, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_root, data)
    lines = (data / "test.jsonl").read_text().splitlines()
    (data / "test.jsonl").write_text("\n".join(lines[1:]) + "\n")
    changed = change_suite(runs, "base.data.root", str(data))
    with pytest.raises(UserError, match="another data asked: test"):
        changed.list_rows()[0].check_same()


def test_other_questions_are_asked_in_another_folder_without_training_again(runs):
    changed = change_suite(runs, "metric", {"protocol": "candidates"})
    with pytest.raises(UserError, match=f"give another --output with --shared {runs.shared}, which reuses") as raised:
        changed.list_rows()[0].check_same()
    assert "evaluation protocol" in str(raised.value)
    trained_otherwise = change_suite(runs, "base.optimizer.warmup_steps", 1)
    with pytest.raises(UserError, match="give another --output$"):
        trained_otherwise.list_rows()[0].check_same()


def test_code_counts_without_its_comments():
    one = 'def double(x):\n    """Twice."""\n    return 2 * x  # so\n'
    assert identity.strip_comments(one) == identity.strip_comments("def double(x):\n    return (2*x)\n")
    assert identity.strip_comments(one) != identity.strip_comments("def double(x):\n    return 3 * x\n")


@pytest.mark.slow
def test_the_plan_counts_what_is_then_run(finished_suite, runs):
    chosen = runs.list_rows()
    plan = plan_suite(runs, chosen, Assumptions(peak_tflops=0.01))
    assert list(plan.runs) == ["pretraining/first", *(one.name for one in chosen)] and plan.left == ()
    for one in chosen:
        done = json.loads((one.folder / "done.json").read_text())
        facts = json.loads((one.folder / "train" / "run.json").read_text())
        assert plan.runs[one.name].steps == done["steps"] == sum(facts["stage_steps"].values())
        assert plan.runs[one.name].parameters == sum(part["parameters"] for part in facts["components"].values())
    fresh = SuiteRuns(runs.suite, runs.output.with_name("fresh"))
    before = plan_suite(fresh, fresh.list_rows(), Assumptions(peak_tflops=0.01))
    assert before.runs == plan.runs and set(before.left) == set(plan.runs)


def test_the_plan_knows_the_longest_text_among_many_of_its_length(runs, monkeypatch):
    """Of texts with as many letters one may have more tokens: it is not left to chance whether it is counted."""
    texts = [f"what is {number:05}?" for number in range(300)] + ["\u2603" * 14]
    examples = {"": [Example("a.mp4", "a.mp4", None, None, text, "dog") for text in texts]}
    monkeypatch.setattr("mirasol.ablation.plan.read_data", lambda data, split: (examples,))
    recipe = dataclasses.replace(runs.suite.build_pretraining("first"), tokenizer=TokenizerRecipe(init="tiny"))
    tokens = load_processor("tiny").tokenizer([f"{text}\ndog" for text in texts], add_special_tokens=False)["input_ids"]
    assert _find_text_length(recipe) == max(map(len, tokens)) + 3 > min(map(len, tokens)) + 3


def test_the_result_is_redrawn_from_what_is_there(runs):
    result = collect_result(runs.output)
    names = write_result(runs.output, result)
    first = {name: (runs.output / name).read_bytes() for name in names}
    shutil.rmtree(runs.output / "shared")
    write_result(runs.output, collect_result(runs.output))
    assert {name: (runs.output / name).read_bytes() for name in names} == first
    page, latex = first["report.html"].decode(), first["table.tex"].decode()
    assert page.count("<svg") == 2 and "text 10 &amp; more_%" in page and r"text 10 \& more\_\%" in latex
    table = [line.split("|") for line in first["table.md"].decode().splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({len(cells) for cells in table}) == 1 and table[3][1] == " text 10 & more_% "
    assert "reproduced" in page or "refuted" in page or "undecided" in page


def test_the_result_says_what_the_runs_say(runs):
    result = collect_result(runs.output)
    plain, heavy = result.rows
    answers = {
        name: [json.loads((runs.output / "runs" / name / f"seed-{seed}" / "answers.json").read_text())["value"]
               for seed in (0, 1)]
        for name in ("plain", "heavy")
    }  # fmt: skip
    for row, name in ((plain, "plain"), (heavy, "heavy")):
        by_seed = [sum(values) / len(values) for values in answers[name]]
        assert row.score.by_seed == pytest.approx(by_seed) and row.score.mean == pytest.approx(sum(by_seed) / 2)
        evaluated = json.loads((runs.output / "runs" / name / "seed-0" / "evaluation" / "results.json").read_text())
        headline = evaluated["protocols"]["open generation"]
        assert row.score.by_seed[0] == pytest.approx(headline["metrics"][headline["headline"]]["value"])
    assert heavy.difference.mean == pytest.approx(heavy.score.mean - plain.score.mean)
    assert plain.verdict is None and heavy.verdict in ("reproduced", "refuted", "undecided")
    assert 0 < result.baselines["chance"] < 1 and result.missing == ()
    assert heavy.parameters > 0 and heavy.flops > 0 and heavy.seconds > 0


def test_the_result_says_where_its_runs_come_from(runs, monkeypatch):
    """What the runs wrote down, and not what draws the table."""
    for name, seed, commit in (("plain", 0, "a" * 40), ("heavy", 1, "b" * 40)):
        file = runs.output / "runs" / name / f"seed-{seed}" / "done.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "commit": commit, "training_seconds": 3600}))
    file = runs.output / "runs" / "heavy" / "seed-0" / "done.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "steps": 3, "training_seconds": 36000, "same_run_as": "x"})
    )
    result = collect_result(runs.output)
    identity = json.loads((runs.output / "runs" / "plain" / "seed-0" / "identity.json").read_text())
    assert result.facts["versions"] == identity["versions"]
    assert {"a" * 40, "b" * 40} <= set(result.facts["commit"].split(", ")) and 2 <= result.facts["hours"] < 3
    text = format_text(result)
    assert "Rows differ in their steps of training: plain 2, heavy 2 and 3." in text
    assert f"torch {identity['versions']['torch']}" in text and "hours of training together" in text


def damage(file: Path, how: str) -> None:
    found = json.loads(file.read_text())
    if how == "missing":
        file.unlink()
    elif how == "bytes":
        file.write_bytes(b"\xff\xfe{}")
    elif how in ("[]", "{}", "[1]", "null", "{"):
        file.write_text(how)
    elif how == "shorter":
        file.write_text(json.dumps({**found, "value": found["value"][1:]}))
    else:
        file.write_text(json.dumps({**found, "value": ["yes", *found["value"][1:]]}))


OF_ANY = ("bytes", "[]", "{}", "[1]", "null", "{")
DAMAGES = [
    (name, how) for name in ("answers.json", "done.json", "identity.json", "suite.json", "plan.json") for how in OF_ANY
]
# A run without done.json is not finished, and a suite without a plan has no costs.
DAMAGES += [(name, "missing") for name in ("answers.json", "identity.json", "suite.json")]
DAMAGES += [("answers.json", how) for how in ("shorter", "text")]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_damaged_results_are_one_line(runs, name, how):
    folder = runs.output if name in ("suite.json", "plan.json") else runs.output / "runs" / "plain" / "seed-0"
    damage(folder / name, how)
    with pytest.raises(UserError) as raised:
        collect_result(runs.output)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_result_with_missing_runs_says_which(runs):
    shutil.rmtree(runs.output / "runs" / "heavy" / "seed-1")
    result = collect_result(runs.output)
    assert result.missing == ("heavy/seed-1",)
    assert result.rows[1].seeds == (0,) and result.rows[1].verdict == "undecided"
    with pytest.raises(UserError, match="not the folder of a suite"):
        collect_result(runs.output / "runs")


def test_a_suite_moved_elsewhere_goes_on(runs, suite_file):
    assert Path(runs.suite.folder) != suite_file.parent
    assert all(one.finished for one in SuiteRuns(read_suite(suite_file), runs.output).list_rows())
