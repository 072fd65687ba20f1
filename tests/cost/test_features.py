"""What `mirasol plan` says of a feature cache."""

from pathlib import Path

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.cost import features as feature_costs
from mirasol.cost import plan as planning
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.plan import plan_run
from mirasol.cost.step import EncodingCost, StepCost, StepShape, count_encoding_cost, count_step_cost
from mirasol.training.features import compute_features

TRAINS = ["combiner", "latent", "reconstruction", "text", "cross_attention", "vocabulary"]


def build(overrides: dict, device: str) -> MirasolForConditionalGeneration:
    config = MirasolConfig.preset("tiny", **overrides, reconstruction={"audio": True})
    with torch.device(device):
        model = MirasolForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("chunk_encoder."))
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_over_features_is_a_step_without_the_encoders(recipe, precision):
    model = build({"vit": recipe.model.overrides["vit"] | {"dropout": 0.0}}, "meta")
    full, cached = (
        count_step_cost(model, StepShape(2, 3, 1, 9, 4, features=each), precision) for each in (False, True)
    )
    encoding = count_encoding_cost(model, 3, precision)
    assert full.forward_flops - cached.forward_flops == 2 * encoding.flops > 0
    assert full.backward_flops == cached.backward_flops
    assert cached.saved_bytes <= full.saved_bytes


def test_a_clip_takes_the_bytes_that_are_stored():
    model = build({}, "cpu")
    chunks = 2
    media = {
        "video": torch.randn(1, chunks, *model.config.video.chunk_shape),
        "audio": torch.randn(1, chunks, *model.config.audio.chunk_shape),
        "video_mask": torch.ones(1, chunks, dtype=torch.bool),
        "audio_mask": torch.ones(1, chunks, dtype=torch.bool),
    }
    found = compute_features(model, media).values()
    encoding = count_encoding_cost(build({}, "meta"), chunks)
    assert encoding.feature_bytes == sum(value.nbytes for value in found) == 4 * encoding.feature_values


@pytest.fixture
def values(values, monkeypatch, tmp_path) -> dict:
    """A recipe of 5 clips with a feature cache; a step takes 1 TFLOP, a clip's features 1 TFLOP and 10^6 bytes."""
    for name in ("vit", "audio"):
        stack = values["model"]["overrides"][name]
        stack.get("adapter", stack)["dropout"] = 0.0
    stage = {"steps": 10, "clips_per_step": 2, "questions_per_clip": 1, "trains": TRAINS, "allow_frozen_random": True}
    values |= {"stages": {"first": stage, "second": {**stage, "steps": 5}}}
    values["data"] |= {"feature_cache": str(tmp_path / "features")}
    cost = StepCost(5 * 10**11, 5 * 10**11, 0, saved_bytes=7, peak_bytes=50)
    monkeypatch.setattr(planning, "count_step_cost", lambda *given, **named: cost)
    encoding = EncodingCost(10**12, 10**5, 10**6, 2 * 10**5)
    monkeypatch.setattr(feature_costs, "count_encoding_cost", lambda *given, **named: encoding)
    return values


def plan(values: dict):
    return plan_run(recipe_from_dict(values), Assumptions(peak_tflops=1.0, mfu=1.0))


def test_each_clip_is_encoded_once_over_all_stages(values):
    found = plan(values)
    first, second = (found.stages[name] for name in ("first", "second"))
    assert first.shape.features and first.features.computed == 5 and second.features.computed == 0
    assert first.seconds == pytest.approx(10 + 5) and second.seconds == pytest.approx(5)
    assert first.epoch_seconds == pytest.approx(2.5 + 5) and first.features.later_epoch_seconds == pytest.approx(2.5)
    assert second.epoch_seconds == second.features.later_epoch_seconds == pytest.approx(2.5)
    assert found.feature_bytes == 5 * 10**6 and first.features.clip_bytes == 10**6
    # A microbatch's features, and a clip on its way to becoming some.
    assert first.memory.peak == found.stages["first"].memory.weights + first.memory.optimizer + 2 * 10**6 + 10**5
    assert not Path(values["data"]["feature_cache"]).exists()


def test_clips_beyond_the_limit_are_encoded_every_time(values):
    values["data"] |= {"feature_cache_limit": 0.003, "feature_cache_dtype": "fp32"}
    limited = plan(values).stages["first"]
    assert limited.features.computed == 3 + 2 * 4  # 4 epochs
    assert limited.features.disk_bytes == 3 * 10**6
    assert limited.features.later_epoch_seconds == pytest.approx(2.5 + 2)
    values["data"]["feature_cache_dtype"] = "bf16"
    assert plan(values).stages["first"].features.clip_bytes == 4 * 10**5


def test_stages_without_features_and_unknown_clips_are_noted(values):
    values["stages"]["second"]["trains"] = None
    found = plan(values)
    assert found.stages["second"].features is None and not found.stages["second"].shape.features
    assert "stages.second does not use the feature cache: stages.second trains audio, tubes, vit" in found.notes
    values["data"]["root"] += "-absent"
    absent = plan(values)
    assert absent.stages["first"].features.computed == 20 and absent.feature_bytes is None
    assert absent.stages["first"].epoch_seconds is None is absent.stages["first"].features.later_epoch_seconds
    assert any("how often a clip comes is unknown" in note for note in absent.notes)
    values["stages"]["first"]["augment"] = {"flip": 0.5}
    assert any("mirasol train refuses this: data.feature_cache" in note for note in plan(values).notes)
