"""Runs: resumed == uninterrupted, bit for bit, and every way in which a run refuses to begin or go on."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mirasol import MirasolForConditionalGeneration, MirasolOutput, MirasolProcessor
from mirasol.errors import BadClip, UserError
from mirasol.training.checkpoints import Checkpoints
from mirasol.training.logging import read_metrics
from mirasol.training.recipe import recipe_from_dict
from mirasol.training.trainer import NonFiniteLoss, spread, train

MEASURED = ("clips_per_second", "data_wait", "seconds")

KILLED_RUN = """
import os, signal, sys
from rich.console import Console
import mirasol.training.checkpoints as checkpoints
from mirasol.training.recipe import load_recipe
from mirasol.training.trainer import train

sync = checkpoints._sync

def kill_in_the_middle_of_a_checkpoint(path):
    if "step-00000006" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)

checkpoints._sync = kill_in_the_middle_of_a_checkpoint
train(load_recipe(sys.argv[1]), console=Console(stderr=True))
"""


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(values, console, **options) -> Path:
    return train(recipe_from_dict(values), console=console, **options)


def comparable_metrics(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder / "metrics.jsonl")]


def test_a_run_killed_in_the_middle_of_a_checkpoint_resumes_bit_identically(values, tmp_path, console):
    whole, killed = {**values, "output": str(tmp_path / "whole")}, {**values, "output": str(tmp_path / "killed")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(killed, sort_keys=False))
    run(whole, console)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path / "recipe.yaml")], capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    output = Path(killed["output"])
    assert not (output / "checkpoint").exists()
    assert Checkpoints(output / "checkpoints", 2).steps() == [2, 4], "an unfinished checkpoint counts as none"
    assert max(line["step"] for line in read_metrics(output / "metrics.jsonl")) == 6

    resumed = run(killed, console, resume=True)
    weights = [Path(v["output"]) / "checkpoint" / "model.safetensors" for v in (whole, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    states = [Path(v["output"]) / "checkpoints" / "step-00000008" / "optimizer.pt" for v in (whole, killed)]
    first, second = (torch.load(state, weights_only=True) for state in states)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert comparable_metrics(output) == comparable_metrics(Path(whole["output"]))
    assert resumed == output / "checkpoint"


def test_workers_do_not_change_the_weights(values, tmp_path, console):
    one = run({**values, "output": str(tmp_path / "one")}, console)
    two = run({**values, "output": str(tmp_path / "two"), "workers": 2}, console)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_the_callers_random_state_does_not_change_the_weights(values, tmp_path, console):
    torch.manual_seed(1)
    one = run({**values, "output": str(tmp_path / "one")}, console)
    torch.manual_seed(2)
    two = run({**values, "output": str(tmp_path / "two"), "validate_every": 1}, console)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    other = run({**values, "output": str(tmp_path / "other"), "seed": 4}, console)
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_finished_run_leaves_what_it_should(values, console, data_root, examples):
    checkpoint = run(values, console)
    folder = Path(values["output"])
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["stage"] for line in steps] == ["slots"] * 3 + ["questions"] * 5
    for line in steps:
        assert {"loss", "text_loss", "latent_loss", "video_loss", "gradient_norm", "learning_rate", *MEASURED} <= set(
            line
        )
        assert -1 <= line["x_cosine"] <= 1
        assert line["x_std"] > 0
        assert 0 <= line["data_wait"] <= 1
    validations = [line for line in metrics if line["kind"] == "validation"]
    assert [line["step"] for line in validations] == [4, 8]
    assert "hearing" in validations[0]["clip"]["by_type"]
    assert list((folder / "tensorboard").glob("events*"))
    assert Checkpoints(folder / "checkpoints", 2).steps() == [6, 8]
    assert (folder / "bad_clips.jsonl").read_text() == ""
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["versions"]["torch"] == torch.__version__
    assert {"manifest.json", "train.jsonl", "validation.jsonl"} == set(recorded["data"])

    model, processor = (
        MirasolForConditionalGeneration.from_pretrained(checkpoint),
        MirasolProcessor.from_pretrained(checkpoint),
    )
    batch = processor([data_root / examples[0].media], [examples[0].prompt])
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[0] == 1


def test_training_lowers_the_loss(values, console):
    values["stages"] = {"all": {"steps": 40, "clips_per_step": 5, "questions_per_clip": 8}}
    values.update(validate_every=40, checkpoint_every=40)
    run(values, console)
    losses = [
        line["text_loss"] for line in read_metrics(Path(values["output"]) / "metrics.jsonl") if line["kind"] == "train"
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_an_output_with_a_run_is_refused_and_left_alone(values, console):
    run(values, console)
    before = {path: path.stat().st_mtime_ns for path in Path(values["output"]).rglob("*")}
    with pytest.raises(UserError, match="already holds a run"):
        run(values, console)
    assert before == {path: path.stat().st_mtime_ns for path in Path(values["output"]).rglob("*")}
    assert run(values, console, resume=True) == Path(values["output"]) / "checkpoint"


def test_resuming_with_a_changed_recipe_is_refused_by_key(values, console):
    run(values, console)
    shutil.rmtree(Path(values["output"]) / "checkpoint")
    values["optimizer"]["weight_decay"] = 0.3
    with pytest.raises(UserError, match=r"changed recipe: optimizer\.weight_decay"):
        run(values, console, resume=True)
    del values["optimizer"]["weight_decay"]
    values["keep_last"] = 1
    run(values, console, resume=True)


def test_resuming_with_changed_data_is_refused(values, console, data_root, tmp_path):
    values["data"]["root"] = str(shutil.copytree(data_root, tmp_path / "data"))
    run(values, console)
    shutil.rmtree(Path(values["output"]) / "checkpoint")
    rows = (tmp_path / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(UserError, match=r"train\.jsonl changed"):
        run(values, console, resume=True)


def test_resume_without_a_run_starts_one(values, console):
    assert (run(values, console, resume=True) / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_samples(values, console, monkeypatch):
    forward = MirasolForConditionalGeneration.forward
    passes = []

    def poisoned(self, **inputs):
        output = forward(self, **inputs)
        if self.training:
            passes.append(1)
            if len(passes) == 5:
                output.text_loss = output.text_loss * float("nan")
                output.loss = output.loss * float("nan")
        return output

    stepped = []
    monkeypatch.setattr(MirasolForConditionalGeneration, "forward", poisoned)
    monkeypatch.setattr("mirasol.training.optimizer.Optimizer.step", lambda self: stepped.append(1))
    with pytest.raises(NonFiniteLoss, match=r"step 5: loss=nan.*samples: train-\d+-q\d+") as caught:
        run(values, console)
    assert "\n" not in str(caught.value)
    assert len(stepped) == 4
    assert (Path(values["output"]) / "error.txt").read_text().strip() == str(caught.value)
    assert Checkpoints(Path(values["output"]) / "checkpoints", 2).steps() == [2, 4]


def test_a_gradient_that_is_not_finite_stops_before_the_step(values, console, monkeypatch):
    stepped = []
    monkeypatch.setattr("mirasol.training.optimizer.Optimizer.step", lambda self: stepped.append(1))
    monkeypatch.setattr("mirasol.training.optimizer.Optimizer.clip_gradients", lambda self: float("inf"))
    with pytest.raises(NonFiniteLoss, match="step 1: gradient_norm=inf"):
        run(values, console)
    assert not stepped


@pytest.fixture
def broken_data(data_root, tmp_path):
    """The data set with one training clip that is text."""
    root = shutil.copytree(data_root, tmp_path / "broken")
    (root / "clips" / "train" / "train-000001.mp4").write_text("no video")
    return root


def test_a_bad_clip_stops_the_run_or_is_left_out_and_listed(values, console, broken_data):
    values["data"].update(root=str(broken_data), on_bad_clip="error")
    listed = Path(values["output"]) / "bad_clips.jsonl"
    with pytest.raises(BadClip, match=r"train-000001\.mp4: "):
        run(values, console)
    assert [json.loads(line)["media"] for line in listed.read_text().splitlines()] == ["clips/train/train-000001.mp4"]

    values["data"]["on_bad_clip"] = "skip"
    run(values, console)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {row["media"] for row in rows} == {"clips/train/train-000001.mp4"}
    assert any(row["start"] is None for row in rows)
    assert any(row["start"] is not None for row in rows)
    assert all(row["reason"] for row in rows)
    assert "left out" in console.file.getvalue()


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_written(values, console, data_root, tmp_path):
    root = shutil.copytree(data_root, tmp_path / "data")
    row = {"id": "long", "file": "clips/train/train-000000.mp4", "prompt": "why " * 200, "target": "so"}
    with (root / "train.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    values["data"]["root"] = str(root)
    with pytest.raises(UserError, match="max_text_length=64.*why why"):
        run(values, console)
    assert not Path(values["output"]).exists()


def test_training_goes_on_from_a_checkpoint(values, console, tmp_path):
    first = run(values, console)
    values["output"] = str(tmp_path / "second")
    values["model"] = {"init": str(first)}
    values["stages"] = {"more": {"steps": 1, "clips_per_step": 2, "questions_per_clip": 2}}
    second = run(values, console)
    one, two = (MirasolForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (first, second))
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)
    torch.testing.assert_close(one, two, rtol=0, atol=0.01)


def test_bf16_trains(values, console):
    values["precision"] = "bf16"
    assert run(values, console).is_dir()


def test_spread_tells_collapsed_features_from_different_ones():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    same = torch.ones(3, 2, 4, 8)
    same[1, 1] = 100.0
    collapsed = spread(MirasolOutput(combined=same), mask)
    assert collapsed["x_cosine"] == pytest.approx(1.0)
    assert collapsed["x_std"] == pytest.approx(0.0)
    apart = spread(MirasolOutput(combined=torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))), mask)
    assert apart["x_cosine"] < 0.9
    assert apart["x_std"] > 0.05
