"""Frozen encoders compute a clip once: the same training as without the cache, in less work."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_once import make_once
from rich.console import Console
from safetensors.torch import load_file
from trainings import elsewhere, finished

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError
from mirasol.training import trainer
from mirasol.training.features import find_obstacles, hash_encoders
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train
from mirasol.training.weights.stages import StageWeights

STACK = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32}
NOISY = {**STACK, "dropout": 0.1}
MODEL = {
    "vit": STACK,
    "audio": {"adapter": STACK},
    "combiner": {"stack": NOISY},
    "latent": {"stack": NOISY, "mask_ratio": 0.3},
    "reconstruction": {"stack": NOISY, "audio": True},
    "text": {"stack": NOISY},
}
TRAINS = ["combiner", "latent", "reconstruction", "text", "cross_attention", "vocabulary"]
FROZEN = {"trains": TRAINS, "allow_frozen_random": True}


def make_values(root: Path, cache: Path, output: Path) -> dict[str, Any]:
    """A recipe with frozen encoders: segments, then whole clips of several lengths that come again and again, shown
    without picture or sound now and then."""
    drop = {"drop_video": 0.3, "drop_audio": 0.3}
    return {
        "seed": 3, "output": str(output), "device": "cpu", "threads": 1,
        "data": {"root": str(root), "cache": str(cache)},
        "model": {"preset": "tiny", "overrides": MODEL}, "tokenizer": {"vocab_size": 300},
        "stages": {
            "segments": {"steps": 2, "span": "segment", "clips_per_step": 4, "questions_per_clip": 1, **FROZEN, **drop},
            "questions": {"steps": 4, "clips_per_step": 4, "questions_per_clip": 2, **FROZEN, **drop},
        },
        "optimizer": {"warmup_steps": 2}, "log_every": 1, "validate_every": 3, "validation_clips": 2,
        "checkpoint_every": 1, "samples": 0, "keep_best": "clip.text_loss",
    }  # fmt: skip


def with_features(values: dict[str, Any], folder: Path, name: str, **data: Any) -> dict[str, Any]:
    """The recipe with another output folder and a feature cache."""
    return {**elsewhere(values, name), "data": {**values["data"], "feature_cache": str(folder), **data}}


def run(values: dict[str, Any]) -> str:
    """Trains; returns what was printed."""
    told = io.StringIO()
    train(recipe_from_dict(values), resume=True, console=Console(file=told, width=1000))
    return told.getvalue()


def read_losses(values: dict[str, Any]) -> dict[str, float]:
    """Every loss of every step and validation by its place."""
    found = {}
    for number, line in enumerate(read_metrics(Path(values["output"]) / "metrics.jsonl")):
        for part, numbers in {
            name: each for name, each in {"": line, **line}.items() if isinstance(each, dict)
        }.items():
            found |= {f"{number} {part} {name}": loss for name, loss in numbers.items() if name.endswith("loss")}
    return found


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    losses, expected = read_losses(ours), read_losses(theirs)
    assert losses.keys() == expected.keys() and len(losses) > 30 and any("clip text_loss" in name for name in losses)
    assert {name for name in losses if abs(losses[name] - expected[name]) > tolerance} == set()


@pytest.fixture(scope="module")
def made(data_root, shared_cache, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """The recipe, run without a cache as `plain`, and with one in the folder `features` as `cached`; not to be
    changed."""

    def make(folder: Path) -> None:
        folder.mkdir()
        values = make_values(data_root, shared_cache, folder / "plain")
        run(values)
        told = run(with_features(values, folder / "features", "cached"))
        (folder / "told").write_text(told)

    folder = make_once(tmp_path_factory, "feature-runs", make)
    return make_values(data_root, shared_cache, folder / "plain")


@pytest.fixture
def values(data_root, shared_cache, tmp_path) -> dict[str, Any]:
    return make_values(data_root, shared_cache, tmp_path / "plain")


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of chunks of every clip that is computed."""
    seen: list[int] = []
    original = MirasolForConditionalGeneration.compute_features

    def counting(self, video, audio, video_mask, audio_mask):
        seen.append(video.shape[1])
        return original(self, video, audio, video_mask, audio_mask)

    monkeypatch.setattr(MirasolForConditionalGeneration, "compute_features", counting)
    return seen


def folder_of(made: dict[str, Any]) -> Path:
    return Path(made["output"]).parent


def test_losses_equal_those_without_the_cache(made):
    assert_close(elsewhere(made, "cached"), made, 1e-5)
    told = (folder_of(made) / "told").read_text()
    files = len(list((folder_of(made) / "features").rglob("*.safetensors")))
    # Two validations of 2 clips, 6 steps of 4.
    assert f"of 28 clips that were asked for {files} were computed" in told and 7 < files < 28


def test_runs_that_find_all_features_compute_and_decode_nothing(made, values, computed, tmp_path, monkeypatch):
    again = with_features(values, folder_of(made) / "features", "again")
    run(again)
    assert finished(again) == finished(elsewhere(made, "cached"))
    # Another recipe, whose clips all came before.
    monkeypatch.setattr("mirasol.data.clip_cache._read", None)
    values["data"]["cache"] = str(tmp_path / "no clips")
    values["stages"] = {"questions": {**values["stages"]["questions"], "steps": 2, "clips_per_step": 2}}
    run(with_features(values, folder_of(made) / "features", "other"))
    assert computed == []


def test_an_interrupted_run_goes_on_to_the_same_bits_whatever_the_cache_has_lost(made, values, computed, monkeypatch):
    values = with_features(values, Path(values["output"]).parent / "features", "stopped")
    step = trainer.training_step

    def stopping(run, batch):
        if batch.step == 4:
            raise UserError("power cut")
        return step(run, batch)

    monkeypatch.setattr(trainer, "training_step", stopping)
    with pytest.raises(UserError, match="power cut"):
        run(values)
    monkeypatch.setattr(trainer, "training_step", step)
    files = sorted(Path(values["data"]["feature_cache"]).rglob("*.safetensors"))
    for file in files[::3]:
        file.unlink()
    for file in files[1::3]:
        os.truncate(file, 300)
    before = len(computed)
    with pytest.warns(UserWarning, match="damaged file in the feature cache"):
        told = run(values)
    assert "of them because their files were damaged" in told
    assert 0 < len(computed) - before < len(files)
    assert finished(values) == finished(elsewhere(made, "cached"))


def test_shifted_audio_shares_the_cache_with_audio_that_is_not(made, values, computed, tmp_path):
    """The cache holds clips as they are, whoever fills it: the losses are those without it."""
    questions = {**values["stages"]["questions"], "steps": 3, "shift_audio": 0.6}
    values["stages"] = {"questions": questions}
    values["keep_best"] = None
    values["data"]["validation_split"] = None
    run(values)
    for folder, least in ((folder_of(made) / "features", 0), (tmp_path / "new features", 1)):
        before = len(computed)
        cached = with_features(values, folder, f"cached {least}")
        run(cached)
        assert (len(computed) > before) == bool(least)
        ours, theirs = read_losses(cached), read_losses(values)
        assert ours.keys() == theirs.keys() and len(ours) >= 12
        assert {name for name in ours if abs(ours[name] - theirs[name]) > 1e-5} == set()
    for file in (tmp_path / "new features").rglob("*.safetensors"):
        kept, others = load_file(file), load_file(next((folder_of(made) / "features").rglob(file.name)))
        assert all(torch.equal(kept[name], others[name]) for name in others)


def test_a_full_disk_is_told_in_one_line_and_changes_nothing(made, values, monkeypatch):
    write, written = Path.write_bytes, []

    def fill(self, content):
        if "features" not in self.parts:
            return write(self, content)
        written.append(self)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    features = Path(values["output"]).parent / "features"
    full = with_features(values, features, "full")
    told = run(full)
    assert told.count("No space left on device: no more features are kept") == 1
    assert len(written) == 4 and len(list(features.rglob("*.safetensors"))) == 3
    assert finished(full) == finished(elsewhere(made, "cached"))


def test_many_things_at_once_change_no_loss(values, tmp_path):
    """Autocast, microbatches, recomputation, averaged weights, a loading process that decodes ahead, epochs with rows
    that only fill a batch, and rounded features."""
    values |= {"precision": "bf16", "accumulation": 2, "recompute": "block", "ema": 0.9}
    values["data"]["decode"] = "ahead"
    values["stages"]["questions"] |= {"steps": None, "epochs": 1, "questions_per_clip": 20}
    values["stages"]["all"] = {"steps": 2, "clips_per_step": 4, "questions_per_clip": 1, "augment": {"flip": 0.5}}
    run(values)
    cached = with_features(values, tmp_path / "features", "cached")
    told = run(cached | {"workers": 1})
    assert "stages.all does not use the feature cache: stages.all trains audio, tubes, vit" in told
    assert_close(cached, values, 1e-5)
    small = with_features(values, tmp_path / "features", "small", feature_cache_dtype="bf16")
    run(small)
    assert_close(small, values, 0.01)
    assert read_losses(small) != read_losses(cached)


@pytest.fixture(scope="module")
def outline() -> MirasolForConditionalGeneration:
    import torch

    with torch.device("meta"):
        return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **MODEL, contrastive={"width": 8}))


def find(values: dict[str, Any], model: MirasolForConditionalGeneration, **overrides: Any) -> dict[str, str]:
    recipe = recipe_from_dict(values)
    config = MirasolConfig.preset("tiny", **{**MODEL, **overrides})
    return find_obstacles(recipe, config, StageWeights(recipe, model).trained)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trains": ["text", "vit"]}, "stages.questions trains vit"),
        ({"trains": None}, "stages.questions trains audio, tubes, vit"),
        ({"augment": {"flip": 0.5}}, "stages.questions.augment.flip=0.5 changes the clips"),
        ({"augment": {"time_shift": 4}}, "stages.questions.augment.time_shift=4 changes the clips"),
        ({"augment": {"mixup": 0.4}}, "stages.questions.augment.mixup=0.4 changes the clips"),
        ({"augment": {"crop": 0.5}}, "stages.questions.augment.crop=0.5 changes the clips"),
        ({"augment": {"spec_augment": {"time_masks": 1}}}, "stages.questions.augment.spec_augment=… changes the clips"),
        ({"dropout": 0.2}, "dropout=0.2 inside the frozen vit: set stages.questions.dropout to 0"),
        ({"layer_drop": 0.1}, "layer_drop=0.1 inside the frozen vit: set stages.questions.layer_drop to 0"),
    ],
)  # fmt: skip
def test_what_forbids_the_cache_is_named(values, outline, changes, reason):
    values["stages"]["questions"] |= changes
    found = find(values, outline)
    assert found.keys() == {"questions"} and reason in found["questions"]


def test_encoders_that_change_before_or_inside_a_stage_forbid_it(values, outline):
    assert find(values, outline) == {}
    values["stages"]["segments"]["trains"] = None
    assert find(values, outline)["questions"].startswith("stages.segments trains them before stages.questions")
    values["stages"]["segments"]["trains"] = TRAINS
    adapter = {"audio": {"adapter": {**STACK, "attention_dropout": 0.1}}}
    assert "attention_dropout=0.1 inside the frozen audio.adapter" in find(values, outline, **adapter)["questions"]
    assert "dropout=0.1 inside the frozen vit" in find(values, outline, vit=NOISY)["questions"]
    values["stages"]["questions"]["dropout"] = values["stages"]["segments"]["dropout"] = 0.0
    assert find(values, outline, vit=NOISY) == {}
    values["stages"]["images"] = {**FROZEN, "steps": 1, "objective": "image_text", "questions_per_clip": 1,
                                  "trains": ["contrastive"]}  # fmt: skip
    assert find(values, outline).keys() == {"images"}


def test_a_cache_that_no_stage_can_use_is_refused_before_anything_runs(values, tmp_path):
    for stage in values["stages"].values():
        stage["augment"] = {"flip": 0.5}
    values = with_features(values, tmp_path / "features", "refused")
    with pytest.raises(UserError, match=r"data\.feature_cache=.* has no effect: stages\.segments\.augment\.flip=0\.5"):
        run(values)
    assert not (tmp_path / "features").exists() and not Path(values["output"]).exists()


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"feature_cache_limit": 1.0}, {}, r"feature_cache_limit=1\.0 has no effect without data\.feature_cache"),
        ({"feature_cache_dtype": "bf16"}, {}, r"feature_cache_dtype=bf16 has no effect without data\.feature_cache"),
        ({"feature_cache": "f", "feature_cache_limit": 0.0}, {}, r"feature_cache_limit=0\.0 must be positive"),
        ({"feature_cache": "same", "cache": "./same"}, {}, r"data\.feature_cache=same is data\.cache too"),
        ({"feature_cache": "f"}, {"parallel": {"kind": "fsdp"}}, r"data\.feature_cache=f: with parallel\.kind=fsdp"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(values, data, changes, message):
    with pytest.raises(UserError, match=message):
        recipe_from_dict({**values, **changes, "data": {**values["data"], **data}})


def test_a_resumed_run_may_move_or_drop_its_cache_but_not_round_otherwise(values):
    plain = recipe_from_dict(values)
    cached = recipe_from_dict(with_features(values, Path("features"), "plain", feature_cache_limit=2.0))
    small = recipe_from_dict(with_features(values, Path("features"), "plain", feature_cache_dtype="bf16"))
    assert cached.compute_fingerprint() != small.compute_fingerprint()
    assert recipe_from_dict(with_features(values, Path("other"), "plain")).compute_fingerprint() == (
        cached.compute_fingerprint()
    )
    assert plain.compute_fingerprint() == elsewhere_fingerprint(values)


def elsewhere_fingerprint(values: dict[str, Any]) -> str:
    return recipe_from_dict(elsewhere(values, "other")).compute_fingerprint()


def test_the_key_follows_all_that_features_depend_on():
    import torch

    cpu = torch.device("cpu")

    def key(seed: int = 0, precision: str = "fp32", **changes: Any) -> str:
        torch.manual_seed(seed)
        return hash_encoders(MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **{**MODEL, **changes})),
                             precision, cpu)  # fmt: skip

    torch.manual_seed(0)
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **MODEL))
    first = hash_encoders(model, "fp32", cpu)
    with torch.no_grad():
        model.text.embedding.weight.add_(1.0)
        model.chunk_encoder.missing_video.add_(1.0)  # what replaces features is not one of them
    assert hash_encoders(model, "fp32", cpu) == first == key()
    with torch.no_grad():
        model.chunk_encoder.audio_adapter.norm.bias[3] += 1e-6
    changed = hash_encoders(model, "fp32", cpu)
    others = [key(1), key(precision="bf16"), key(vit={**STACK, "norm_eps": 1e-6}),
              key(reconstruction={"stack": NOISY, "image_size": 16})]  # fmt: skip
    assert len({first, changed, *others}) == 6


@pytest.mark.slow
def test_two_processes_share_a_cache_and_train_as_one(values, tmp_path):
    stages = {"questions": {"steps": 4, "clips_per_step": 4, "questions_per_clip": 2, **FROZEN, "dropout": 0.0}}
    values |= {"stages": stages, "parallel": {"kind": "ddp"}, "validate_every": 2}
    values["model"] = {"preset": "tiny", "overrides": {**MODEL, "latent": {"stack": STACK, "mask_ratio": 0.0}}}
    values["optimizer"] |= {"learning_rate": 1e-4}
    run(values)
    shared = with_features(values, tmp_path / "features", "shared")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(shared))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "mirasol.cli", "train", "--config", str(tmp_path / "recipe.yaml")]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    ours, theirs = read_losses(shared), read_losses(values)
    assert {name for name in theirs if abs(ours[name] - theirs[name]) > 1e-5} == set()
    again = with_features(values, tmp_path / "features", "again")
    assert "0 were computed" in run(again)


@pytest.mark.slow
def test_images_between_clips_are_computed_as_ever(values, image_shapes, tmp_path):
    overrides = {**MODEL, "contrastive": {"width": 8}}
    mixture = {"pictures": {"root": str(image_shapes)}, "clips": {"root": values["data"]["root"]}}
    images = {"steps": 2, "objective": "image_text", "clips_per_step": 4, "questions_per_clip": 1,
              "data_sets": ["pictures"], **FROZEN, "trains": ["text", "vocabulary", "contrastive"]}  # fmt: skip
    values |= {"model": {"preset": "tiny", "overrides": overrides}, "keep_best": None}
    values["data"] = {"mixture": mixture, "cache": values["data"]["cache"]}
    clips = {**values["stages"]["questions"], "data_sets": ["clips"]}
    values["stages"] = {"images": images, "clips": clips, "again": {**images, "steps": 1}}
    run(values)
    cached = with_features(values, tmp_path / "features", "cached")
    assert "stages.images does not use the feature cache" in run(cached)
    losses, expected = read_losses(cached), read_losses(values)
    assert {name for name in expected if abs(losses[name] - expected[name]) > 1e-5} == set()
