"""Several processes do what one does: the same losses, gradients and weights, whatever each of them holds."""

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_once import make_once
from rich.console import Console
from safetensors.torch import load_file

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.loader import RowsOfRank
from mirasol.errors import UserError
from mirasol.training.distributed import seed_noise
from mirasol.training.export import export_run
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train
from mirasol.training.weights.stages import find_trainable_component

STACK = {
    "depth": 1,
    "width": 32,
    "hidden": 32,
    "heads": 1,
    "head_width": 32,
    "dropout": 0.0,
    "bias": False,
    "layer_drop": 0.2,
}
KINDS = ("ddp", "fsdp")
LOSSES = ("loss", "text_loss", "latent_loss", "video_loss", "gradient_norm")


def torchrun(*arguments: str, processes: int = 2, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, **options)


def without_noise(values: dict) -> dict:
    """No dropout, which every process draws for itself; no biases, for a key's has a gradient of zero
    whose rounding Adam would blow up."""
    overrides = {name: {"stack": STACK} for name in ("combiner", "latent", "reconstruction", "text")}
    overrides |= {"vit": STACK, "audio": {"adapter": STACK}}
    overrides["latent"] |= {"mask_ratio": 0.3}
    stages = {
        "slots": {"steps": 1, "span": "segment", "clips_per_step": 4, "questions_per_clip": 1},
        "questions": {"steps": 2, "clips_per_step": 4, "questions_per_clip": 4, "drop_video": 0.4, "drop_audio": 0.4},
    }
    model = {"preset": "tiny", "overrides": overrides}
    return {**values, "model": model, "stages": stages, "checkpoint_every": 1, "validate_every": 3, "samples": 1}


def quick_runs(values: dict, folder: Path, images: Path) -> dict[str, dict]:
    """What one process, and both kinds of run with two, go through. Settings that have nothing to do with each other
    share a run."""
    shorter = {"stages": {"questions": {**values["stages"]["questions"], "steps": 2}}, "samples": 0}
    # A small rate, since AdamW's first steps make much of gradients that are mostly rounding; but at once, so that
    # weights move by far more than may differ.
    careful = {"learning_rate": 1e-4, "warmup_steps": 2}
    adam = {**careful, "name": "adam", "weight_decay": 0.0}
    muon = {**careful, "name": "muon", "learning_rate": 3e-5}
    stills = {"steps": 2, "objective": "image_text", "clips_per_step": 4, "questions_per_clip": 1}
    stage = {"steps": 1, "clips_per_step": 4, "questions_per_clip": 2}
    # Five clips are two steps, and in the second one process has only what fills the batch.
    epoch = {"epochs": 1, "clips_per_step": 4, "questions_per_clip": 64}
    silent = {"unheard": {**stage, "drop_audio": 1.0}, "unseen": {**stage, "drop_video": 1.0}, "epoch": epoch}
    stage = {**stage, "allow_frozen_random": True}
    turns = {"audio": {**stage, "trains": ["audio"]}, "text": {**stage, "trains": ["text", "vit"]}, "all": stage}
    model = {"preset": "tiny", "overrides": {**values["model"]["overrides"], "contrastive": {"width": 8}}}
    shapes, stages = values["data"]["root"], values["stages"]
    mixture = {
        "mixture": {
            "pictures": {"root": str(images)},
            "many": {"root": shapes, "weight": 2.5},
            "few": {"root": shapes, "train_split": "validation"},
        }
    }
    mixed_stages = {
        "images": {**stills, "steps": 1, "data_sets": ["pictures"]},
        "clips": {**stages["questions"], "steps": 2, "data_sets": ["many", "few"]},
        "slots": {**stages["slots"], "data_sets": ["many"]},
    }
    runs = {
        "run": {"optimizer": careful},
        "averaged": {**shorter, "ema": 0.9, "optimizer": adam, "recompute": "hidden"},
        "muon": {**shorter, "optimizer": muon, "recompute": "block"},
        "stills": {**shorter, "stages": {"images": stills}, "model": model, "data": {"root": str(images)}},
        "mixed": {**shorter, "stages": mixed_stages, "model": model, "data": mixture, "optimizer": careful},
        "silent": {**shorter, "stages": silent, "optimizer": careful},
        "turns": {**shorter, "stages": turns, "optimizer": careful},
    }
    return {name: {**values, **changes, "output": str(folder / name)} for name, changes in runs.items()}


def run_all(runs: dict[str, dict], folder: Path, resumed: tuple[str, ...] = (), checks: bool = True) -> dict:
    """Runs them in this process, as folder/NAME, then in two, as NAME-KIND; those of `resumed` also begun here and
    ended by two, as NAME-resumed-KIND. Returns what the two found besides."""
    for each in runs.values():
        train(recipe_from_dict({**each, "recompute": "none", "compile": False}), console=Console(quiet=True))
    goes_on = [{**runs[name], "output": str(folder / f"{name}-resumed")} for name in resumed]
    for each, kind in itertools.product(goes_on, KINDS):
        cut_back(shutil.copytree(each["output"].removesuffix("-resumed"), Path(f"{each['output']}-{kind}")))
    work = {"runs": list(runs.values()), "resumed": goes_on, "checks": checks}
    (folder / "work.json").write_text(json.dumps(work))
    script = Path(__file__).with_name("two_processes.py")
    ended = torchrun(str(script), str(folder / "work.json"), str(folder / "results.json"), timeout=1800)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def small(data_root, shared_cache) -> dict:
    return without_noise({
        "seed": 3,
        "data": {"root": str(data_root), "cache": str(shared_cache)},
        "tokenizer": {"vocab_size": 300},
        "optimizer": {"warmup_steps": 2},
        "device": "cpu", "log_every": 1, "validation_clips": 2, "threads": 1, "keep_last": 3,
    })  # fmt: skip


@pytest.fixture(scope="module")
def ran(small, image_shapes, tmp_path_factory):
    """(recipes, what the two processes found, folder of the runs)."""

    def make(folder: Path) -> None:
        folder.mkdir()
        run_all(quick_runs(small, folder, image_shapes), folder, resumed=("averaged", "mixed"))

    folder = make_once(tmp_path_factory, "two-processes", make)
    results = json.loads((folder / "results.json").read_text())
    return quick_runs(small, folder, image_shapes), results, folder


def cut_back(run: Path) -> None:
    """The run as it was after its first step."""
    shutil.rmtree(run / "checkpoint")
    for folder in run.glob("checkpoints/step-*"):
        if folder.name != "step-00000001":
            shutil.rmtree(folder)


def trained(run: Path) -> list[dict[str, float]]:
    """Losses and norm of the gradients, step by step."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    return [{name: line[name] for name in line if name.endswith("loss") or name == "gradient_norm"} for line in lines]


def of_step(run: Path, step: int, folder: Path) -> Path:
    """The weights of one of a run's checkpoints, exported into `folder`."""
    return export_run(run, folder / str(step), step=step) / "model.safetensors"


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    first, second = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)
    for a, b in zip(trained(one), trained(other), strict=True):
        assert len(a) > 3
        assert b == pytest.approx(a, rel=1e-6, abs=tolerance)


@pytest.mark.parametrize("objective", ["clips", "image_text"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_unequal_halves_of_a_batch_have_the_losses_and_gradients_of_the_whole(ran, kind, objective):
    """Also where one process's clips lack all audio, and are shorter; images meet the texts of both processes."""
    assert ran[1][f"{kind} {objective}"] < 1e-5


@pytest.mark.parametrize("name", ["run", "averaged", "muon", "stills", "mixed", "silent", "turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_weights_of_one(ran, name, kind):
    """Also the average of them, with Adam and Muon, with activations that are computed again, on images, on images and
    clips of several data sets, where no clip of a batch has sound or none has pictures, in an epoch whose last step one
    process only fills, and where every stage freezes other parts."""
    assert_same_run(ran[2] / name, ran[2] / f"{name}-{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_and_validate_the_clips_of_a_mixture_as_one_does(ran, kind):
    one, two = (read_metrics(ran[2] / name / "metrics.jsonl") for name in ("mixed", f"mixed-{kind}"))
    names = ("clips_of_pictures", "clips_of_many", "clips_of_few")
    both = [[line for line in lines if line["kind"] == "train"] for lines in (one, two)]
    taken, shared = ([[line[name] for name in names] for line in lines] for lines in both)
    assert taken == shared
    assert list(map(sum, taken)) == [4] * 4
    assert all(map(sum, zip(*taken, strict=True))), "of every data set"
    expected, found = (next(line for line in lines if line["kind"] == "validation") for lines in (one, two))
    parts = ["few_clip", "many_clip", "pictures_image"]
    assert sorted(name for name in found if isinstance(found[name], dict)) == parts
    for part in parts:
        assert found[part]["text_loss"] == pytest.approx(expected[part]["text_loss"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_freeze_keeps_its_bits(ran, kind, tmp_path):
    first, second = (load_file(of_step(ran[2] / f"turns-{kind}", step, tmp_path)) for step in (1, 2))
    moved = {find_trainable_component(name) for name in first if not torch.equal(first[name], second[name])}
    assert moved == {"text", "vit"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_saved_is_exported_as_what_one_saved(ran, kind, tmp_path):
    one, two = (load_file(of_step(ran[2] / name, 2, tmp_path / name)) for name in ("run", f"run-{kind}"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_say_the_words_of_one_meanwhile(ran, kind):
    def said(run: Path) -> list[dict]:
        return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "samples"]

    assert len(said(ran[2] / "run")) == 1
    assert said(ran[2] / "run") == said(ran[2] / f"run-{kind}")


def test_an_error_of_the_first_process_reaches_all_and_is_told_once(ran):
    assert "already contains a run" in ran[1]["error"]
    assert ran[1]["report from rank zero"] == [False, True]


def test_processes_answer_questions_of_their_own_with_sharded_weights(ran):
    assert ran[1]["answers"] == [True, True]


def test_processes_wait_for_one_that_works_for_longer_than_their_limit(ran):
    assert ran[1]["patience"] == [True, True]


def test_sharded_matrices_move_as_whole_ones_with_muon(ran):
    assert ran[1]["muon"] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_with_what_two_began(ran, console, tmp_path, kind):
    output = shutil.copytree(ran[2] / f"averaged-{kind}", tmp_path / "run")
    cut_back(output)
    shards = sorted(path.name for path in (output / "checkpoints" / "step-00000001").glob("shard-*"))
    assert shards == ["shard-00000.bin", "shard-00001.bin"]
    train(recipe_from_dict({**ran[0]["averaged"], "output": str(output)}), console=console, resume=True)
    assert_same_run(ran[2] / "averaged", output)


@pytest.mark.parametrize("name", ["averaged", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_with_what_one_began(ran, name, kind):
    assert_same_run(ran[2] / name, ran[2] / f"{name}-resumed-{kind}")


def test_microbatches_add_up_to_the_step(ran, console, tmp_path):
    values = copy.deepcopy(ran[0]["run"])
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
        ({"parallel": {"kind": "ddp"}}, "clips_per_step=4 cannot be split over 3 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(values, monkeypatch, console, changes, said):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        train(recipe_from_dict({**values, **changes}), console=console)
    assert not Path(values["output"]).exists()


def test_microbatches_of_unequal_size_are_refused(values):
    with pytest.raises(UserError, match="clips_per_step=3 is not a multiple of accumulation=2"):
        recipe_from_dict({**values, "accumulation": 2})


@pytest.mark.slow
def test_the_command_under_torchrun_ends_with_one_line_and_exit_code_2(values, tmp_path):
    import yaml

    values["parallel"] = {"kind": "ddp"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    ended = torchrun("-m", "mirasol.cli", "train", "--config", str(tmp_path / "recipe.yaml"), timeout=1200)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("mirasol: ")]
    assert len(lines) == 1
    assert "clips_per_step=3 cannot be split over 2 processes" in lines[0]


@pytest.fixture
def two_steps(small, tmp_path) -> dict:
    stages = {"questions": {**small["stages"]["questions"], "steps": 2}}
    return {**small, "stages": stages, "samples": 0, "output": str(tmp_path / "run")}


@pytest.mark.slow
def test_bf16_on_two_processes_is_as_near_as_its_rounding(two_steps, console, tmp_path):
    """Of eight bits: losses and the gradients' norm within 1% of one process's in bf16 and in fp32."""
    run_all({"run": {**two_steps, "precision": "bf16"}}, tmp_path, checks=False)
    exact = {**two_steps, "output": str(tmp_path / "fp32")}
    train(recipe_from_dict(exact), console=console)
    for kind, one in itertools.product(KINDS, ("run", "fp32")):
        for a, b in zip(trained(tmp_path / one), trained(tmp_path / f"run-{kind}"), strict=True):
            assert b == pytest.approx(a, rel=0.01)


def test_noise_is_seeded_as_torch_does():
    torch.manual_seed(2**40 + 7)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    seed_noise(2**40 + 7, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), expected)
