"""`mirasol ablate` as it is typed: what it refuses, what it prints, and that kills do not matter."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from suite_making import list_results, make_all

from mirasol.ablation import plan
from mirasol.ablation.execute import choose_executor, run_for_ray
from mirasol.ablation.plan import RunCost, read_costs, write_suite
from mirasol.ablation.rendering import list_unrendered, render_data_set
from mirasol.ablation.runs import SuiteRuns
from mirasol.ablation.suite import read_suite
from mirasol.cli.main import main
from mirasol.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SUITES = ("table_1a", "table_1b", "combiners", "modalities", "pretraining", "long", "memory", "combiners_equal_flops")


def refuse(capsys, *words: str) -> str:
    """The one line on stderr that the command ends with."""
    with pytest.raises(SystemExit) as raised:
        main(["ablate", *words])
    [line] = capsys.readouterr().err.strip().splitlines()
    assert raised.value.code == 2
    return line


def test_what_cannot_be_done_is_one_line(suite_file, tmp_path, capsys):
    suite, output = str(suite_file), str(tmp_path / "output")
    assert "needs a suite and a folder" in refuse(capsys, suite)
    assert "leave SUITE and --output out" in refuse(capsys, suite, "--report", output)
    assert "not the folder of a suite" in refuse(capsys, "--report", output)
    assert "must be at least 1" in refuse(capsys, suite, "--output", output, "--seeds", "0")
    assert "must be at least 1" in refuse(capsys, suite, "--output", output, "--jobs", "0")
    assert "'heavi' is not a row: did you mean 'heavy'" in refuse(capsys, suite, "--output", output, "--rows", "heavi")
    assert "give I/N" in refuse(capsys, suite, "--output", output, "--task", "3/3")
    assert "choose local or ray" in refuse(capsys, suite, "--output", output, "--executor", "slurm")
    assert "--jobs 2 has no effect" in refuse(capsys, suite, "--output", output, "--executor", "ray", "--jobs", "2")
    assert "choose pdf or png" in refuse(capsys, suite, "--output", output, "--figures", "gif")
    assert "unknown key 'optimiser'" in refuse(capsys, suite, "--output", output, "--optimiser.betas", "[0.9, 0.9]")
    assert not (tmp_path / "output").exists()


def test_a_dry_run_writes_nothing_and_says_how_missing_data_is_rendered(suite_file, suite_values, tmp_path, capsys):
    missing = {"root": str(tmp_path / "absent"), "kind": "flashes", "train": 3, "test": 2}
    suite_file.write_text(yaml.safe_dump({**suite_values, "render": {"some": missing}}))
    line = refuse(capsys, str(suite_file), "--output", str(tmp_path / "output"), "--dry-run")
    assert (
        f"mirasol data synthesize {missing['root']} --kind flashes --seed 0 --train 3 --validation 0 --test 2" in line
    )
    assert not (tmp_path / "output").exists() and not (tmp_path / "absent").exists()


def test_data_that_were_rendered_otherwise_are_refused(suite_file, suite_values, data_root, tmp_path, capsys):
    other = {"root": str(data_root), "kind": "questions", "seed": 1, "train": 5, "validation": 2, "test": 3}
    suite_file.write_text(yaml.safe_dump({**suite_values, "render": {"some": other}}))
    line = refuse(capsys, str(suite_file), "--output", str(tmp_path / "output"))
    assert "was rendered with seed=11, render.some asks for 1" in line


def test_progress_of_rendering_names_the_data_set_that_is_rendered(suite_file, suite_values, tmp_path, capsys):
    few = {"kind": "images", "train": 1, "validation": 0, "test": 0}
    roots = [tmp_path / "first", tmp_path / "second"]
    suite_values["render"] = {root.name: {**few, "root": str(root)} for root in roots}
    suite_file.write_text(yaml.safe_dump(suite_values))
    main(["ablate", str(suite_file), "--output", str(tmp_path / "out"), "--task", "7/8"])
    shown = capsys.readouterr().err
    assert all(f"Rendering {root}: 1/1 clips" in shown and (root / "manifest.json").is_file() for root in roots)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"), [("--mfu", "0"), ("--mfu", "nan"), ("--peak-tflops", "-1"), ("--peak-tflops", "inf")]
)
def test_plans_of_impossible_devices_are_one_line(suite_file, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        main(["ablate", str(suite_file), "--output", str(tmp_path / "out"), "--dry-run", option, value])
    assert ended.value.code == 2 and f"{option} {float(value)}" in capsys.readouterr().err


def test_a_task_beyond_the_last_run_has_nothing_to_do(suite_file, tmp_path, capsys):
    main(["ablate", str(suite_file), "--output", str(tmp_path / "out"), "--task", "7/8"])
    assert "--task 7/8: no run is left for this task" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_runs(suite_file, tmp_path, capsys):
    main(["ablate", str(suite_file), "--output", str(tmp_path / "output"), "--dry-run", "--seeds", "3",
          "--peak-tflops", "0.01"])  # fmt: skip
    shown = capsys.readouterr().out
    assert "left: 7 of 7 runs, 14 steps" in shown and "GFLOP/s" in shown
    assert not (tmp_path / "output").exists()


def test_tasks_that_begin_together_lose_no_row_of_the_plan(suite_file, suite_values, tmp_path):
    """Each writes its own rows beside those that the others have written."""
    suite_values["rows"] = {f"row_{number}": {"pretraining": "first"} for number in range(24)}
    suite_file.write_text(yaml.safe_dump({**suite_values, "seeds": 1, "reference": "row_0"}))
    runs = SuiteRuns(read_suite(suite_file), tmp_path)
    names = [run.name for run in runs.list_rows()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_suite(runs, {name: RunCost(1, 1, 1, 1.0, 1)}), names))
    assert json.loads((tmp_path / "plan.json").read_text())["rows"].keys() == set(suite_values["rows"])


def test_costs_are_counted_once_and_again_where_something_changed(suite_file, suite_values, tmp_path, monkeypatch):
    def list_costs(seeds: int = 2) -> dict[str, RunCost] | None:
        runs = SuiteRuns(read_suite(suite_file), tmp_path)
        return read_costs(runs, runs.list_rows(seeds=range(seeds)))

    assert list_costs() is None
    runs = SuiteRuns(read_suite(suite_file), tmp_path)
    costs = {
        run.name: RunCost(number, 1, 10**number, 1.0, 1)
        for number, run in enumerate(runs.list_with_needed(runs.list_rows(seeds=[0])))
    }
    write_suite(runs, costs)
    found = list_costs(seeds=3)
    assert {name: cost for name, cost in found.items() if name in costs} == costs
    assert found["heavy/seed-2"] == costs["heavy/seed-0"] and len(found) == 7
    suite_values["rows"]["heavy"]["control"] = "no_audio"  # costs no training
    suite_file.write_text(yaml.safe_dump(suite_values))
    assert list_costs() is not None
    with monkeypatch.context() as patch:
        patch.setattr(plan, "hash_code", lambda rooms: "counted otherwise")
        assert list_costs() is None
    suite_values["base"]["stages"]["questions"]["steps"] = 3
    suite_file.write_text(yaml.safe_dump(suite_values))
    assert list_costs() is None


def test_on_a_cluster_a_row_fails_as_its_pretraining_did():
    assert run_for_ray("never read", {"steps": 2}, {"error": "no data"}) == {"error": "no data"}


def test_a_cluster_needs_its_package():
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs the package ray"):
            list(choose_executor("ray", 1)([]))
    else:
        pytest.skip("ray is installed")


@pytest.mark.slow
def test_killed_at_random_moments_a_suite_ends_as_if_it_was_not(suite_file, finished_suite, tmp_path):
    command = [sys.executable, "-m", "mirasol.cli", "ablate", str(suite_file), "--output", str(tmp_path / "output"),
               "--jobs", "2"]  # fmt: skip
    chance, kills = random.Random(7), 0
    while True:
        with (tmp_path / "told.txt").open("w") as told:
            process = subprocess.Popen(command, stdout=told, stderr=told, start_new_session=True)
            began, last = time.monotonic(), chance.uniform(4, 30) if kills < 6 else 3600.0
            while process.poll() is None and time.monotonic() - began < last:
                time.sleep(0.05)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0, (tmp_path / "told.txt").read_text()
    assert kills > 0 and list_results(tmp_path / "output") == list_results(finished_suite)
    assert "Two rows" in (tmp_path / "told.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_the_suites_of_the_project_can_be_run(name, tmp_path, monkeypatch):
    """A step of every row on a few clips."""
    monkeypatch.chdir(tmp_path)
    file = REPOSITORY / "recipes" / "ablations" / f"{name}.yaml"
    plain = read_suite(file)
    few = {"train": 8, "validation": 2, "test": 2}
    change = {
        "stages": {stage: {"steps": 1, "clips_per_step": 2} for stage in plain.base["stages"]},
        "render": {key: few if one.test else {"train": 6, "validation": 2} for key, one in plain.render.items()},
        "pretraining": {
            key: {"stages": {stage: {"steps": 1, "clips_per_step": 2} for stage in plain.build_pretraining(key).stages}}
            for key in plain.pretraining
        },
    }
    if plain.stream is not None:
        change["stream"] = {"chunks": 70} if plain.stream.chunks else {"clips": 1}
    suite = read_suite(file, change)
    for one in list_unrendered(suite).values():
        render_data_set(one, 1)
    runs = SuiteRuns(suite, tmp_path / "output")
    make_all(runs, runs.list_rows(seeds=[0]))
    assert all(run.finished for run in runs.list_rows(seeds=[0]))
