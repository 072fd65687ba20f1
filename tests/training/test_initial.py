"""What a run keeps of the checkpoint it starts from, what is new, and what must not stay random."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirasol import MirasolConfig, MirasolForConditionalGeneration, load_checkpoint
from mirasol.checkpoint import Untrained, read_untrained
from mirasol.cli.main import main
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.plan import plan_run
from mirasol.errors import UserError
from mirasol.training.export import export_run
from mirasol.training.optim import Optimizer
from mirasol.training.trainer import train
from mirasol.training.weights.initial import find_initial_weights, load_initial, override_config
from mirasol.training.weights.stages import TRAINABLE, StageWeights, find_trainable_component

# Changes that `model.overrides` may make to a finished checkpoint, and in which components something is new.
CHANGES = {
    "kind of the Combiner": ({"combiner": {"kind": "perceiver"}}, {"combiner"}),
    "features": ({"combiner": {"kind": "cls", "m": 3}}, {"combiner", "latent"}),
    "Token Turing Machine": ({"combiner": {"kind": "ttm"}}, {"combiner"}),
    "chunks": ({"chunking": {"num_chunks": 4, "chunk_seconds": None}}, set()),
    "frames": ({"video": {"frames_per_chunk": 8}}, {"combiner", "reconstruction"}),
    "depth of the latent model": ({"latent": {"stack": {"depth": 2}}}, {"latent"}),
    "reconstruction of sound": ({"reconstruction": {"audio": True}}, {"reconstruction"}),
    "contrastive pass": ({"contrastive": {"width": 8}}, {"contrastive"}),
    "text switches": ({"text": {"tied": False, "learned_positions": True}}, {"text", "vocabulary"}),
    "no weights": ({"latent": {"mask_ratio": 0.5}, "text": {"label_smoothing": 0.1}}, set()),
}


def change(values: dict, init, **model) -> dict:
    return {**{k: v for k, v in values.items() if k != "tokenizer"}, "model": {"init": str(init), **model}}


@pytest.mark.parametrize("name", CHANGES)
def test_what_fits_is_kept_the_rest_is_new_and_a_table_says_which(finished_once, values, name):
    overrides, parts = CHANGES[name]
    recipe = recipe_from_dict(change(values, finished_once, overrides=overrides))
    before = load_checkpoint(finished_once).model
    loaded = load_initial(recipe)
    model, old = loaded.model, dict(before.named_parameters())
    weights = find_initial_weights(recipe, model.config)
    kept = {n for n, p in model.named_parameters() if n in old and old[n].shape == p.shape}
    assert set(weights.loaded) == kept
    for key, parameter in model.named_parameters():
        if key in kept:
            assert torch.equal(parameter, old[key]), key
    assert {find_trainable_component(key) for key in weights.new} == parts
    assert set(weights.new) | set(weights.loaded) == set(dict(model.named_parameters()))
    assert weights.untrained.names == frozenset(weights.new)
    counts = weights.count_by_component()
    for kind, own in (("loaded", weights.loaded), ("new", weights.new), ("unused", weights.unused)):
        assert sum(row[kind] for row in counts.values()) == sum(own.values())
    lines = weights.format_rows().splitlines()
    assert lines[0].split() == ["component", "loaded", "of", "these", "untrained", "new", "unused"]
    for part in parts:
        [line] = [line for line in lines if line.split()[0] == part]
        assert line.split()[3].replace(",", "") == str(counts[part]["new"]) != "0"
    again = load_initial(recipe).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert loaded.processor.feature_extractor.num_chunks == model.config.chunking.num_chunks


def test_components_that_are_to_be_new_are_drawn_and_all_others_kept(finished_once, values):
    recipe = recipe_from_dict(change(values, finished_once, new=["combiner", "latent"]))
    before = dict(load_checkpoint(finished_once).model.named_parameters())
    model = load_initial(recipe).model
    weights = find_initial_weights(recipe, model.config)
    drawn = {name for name in before if find_trainable_component(name) in ("combiner", "latent")}
    assert set(weights.new) == weights.untrained.names == drawn and drawn
    for name, parameter in model.named_parameters():
        # Biases and the scales of norms begin as constants, and some of these are still what they were.
        assert torch.equal(parameter, before[name]) if name not in drawn else True, name
        if name in drawn and parameter.ndim > 1:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"overrides": {"combinr": {}}}, "model.overrides.combinr: unknown part: did you mean 'combiner'"),
        ({"new": ["combinr"]}, "model.new: unknown component 'combinr': did you mean 'combiner'"),
        ({"overrides": {"combiner": {"kindd": "cls"}}}, "model.overrides.combiner: unknown key 'kindd'"),
        ({"overrides": {"combiner": {"m": 100_000}}}, "model.overrides: combiner.m=100000 exceeds"),
        ({"overrides": {"combiner": None}}, "model.overrides.combiner=null: only the part contrastive"),
        ({"overrides": {"video": {"image_size": 64}}}, "set model.image_size instead"),
        ({"overrides": {"text": {"vocab_size": 9}}}, "the checkpoint's tokenizer is kept"),
        ({"overrides": {"loss_weights": {}}}, "set loss_weights of each stage"),
        ({"num_chunks": 4, "overrides": {"chunking": {"num_chunks": 5}}}, "set model.overrides.chunking alone"),
    ],
)
def test_impossible_changes_are_refused_in_one_line(finished_once, values, model, message):
    with pytest.raises(UserError, match=message) as error:
        load_initial(recipe_from_dict(change(values, finished_once, **model)))
    assert "\n" not in str(error.value)


def stages(values: dict, **chosen) -> dict:
    base = {"steps": 1, "clips_per_step": 2, "questions_per_clip": 1}
    return {**values, "stages": {name: {**base, **stage} for name, stage in chosen.items()}}


def test_a_stage_that_freezes_new_weights_is_refused_unless_told(finished_once, values, console, tmp_path):
    values = change(values, finished_once, overrides={"combiner": {"kind": "perceiver"}})
    with pytest.raises(UserError, match=r"stages.a freezes weights that are still random: combiner \([\d,]+ weights\)"):
        train(recipe_from_dict(stages(values, a={"trains": ["text"]})), console=console)
    assert not Path(values["output"]).exists()
    planned = plan_run(recipe_from_dict(stages(values, a={"trains": ["text"]})), Assumptions())
    assert any("mirasol train refuses this: stages.a freezes" in note for note in planned.notes)
    assert planned.initial["combiner"]["new"] > 0 == planned.initial["vit"]["new"] < planned.initial["vit"]["loaded"]
    with pytest.raises(UserError, match="stages.b freezes"):
        train(recipe_from_dict(stages(values, b={"trains": ["vit"]}, a={"trains": ["combiner"]})), console=console)
    allowed = stages(values, a={"trains": ["text"], "allow_frozen_random": True})
    folder = train(recipe_from_dict(allowed), console=console)
    assert {find_trainable_component(n) for n in read_untrained(folder).names} == {"combiner"}
    assert "of these untrained" in console.file.getvalue()
    # The next run knows it from the checkpoint, and one that trains the Combiner first is fine.
    following = {**change(values, folder), "output": str(tmp_path / "next")}
    with pytest.raises(UserError, match="still random: combiner"):
        train(recipe_from_dict(stages(following, a={"trains": ["text"]})), console=console)
    good = recipe_from_dict(stages(following, a={"trains": ["combiner"]}, b={"trains": ["text"]}))
    assert not plan_run(good, Assumptions()).initial["combiner"]["new"]
    assert read_untrained(train(good, console=console)).names == frozenset()


def test_from_random_weights_too_and_an_export_says_what_the_step_has(values, console, tmp_path):
    values["model"]["overrides"] = {**values["model"]["overrides"], "contrastive": {"width": 8}}
    with pytest.raises(UserError, match="stages.a freezes weights that are still random"):
        train(recipe_from_dict(stages(values, a={"trains": ["audio"]}, b={})), console=console)
    chosen = stages(values, a={"trains": ["audio"], "allow_frozen_random": True}, b={})
    chosen |= {"checkpoint_every": 1, "keep_last": 9}
    finished = train(recipe_from_dict(chosen), console=console)
    assert {find_trainable_component(name) for name in read_untrained(finished).names} == {"contrastive"}
    early = export_run(values["output"], tmp_path / "early", step=1)
    parts = {find_trainable_component(name) for name in read_untrained(early).names}
    assert {"text", "vocabulary", "latent", "vit"} <= parts
    assert read_untrained(export_run(values["output"], tmp_path / "late")) == read_untrained(finished)


def test_what_a_loss_does_not_need_may_stay_random(values, image_shapes, console):
    values["model"]["overrides"] = {**values["model"]["overrides"], "contrastive": {"width": 8}}
    values["data"]["root"] = str(image_shapes)
    parts = ["vit", "tubes", "text", "cross_attention", "vocabulary", "contrastive"]
    recipe = recipe_from_dict(stages(values, images={"objective": "image_text", "trains": parts}))
    left = {find_trainable_component(name) for name in read_untrained(train(recipe, console=console)).names}
    assert {"audio", "combiner", "latent", "reconstruction"} <= left <= {*TRAINABLE} - {"text", "vocabulary"}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint as `mirasol init --openmammut` leaves it: rows for special tokens are random."""
    folder = tmp_path_factory.mktemp("start") / "start"
    shutil.copytree(load_checkpoint("tiny").folder, folder)
    (folder / "training.json").unlink()
    rows = len(load_checkpoint("tiny").processor.tokenizer) - 3
    report = {"loaded": [{"target": "text.embedding.weight", "untrained_from": rows}], "random": []}
    (folder / "starting_weights.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_of_new_special_tokens_train_in_a_frozen_vocabulary(start, values, console, optimizer):
    values = change(values, start)
    values["optimizer"] = {"name": optimizer, "warmup_steps": 0}
    recipe = recipe_from_dict(stages(values, a={"trains": ["combiner"], "steps": 3}))
    finished = train(recipe, console=console)
    before = load_file(start / "model.safetensors")["text.embedding.weight"]
    after = load_file(finished / "model.safetensors")["text.embedding.weight"]
    first = read_untrained(start).rows["text.embedding.weight"]
    assert torch.equal(before[:first], after[:first])
    assert not torch.equal(before[first:], after[first:])
    assert read_untrained(finished) == Untrained()
    recorded = json.loads((finished.parent / "run.json").read_text())["components"]["vocabulary"]["trained"]["a"]
    assert recorded == before[first:].numel()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_untied_output_that_trains_in_part_has_no_weight_decay(values, name):
    config = MirasolConfig.preset("tiny", text={"tied": False})
    model = MirasolForConditionalGeneration(config)
    recipe = recipe_from_dict(
        {**stages(values, a={"trains": ["combiner"]}), "optimizer": {"name": name, "weight_decay": 0.5}}
    )
    weights = StageWeights(recipe, model, Untrained(rows={"text.output.weight": 400}))
    weights.enter("a")
    optimizer = Optimizer(model, recipe.optimizer, weights.partly_trained)
    before = model.text.output.weight.detach().clone()
    for parameter in optimizer.parameters:
        parameter.grad = torch.randn_like(parameter)
    weights.mask_gradients()
    optimizer.set_learning_rate(0.1)
    optimizer.step()
    assert torch.equal(before[:400], model.text.output.weight[:400])
    assert not torch.equal(before[400:], model.text.output.weight[400:])


def test_a_damaged_record_is_refused_and_none_means_trained(start, tmp_path):
    assert read_untrained(tmp_path) == Untrained()
    (tmp_path / "starting_weights.json").write_text("{}")
    with pytest.raises(UserError, match=r"starting_weights.json: does not say which weights are untrained"):
        read_untrained(tmp_path)


@pytest.mark.parametrize("by", ["option", "file"])
def test_null_takes_keys_of_an_earlier_file_back(values, tmp_path, by, start):
    import yaml

    values["tokenizer"], values["model"] = {"vocab_size": 4000}, {"preset": "3b"}
    file, later = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"take it back with --model.preset null"):
        load_recipe(file, [f"model.init={start}"])
    with pytest.raises(UserError, match=r"take it back with --tokenizer.vocab_size null"):
        load_recipe(file, [f"model.init={start}", "model.preset=null"])
    nulls = {"model": {"init": str(start), "preset": None}, "tokenizer": None, "stages": {"slots": {"span": None}}}
    later.write_text(yaml.safe_dump(nulls))
    options = [f"model.init={start}", "model.preset=null", "tokenizer.vocab_size=null", "stages.slots.span=null"]
    recipe = load_recipe([file, later]) if by == "file" else load_recipe(file, options)
    assert (recipe.model.init, recipe.model.preset) == (str(start), "tiny")
    assert recipe.stages["slots"].span == "clip"
    with pytest.raises(UserError, match="seed: null"):
        load_recipe(file, ["seed=null"])


def test_the_paper_s_stages_follow_init_as_its_recipes_say(finished_once, values, tmp_path, console, capsys):
    """`mirasol init --image` leaves the text random: `video_text` freezes it and is refused, `image_text` trains it."""
    folder = tmp_path / "start"
    shutil.copytree(finished_once / "checkpoint", folder)
    (folder / "training.json").unlink()
    names = load_file(folder / "model.safetensors").keys()
    random = [{"target": n} for n in names if not n.startswith("chunk_encoder.vit")]
    (folder / "starting_weights.json").write_text(json.dumps({"loaded": [], "random": random}))
    recipes = Path(__file__).parents[2] / "recipes" / "paper"
    common = [f"--model.init={folder}", f"--data.root={values['data']['root']}", "--data.dataset=folder"]
    main(["plan", "--config", str(recipes / "video_text.yaml"), *common, "--device=cpu", "--parallel.kind=none"])
    said = capsys.readouterr().out
    assert "mirasol train refuses this: stages.videos freezes weights that are still random: text" in said
    back = ["--model.preset=null", "--tokenizer=null", "--model.overrides.contrastive.width=8"]
    recipe = load_recipe(recipes / "image_text.yaml", [option.removeprefix("--") for option in [*common, *back]])
    assert recipe.model.overrides == {"contrastive": {"width": 8}}
    model = load_initial(recipe).model
    weights = StageWeights(recipe, model, find_initial_weights(recipe, model.config).untrained)
    assert weights.describe_frozen_random() == []


def test_overrides_leave_the_checkpoint_s_config_alone():
    config = MirasolConfig.preset("tiny")
    changed = override_config(config, {"combiner": {"m": 4}})
    assert (changed.combiner.m, config.combiner.m) == (4, MirasolConfig.preset("tiny").combiner.m)
