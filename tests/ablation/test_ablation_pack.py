"""A packed suite has all that its tables are made from, and goes on where its weights are not."""

import io
import json
import subprocess
import tarfile

import pytest
from suite_making import make_all
from test_ablation_runs import change_suite, runs  # noqa: F401 - the fixture

from mirasol.ablation import run
from mirasol.ablation.pack import PACKED, pack_runs
from mirasol.ablation.report import write_result
from mirasol.ablation.result import collect_result
from mirasol.ablation.runs import SuiteRuns
from mirasol.cli.main import main
from mirasol.errors import UserError


@pytest.fixture
def unpacked(runs, finished_suite, tmp_path) -> SuiteRuns:  # noqa: F811
    """The finished suite as its packed file has it, in a new folder that shares nothing with it."""
    folder = tmp_path / "unpacked"
    folder.mkdir()
    (tmp_path / PACKED).write_bytes(pack_runs(finished_suite))
    subprocess.run(["tar", "-xf", tmp_path / PACKED, "-C", folder], check=True)  # as users do
    return SuiteRuns(runs.suite, folder)


def test_tables_are_drawn_from_a_packed_suite_as_from_its_runs(unpacked, finished_suite):
    assert collect_result(unpacked.output).to_dict() == collect_result(finished_suite).to_dict()
    assert not list(unpacked.output.rglob("*.safetensors"))
    names = write_result(unpacked.output, collect_result(unpacked.output), packed=True)
    assert PACKED in names and (unpacked.output / PACKED).read_bytes() == pack_runs(finished_suite)


def test_nothing_that_is_packed_is_made_again(unpacked, monkeypatch):
    monkeypatch.setattr(run, "_train", lambda one: pytest.fail(f"trained again: {one.name}"))
    make_all(unpacked)
    assert unpacked.list_left(unpacked.list_rows()) == []


def test_a_seed_is_added_to_a_packed_suite(unpacked, finished_suite, suite_values):
    before = collect_result(finished_suite)
    more = change_suite(unpacked, "seeds", 3)
    assert [one.name for one in more.list_left(more.list_rows())] == [
        "pretraining/first",
        "plain/seed-2",
        "heavy/seed-2",
    ]
    make_all(more)
    after = collect_result(more.output)
    assert after.missing == () and after.rows[0].seeds == (0, 1, 2)
    for old, new in zip(before.rows, after.rows, strict=True):
        assert new.score.by_seed[:2] == old.score.by_seed


def test_a_packed_suite_of_another_recipe_is_refused(unpacked):
    changed = change_suite(unpacked, "base.optimizer.learning_rate", 1.0)
    with pytest.raises(
        UserError, match=r"plain/seed-0: this run was begun with another recipe optimizer.learning_rate"
    ):
        make_all(changed)


def test_runs_that_are_not_finished_are_not_packed(runs, tmp_path, capsys):  # noqa: F811
    (runs.output / "runs" / "heavy" / "seed-1" / "done.json").unlink()
    main(["ablate", "--report", str(runs.output), "--pack"])
    with tarfile.open(runs.output / PACKED) as archive:
        names = archive.getnames()
        found = json.load(io.TextIOWrapper(archive.extractfile("runs/plain/seed-0/done.json")))
    assert not any(name.startswith("runs/heavy/seed-1/") for name in names) and "runs/heavy/seed-0/done.json" in names
    assert found["steps"] == 2 and PACKED in capsys.readouterr().err
