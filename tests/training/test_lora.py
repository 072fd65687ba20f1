"""LoRA by the peft library: adapters alone train, resume to the same bits, and are merged at the end."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirasol import load_checkpoint
from mirasol.checkpoint import read_untrained
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.plan import plan_run
from mirasol.errors import UserError
from mirasol.training.build import make_model
from mirasol.training.export import export_run
from mirasol.training.trainer import train
from mirasol.training.weights.initial import load_initial
from mirasol.training.weights.lora import add_adapters, is_adapter, merge_adapters
from mirasol.training.weights.stages import StageWeights, find_trainable_component

TARGETS = ["vit", "audio", "combiner", "latent", "reconstruction", "text", "cross_attention"]


@pytest.fixture
def lora(values, finished_once):
    """Makes a recipe with adapters in a finished checkpoint."""

    def make(targets=("text", "vit"), stages=None, **changes) -> dict:
        made = {key: value for key, value in values.items() if key != "tokenizer"}
        stage = {"steps": 4, "clips_per_step": 2, "questions_per_clip": 2}
        settings = {"targets": list(targets), "rank": 2, "alpha": 4.0, **changes.pop("lora", {})}
        stages = {name: {**stage, **own} for name, own in (stages or {"only": {}}).items()}
        changed = {"model": {"init": str(finished_once)}, "lora": settings, "stages": stages, "checkpoint_every": 1}
        return {**made, **changed, "keep_last": 9, **changes}

    return make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"dropout": 1.0}, r"lora.dropout=1.0 must be in \[0, 1\)"),
        ({"targets": []}, "adapts nothing"),
        ({"targets": ["txt"]}, "unknown component 'txt': did you mean 'text'"),
        ({"targets": ["text", "text"]}, "appears twice"),
        ({"targets": ["vocabulary"]}, "vocabulary has no linear layers"),
        ({"targets": ["tubes"]}, "tubes has no linear layers"),
        ({"rnk": 2}, "unknown key 'lora.rnk': did you mean 'lora.rank'"),
        ({"rank": "two"}, "lora.rank"),
        ({"targets": None}, "lora.targets: null"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(lora, settings, message):
    with pytest.raises(UserError, match=message) as error:
        recipe_from_dict(lora(lora=settings))
    assert "\n" not in str(error.value)


def test_options_and_null_reach_it(lora, tmp_path):
    import yaml

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(lora()))
    assert load_recipe(file, ["lora.rank=5"]).lora.rank == 5
    assert load_recipe(file, ["lora.rank=null"]).lora.rank == 8
    assert load_recipe(file, ["lora=null"]).lora is None


@pytest.mark.parametrize("command", [train, lambda recipe: plan_run(recipe, Assumptions())])
def test_without_peft_one_line_says_what_to_install(lora, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora needs the package peft .*: pip install 'mirasol\[peft\]'"):
        command(recipe_from_dict(lora()))


def outputs(model, seed: int = 0):
    """Logits and losses of a fixed batch."""
    torch.manual_seed(seed)
    config = model.config
    media = {
        "video": torch.randn(2, 2, *config.video.chunk_shape), "audio": torch.randn(2, 2, *config.audio.chunk_shape)
    }  # fmt: skip
    media |= {name: torch.ones(2, 2, dtype=torch.bool) for name in ("chunk_mask", "video_mask", "audio_mask")}
    text = torch.randint(5, 200, (2, 6))
    with torch.no_grad():
        return model.eval()(**media, decoder_input_ids=text, labels=text)


@pytest.mark.parametrize("targets", [[target] for target in TARGETS] + [TARGETS])
def test_adapters_begin_as_nothing_and_merge_to_the_same_function(lora, targets):
    pytest.importorskip("peft")
    recipe = recipe_from_dict(lora(targets))
    initial = load_initial(recipe)
    model = make_model(recipe, initial.processor, initial)
    before = outputs(model)
    add_adapters(model, recipe)
    torch.testing.assert_close(outputs(model).logits, before.logits)
    adapters = [name for name, _ in model.named_parameters() if is_adapter(name)]
    assert {find_trainable_component(name) for name in adapters} == set(targets)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    changed = outputs(model)
    assert not torch.allclose(changed.loss, before.loss, atol=1e-4)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merge_adapters(model.config, recipe, model.state_dict())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    plain = load_initial(recipe).model
    plain.load_state_dict(merged)
    torch.testing.assert_close(outputs(plain).logits, changed.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs(plain).loss, changed.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"optimizer": {"name": "muon"}}, {"ema": 0.9}, {"recompute": "block"}])
def test_only_adapters_train_and_a_resumed_run_is_the_same_to_the_bit(lora, changes, console, tmp_path, finished_once):
    pytest.importorskip("peft")
    values = {**lora(lora={"dropout": 0.2}), **changes, "output": str(tmp_path / "whole")}
    whole = train(recipe_from_dict(values), console=console)
    before, after = (load_file(folder / "model.safetensors") for folder in (finished_once / "checkpoint", whole))
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {find_trainable_component(name) for name in moved} == {"text", "vit"}
    assert all(name.endswith(".weight") and "norm" not in name for name in moved)
    load_checkpoint(whole)  # without peft's names

    again = tmp_path / "again"
    train(recipe_from_dict({**values, "output": str(again)}), console=console)
    for place in [*again.glob("checkpoints/step-0000000[34]"), again / "checkpoint"]:
        shutil.rmtree(place)
    resumed = train(recipe_from_dict({**values, "output": str(again)}), console=console, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"cannot resume with a changed recipe: lora.rank differs"):
        train(recipe_from_dict({**values, "lora": {**values["lora"], "rank": 3}}), console=console, resume=True)


def test_every_step_exports_merged_and_stages_choose(lora, console, tmp_path, finished_once):
    pytest.importorskip("peft")
    stages = {"a": {"steps": 1, "trains": ["text", "combiner"]}, "b": {"steps": 1, "trains": ["vit"]}}
    values = lora(stages=stages)
    finished = train(recipe_from_dict(values), console=console)
    start = load_file(finished_once / "checkpoint" / "model.safetensors")

    def list_moved(folder: Path) -> set[str]:
        weights = load_file(folder / "model.safetensors")
        return {find_trainable_component(name) for name in weights if not torch.equal(weights[name], start[name])}

    first = export_run(values["output"], tmp_path / "first", step=1)
    last = export_run(values["output"], tmp_path / "last", step=2)
    assert list_moved(first) == {"text", "combiner"} and list_moved(last) == {"text", "combiner", "vit"}
    assert (last / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert read_untrained(last) == read_untrained(finished)
    load_checkpoint(first)


def test_a_target_that_no_stage_trains_is_refused_and_so_is_random_below_adapters(lora, values, console):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="lora.targets: no stage trains 'vit'"):
        train(recipe_from_dict(lora(stages={"a": {"trains": ["text"]}})), console=console)
    silent = lora(["reconstruction"], stages={"a": {"loss_weights": {"video": 0.0}}})
    with pytest.raises(UserError, match=r"no loss reaches|no stage trains 'reconstruction'"):
        train(recipe_from_dict(silent), console=console)
    scratch = {**lora(), "model": values["model"], "tokenizer": values["tokenizer"]}
    with pytest.raises(UserError, match="stages.only freezes weights that are still random: vit"):
        train(recipe_from_dict(scratch), console=console)
    with pytest.raises(UserError, match="no linear layers of 'contrastive'"):
        train(recipe_from_dict(lora(["contrastive"])), console=console)


def test_plan_counts_gradients_and_moments_of_adapters_alone(lora):
    pytest.importorskip("peft")
    recipe = recipe_from_dict(lora(TARGETS))
    initial = load_initial(recipe)
    model = make_model(recipe, initial.processor, initial)
    own = sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, recipe)
    count = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    planned = plan_run(recipe, Assumptions())
    stage = planned.stages["only"]
    assert stage.trained == count and planned.parameters == own + count
    assert stage.memory.gradients == 4 * count and stage.memory.optimizer == 8 * count
    assert planned.result_bytes == 4 * own and planned.checkpoint_bytes == 4 * (own + count) + 8 * count
    full = plan_run(recipe_from_dict({**lora(TARGETS), "lora": None}), Assumptions())
    assert stage.memory.peak < full.stages["only"].memory.peak
    chosen = StageWeights(recipe, model)
    assert {is_adapter(name) for name in chosen.trained["only"]} == {True}
