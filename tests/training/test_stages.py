"""What a stage trains moves, what it freezes does not, and the table says which is which."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.parts import LossWeights
from mirasol.config.recipe import Stage
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train
from mirasol.training.weights.stages import (
    TRAINABLE,
    StageWeights,
    compute_stage_losses,
    find_trainable_component,
    loss_reaches,
)

ALL_BUT_TEXT = ["vit", "tubes", "audio", "combiner", "latent", "reconstruction", "cross_attention"]
# The paper's stages: what trains in each (supplement, section 4).
PAPER = {
    "image_text": {"objective": "image_text", "questions_per_clip": 1},
    "video_text": {"trains": ALL_BUT_TEXT},
    "audio": {"trains": ["audio"]},
    "finetune": {"loss_weights": {"text": 10.0}},
}


@pytest.fixture
def staged(values, image_shapes):
    """Makes the recipe of one stage, of a small model that has a contrastive pass."""

    def make(stage: dict, **changes):
        values["model"]["overrides"] = {**values["model"]["overrides"], "contrastive": {"width": 8}}
        if stage.get("objective") == "image_text":
            values["data"]["root"] = str(image_shapes)
        given = {"steps": 3, "clips_per_step": 3, "questions_per_clip": 2, "allow_frozen_random": True}
        values["stages"] = {"only": {**given, **stage}}
        return recipe_from_dict({**values, "validate_every": 3, **changes})

    return make


def untrained(recipe, vocabulary: int) -> MirasolForConditionalGeneration:
    config = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)
    config.vocab_size = vocabulary
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(config)


@pytest.mark.parametrize("name", PAPER)
def test_frozen_weights_keep_their_bits_and_all_others_move(staged, console, monkeypatch, name):
    # Both modalities are missing now and then, so that what stands for a missing one gets gradients too.
    shares = {} if name == "image_text" else {"drop_video": 0.4, "drop_audio": 0.4}
    recipe = staged({**PAPER[name], **shares, "clips_per_step": 6})
    before = {}

    def note(self, *arguments):
        before.update({key: value.clone() for key, value in self.model.state_dict().items()})

    enter = StageWeights.enter

    def entered(self, stage):
        if stage == "only":
            note(self)
        enter(self, stage)

    monkeypatch.setattr(StageWeights, "enter", entered)
    after = load_file(train(recipe, console=console) / "model.safetensors")
    model = untrained(recipe, len(before["text.embedding.weight"]))
    trained = StageWeights(recipe, model).trained["only"]
    assert trained
    for key in dict(model.named_parameters()):
        assert torch.equal(before[key], after[key]) == (key not in trained), key


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        ("clips", {}),
        ("clips", {"text": 0.0}),
        ("clips", {"latent": 0.0}),
        ("clips", {"video": 0.0}),
        ("clips", {"audio": 0.0}),
        ("clips", {"text": 0.0, "latent": 0.0, "video": 0.0}),
        ("image_text", {}),
        ("image_text", {"text": 0.0}),
        ("image_text", {"contrastive": 0.0}),
    ],
)
@pytest.mark.parametrize(
    "switches",
    [
        {"reconstruction": {"audio": True}},
        {"audio": {"shared_projection": True}, "text": {"tied": False}, "latent": {"mask_ratio": 0.0}},
    ],
)
def test_what_a_loss_reaches_is_what_gets_a_gradient(objective, weights, switches):
    if len(weights) == 3 and "reconstruction" not in switches:
        pytest.skip("no loss is left")
    torch.manual_seed(0)
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **switches, contrastive={"width": 8})).train()
    stage = Stage(steps=1, questions_per_clip=1, objective=objective, loss_weights=LossWeights(**weights))
    model.config.loss_weights = stage.loss_weights
    text = torch.randint(5, 400, (4, 6))
    tensors = {"decoder_input_ids": text, "decoder_attention_mask": torch.ones_like(text), "labels": text}
    if objective == "image_text":
        tensors["images"] = torch.randn(4, 3, 32, 32)
    else:
        present = torch.tensor([[True] * 3, [True] * 3, [False, True, True], [True] * 3])
        tensors |= {
            "video": torch.randn(4, 3, 4, 3, 32, 32), "audio": torch.randn(4, 3, 16, 64),
            "chunk_mask": torch.ones(4, 3, dtype=torch.bool), "video_mask": present, "audio_mask": present.flip(0),
        }  # fmt: skip
    compute_stage_losses(model, stage, tensors).loss.backward()
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moves == loss_reaches(stage, name, model.config), name


def test_stages_of_one_run_take_turns_and_a_resumed_run_knows_whose_turn_it_is(staged, values, console, tmp_path):
    recipe = staged({})
    values["stages"] = {
        "sound": {"steps": 2, "clips_per_step": 2, "questions_per_clip": 1, "trains": ["audio"]},
        "text": {"steps": 3, "clips_per_step": 2, "questions_per_clip": 1, "trains": ["text", "vocabulary"]},
    }
    for stage in values["stages"].values():
        stage["allow_frozen_random"] = True
    values["checkpoint_every"] = 3
    whole = train(recipe_from_dict({**values, "output": str(tmp_path / "whole")}), console=console)
    states = {}
    enter = StageWeights.enter

    def halted(self, stage):
        enter(self, stage)
        states[stage] = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StageWeights, "enter", halted)
        train(recipe_from_dict({**values, "output": str(tmp_path / "again")}), console=console)
    assert {find_trainable_component(name) for name in states["sound"]} == {"audio"}
    assert {find_trainable_component(name) for name in states["text"]} == {"text", "vocabulary"}
    assert states[None] == states["sound"] | states["text"]

    folder = tmp_path / "again"
    for place in [*folder.glob("checkpoints/step-00000005*"), folder / "checkpoint"]:
        shutil.rmtree(place)
    resumed = train(recipe_from_dict({**values, "output": str(folder)}), console=console, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert recipe.stages["only"].trains is None


def test_the_table_stands_in_the_log_and_in_run_json(staged, console):
    recipe = staged({"trains": ["audio", "combiner"]})
    train(recipe, console=console)
    shown = console.file.getvalue()
    recorded = json.loads((Path(recipe.output) / "run.json").read_text())["components"]
    assert set(recorded) == set(TRAINABLE)
    for component, row in recorded.items():
        expected = row["parameters"] if component in ("audio", "combiner") else 0
        assert row["trained"] == {"only": expected}
        [line] = [line for line in shown.splitlines() if line.startswith(f"{component} ")]
        assert line.split() == [component, f"{row['parameters']:,}", "yes" if expected else "no"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"trains": ["vitt"]}, "unknown component 'vitt': did you mean 'vit'"),
        ({"trains": []}, "trains nothing"),
        ({"trains": ["contrastive"]}, "no loss of this stage.*reaches 'contrastive'"),
        ({"trains": ["reconstruction"], "loss_weights": {"video": 0.0}}, "'reconstruction'.*loss_weights.video=0"),
        (
            {"objective": "image_text", "questions_per_clip": 1, "trains": ["vit", "combiner"]},
            "image_text.*reaches 'combiner'",
        ),
        ({"loss_weights": {"text": 0.0, "latent": 0.0, "video": 0.0}}, "no loss reaches any weight"),
        ({"objective": "image_text"}, "one text for each image: set 1"),
        ({"objective": "image_text", "questions_per_clip": 1, "span": "segment"}, "images have no time"),
        ({"objective": "image_text", "questions_per_clip": 1, "drop_audio": 0.5}, "drop_audio=0.5 has no effect"),
        ({"objective": "image_text", "questions_per_clip": 1, "shift_audio": 1.0}, "shift_audio=1.0 has no effect"),
        (
            {"objective": "image_text", "questions_per_clip": 1, "loss_weights": {"latent": 2.0}},
            "loss_weights.latent=2.0 has no effect",
        ),
    ],
)  # fmt: skip
def test_what_cannot_train_is_refused(staged, console, stage, message):
    with pytest.raises(UserError, match=message):
        train(staged(stage), console=console)


def test_a_model_without_a_contrastive_pass_or_without_the_component_is_refused(staged, values, console):
    staged({})
    values["model"]["overrides"] = {**values["model"]["overrides"], "contrastive": None}
    values["stages"]["only"]["trains"] = ["contrastive"]
    with pytest.raises(UserError, match="no weights of 'contrastive'"):
        train(recipe_from_dict(values), console=console)


def test_images_train_both_passes_and_are_validated(staged, console):
    recipe = staged(PAPER["image_text"])
    train(recipe, console=console)
    lines = read_metrics(Path(recipe.output) / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(line["contrastive_loss"] > 0 and line["text_loss"] > 0 for line in steps)
    assert all(line["loss"] == pytest.approx(line["contrastive_loss"] + line["text_loss"], rel=1e-5) for line in steps)
    [validation] = [line["image"] for line in lines if line["kind"] == "validation"]
    assert validation["contrastive_loss"] > 0
    assert validation["by_type"]["image"]["rows"] == 2


def test_clips_where_images_are_wanted_and_the_other_way_are_refused(staged, values, console, image_shapes):
    values["data"]["root"] = str(image_shapes)
    values["stages"] = {"only": {"steps": 1, "questions_per_clip": 1}}
    with pytest.raises(UserError, match="no examples about whole clips"):
        train(recipe_from_dict(values), console=console)
