"""Several processes do what one does: the same losses, gradients and weights, whatever each of them holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirasol.errors import UserError
from mirasol.training.logging import read_metrics
from mirasol.training.parallel import RowsOfRank
from mirasol.training.recipe import recipe_from_dict
from mirasol.training.trainer import train

STACK = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32, "dropout": 0.0, "bias": False}
LOSSES = ("loss", "text_loss", "latent_loss", "video_loss", "gradient_norm")


def torchrun(*arguments: str, processes: int = 2, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, **options)


def without_noise(values: dict) -> dict:
    """No dropout and no masking, which every process draws for itself; no biases, for a key's has a gradient of zero
    whose rounding Adam would blow up."""
    overrides = {name: {"stack": STACK} for name in ("combiner", "latent", "reconstruction", "text")}
    overrides |= {"vit": STACK, "audio": {"adapter": STACK}}
    overrides["latent"] |= {"mask_ratio": 0.0}
    stages = {
        "slots": {"steps": 1, "window": "slot", "clips_per_step": 4, "questions_per_clip": 1},
        "questions": {"steps": 2, "clips_per_step": 4, "questions_per_clip": 4, "drop_video": 0.4, "drop_audio": 0.4},
    }
    model = {"preset": "tiny", "overrides": overrides}
    return {**values, "model": model, "stages": stages, "checkpoint_every": 1, "validate_every": 3, "samples": 1}


@pytest.fixture(scope="module")
def ran(data_root, shared_cache, tmp_path_factory):
    """(values, results, folder): the recipe, what the two processes found, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("parallel")
    values = {
        "seed": 3,
        "output": str(folder / "run"),
        "data": {"root": str(data_root), "cache": str(shared_cache)},
        "tokenizer": {"vocab_size": 300},
        "optimizer": {"warmup_steps": 2},
        "device": "cpu", "log_every": 1, "validation_clips": 2, "threads": 1, "keep_last": 3,
    }  # fmt: skip
    values = without_noise(values)
    (folder / "recipe.json").write_text(json.dumps(values))
    script = Path(__file__).with_name("two_processes.py")
    ended = torchrun(str(script), str(folder / "recipe.json"), str(folder / "results.json"), timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return values, json.loads((folder / "results.json").read_text()), folder


@pytest.fixture
def alone(ran, console):
    values, _, folder = ran
    if not (folder / "alone").exists():
        train(recipe_from_dict({**values, "output": str(folder / "alone")}), console=console)
    return folder / "alone"


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    first, second = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)
    lines = [
        [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"] for folder in (one, other)
    ]
    for a, b in zip(*lines, strict=True):
        assert {name: b[name] for name in LOSSES} == pytest.approx({name: a[name] for name in LOSSES}, abs=tolerance)


@pytest.mark.parametrize("objective", ["clips", "image_text"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_unequal_halves_of_a_batch_have_the_losses_and_gradients_of_the_whole(ran, kind, objective):
    """Also where one process's clips lack all audio, and are shorter; images meet the texts of both processes."""
    assert ran[1][f"{kind} {objective}"] < 1e-5


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_the_weights_of_one(ran, alone, kind):
    assert_same_run(alone, ran[2] / f"run-{kind}")


def test_an_error_of_the_first_process_reaches_all_and_is_told_once(ran):
    assert "already holds a run" in ran[1]["error"]
    assert ran[1]["told by first"] == [False, True]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_goes_on_with_what_two_began(ran, alone, console, tmp_path, kind):
    import shutil

    output = shutil.copytree(ran[2] / f"run-{kind}", tmp_path / "run")
    shutil.rmtree(output / "checkpoint")
    shutil.rmtree(output / "checkpoints" / "step-00000003")
    shutil.rmtree(output / "checkpoints" / "step-00000002")
    shards = sorted(path.name for path in (output / "checkpoints" / "step-00000001").glob("shard-*"))
    assert shards == ["shard-00000.bin", "shard-00001.bin"]
    train(recipe_from_dict({**ran[0], "output": str(output)}), console=console, resume=True)
    assert_same_run(alone, output)


def test_microbatches_add_up_to_the_step(ran, console, tmp_path):
    values = {**ran[0], "keep_last": 1}
    values["model"]["overrides"]["latent"] |= {"target": "plain"}  # a centred target knows its microbatch alone
    folders = []
    for accumulation in (1, 2, 4):
        folders.append(tmp_path / str(accumulation))
        changed = {**values, "output": str(folders[-1]), "accumulation": accumulation}
        train(recipe_from_dict(changed), console=console)
    assert_same_run(folders[0], folders[1])
    assert_same_run(folders[0], folders[2])


def test_every_row_of_a_step_belongs_to_one_process(recipe):
    import dataclasses

    stages = {name: dataclasses.replace(stage, clips_per_step=12) for name, stage in recipe.stages.items()}
    recipe = dataclasses.replace(recipe, stages=stages, accumulation=2)
    rows = [RowsOfRank(recipe, rank, 3)(0) for rank in range(3)]
    assert sorted(row for part in rows for row in part) == list(range(12))
    # A microbatch is the same six rows whatever the number of processes.
    assert sorted(row for part in rows for row in part[:2]) == list(range(6))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"kind": "none"}}, "set parallel.kind to ddp or fsdp"),
        ({"parallel": {"kind": "ddp"}}, "clips_per_step=4 cannot be shared by 3 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(values, monkeypatch, console, changes, said):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        train(recipe_from_dict({**values, **changes}), console=console)
    assert not Path(values["output"]).exists()


def test_microbatches_of_unequal_size_are_refused(values):
    with pytest.raises(UserError, match="clips_per_step=3 is no multiple of accumulation=2"):
        recipe_from_dict({**values, "accumulation": 2})


@pytest.mark.slow
def test_the_command_under_torchrun_ends_with_one_line_and_exit_code_2(values, tmp_path):
    import yaml

    values["parallel"] = {"kind": "ddp"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    ended = torchrun("-m", "mirasol.cli", "train", "--config", str(tmp_path / "recipe.yaml"), timeout=200)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("mirasol: ")]
    assert len(lines) == 1
    assert "clips_per_step=3 cannot be shared by 2 processes" in lines[0]
