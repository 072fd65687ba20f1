"""Rows that several suites have in common are trained once, and only what is the same run is taken for it."""

import json
import shutil

import pytest
from suite_making import list_results
from test_ablation_runs import Killed, change_suite, runs  # noqa: F401 - the fixture

from mirasol.ablation import run, twins
from mirasol.ablation.execute import make_runs, run_here
from mirasol.ablation.runs import SuiteRuns
from mirasol.files import write_file_atomically, write_folder_atomically

FACTS = {"steps": 2, "training_seconds": 1.0, "peak_memory": 0}


@pytest.fixture
def elsewhere(runs, tmp_path) -> SuiteRuns:  # noqa: F811
    """The same suite in another folder that shares the pretrainings of the finished one."""
    return SuiteRuns(runs.suite, tmp_path / "elsewhere", runs.shared)


def make(suite_runs: SuiteRuns, names: list[str] | None = None) -> None:
    chosen = suite_runs.list_rows(names)
    make_runs(suite_runs.list_left(chosen), run_here, lambda name, facts: None)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr("mirasol.training.trainer.train", lambda *args, **options: pytest.fail("trained again"))


def test_the_same_rows_of_another_suite_are_copied(elsewhere, finished_suite, no_training, monkeypatch):
    monkeypatch.setattr(run, "_evaluate", lambda one: pytest.fail("evaluated again"))
    make(elsewhere)
    assert list_results(elsewhere.output) == list_results(finished_suite)
    done = json.loads((elsewhere.output / "runs" / "plain" / "seed-1" / "done.json").read_text())
    folder, twin = elsewhere.output / "runs" / "plain" / "seed-1", finished_suite / "runs" / "plain" / "seed-1"
    assert (folder / done["same_run_as"]).resolve() == twin.resolve()
    assert all(one.finished for one in elsewhere.list_rows())


def test_a_row_that_is_asked_otherwise_is_not_trained_again(runs, elsewhere, finished_suite, no_training):  # noqa: F811
    changed = change_suite(runs, "rows.plain.control", "no_audio")
    other = SuiteRuns(changed.suite, elsewhere.output, elsewhere.shared)
    make(other, ["plain"])
    before, after = list_results(finished_suite), list_results(other.output)
    assert sorted(after) == ["plain/seed-0", "plain/seed-1"]
    for name, (weights, log, answers) in after.items():
        assert weights == before[name][0] and log == before[name][1] and answers["id"] == before[name][2]["id"]
    asked = json.loads((other.output / "runs" / "plain" / "seed-0" / "evaluation" / "results.json").read_text())
    assert "no_audio" in json.dumps(asked)


@pytest.mark.parametrize("damage", ["identity", "weights", "unfinished"])
def test_a_run_that_was_changed_since_is_nobodys_twin(elsewhere, runs, damage, monkeypatch):  # noqa: F811
    for note in (runs.shared / "rows").iterdir():
        found = json.loads(note.read_text())
        found["folder"] = found["folder"].replace(str(found["folder"]).split("/runs/")[0], str(runs.output))
        note.write_text(json.dumps(found))
    trained: list[str] = []
    monkeypatch.setattr(run, "_train", lambda one: trained.append(one.name) or FACTS)
    monkeypatch.setattr(run, "_evaluate", lambda one: None)
    old = runs.output / "runs" / "plain" / "seed-0"
    if damage == "identity":
        values = json.loads((old / "identity.json").read_text())
        values["recipe"]["optimizer.learning_rate"] = 1.0
        (old / "identity.json").write_text(json.dumps(values))
    elif damage == "weights":
        shutil.rmtree(old / "train" / "checkpoint")
    else:
        (old / "trained.json").unlink()
    make(elsewhere, ["plain"])
    assert trained == ["plain/seed-0", "plain/seed-1"]
    assert not (elsewhere.output / "runs" / "plain" / "seed-0" / "train").exists()
    assert (elsewhere.output / "runs" / "plain" / "seed-1" / "train" / "checkpoint").is_dir()


def test_killed_while_it_copies_a_run_ends_as_if_it_was_not(elsewhere, finished_suite, no_training, monkeypatch):
    seen = []

    def die_after(write):
        def write_and_die(target, *args, **options):
            write(target, *args, **options)
            if target.name not in seen:
                seen.append(target.name)
                raise Killed

        return write_and_die

    for module in (run, twins):
        monkeypatch.setattr(module, "write_file_atomically", die_after(write_file_atomically))
    monkeypatch.setattr(twins, "write_folder_atomically", die_after(write_folder_atomically))
    for _ in range(10):
        try:
            make(elsewhere, ["plain"])
            break
        except Killed:
            continue
    assert seen == ["identity.json", "evaluation", "answers.json", "trained.json", "train", "done.json"]
    plain = {name: found for name, found in list_results(finished_suite).items() if name.startswith("plain")}
    assert list_results(elsewhere.output) == plain
