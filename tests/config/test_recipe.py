"""The recipe: reading, typing, naming what is wrong, and what may change on resumption."""

import copy
import dataclasses
from pathlib import Path

import pytest
import yaml

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_changes import find_changed_keys
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.errors import UserError


@pytest.fixture
def file(values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_load_gives_typed_values_in_the_files_order(file):
    recipe = load_recipe(file)
    assert isinstance(recipe, Recipe)
    assert list(recipe.stages) == ["slots", "questions"]
    assert recipe.stages["slots"].span == "segment"
    assert recipe.optimizer.betas == (0.9, 0.95)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 4


def test_overrides_reach_into_stages_and_numbers_may_be_written_with_an_exponent(file):
    recipe = load_recipe(file, ["--optimizer.learning_rate=1e-5", "stages.slots.steps=7", "data.cache=null"])
    assert recipe.optimizer.learning_rate == 1e-5
    assert recipe.stages["slots"].steps == 7
    assert recipe.stages["questions"].steps == 5
    assert recipe.data.cache is None


def test_later_files_are_laid_over_earlier_ones(file, tmp_path):
    extra = tmp_path / "more.yaml"
    extra.write_text("optimizer: {weight_decay: 0.5}\n")
    recipe = load_recipe([file, extra])
    assert recipe.optimizer.weight_decay == 0.5
    assert recipe.optimizer.warmup_steps == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimzer.learning_rate=1", "'optimizer'"),
        ("optimizer.learning_rte=1", "'optimizer.learning_rate'"),
        ("stages.slots.step=1", "'stages.slots.steps'"),
        ("data.on_bad=skip", "'data.on_bad_clip'"),
        ("stages.slots.loss_weights.txt=1", "'stages.slots.loss_weights.text'"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(file, override, named):
    with pytest.raises(UserError, match=f"unknown key.*did you mean {named}") as caught:
        load_recipe(file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rate=fast", "learning_rate.*fast"),
        ("optimizer.name=sgd", "sgd"),
        ("stages.slots.steps=1.5", "steps.*1.5"),
        ("stages.slots.steps=0", "steps=0 must be positive"),
        ("process_seconds=600", "process_seconds=600 must be more than batch_seconds=600"),
        ("optimizer=3", "optimizer.*mapping"),
        ("stages.slots=3", "stages.slots.*mapping"),
        ("stages=null", "stages.*mapping"),
        ("optimizer.weight_decay=-0.1", r"optimizer\.weight_decay=-0\.1 must not be negative"),
        ("optimizer.final_scale=1.5", r"optimizer\.final_scale=1\.5 must be in \[0, 1\]"),
        ("optimizer.final_scale=-0.5", r"optimizer\.final_scale=-0\.5"),
    ],
)
def test_wrong_values_are_named_on_one_line(file, override, said):
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(file, [override])
    assert "\n" not in str(caught.value)


def test_missing_key_and_missing_file(values, tmp_path):
    del values["seed"]
    with pytest.raises(UserError, match="missing key 'seed'"):
        recipe_from_dict(values)
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_recipe_survives_yaml(recipe):
    again = recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict(), sort_keys=False)))
    assert again == recipe
    assert again.compute_fingerprint() == recipe.compute_fingerprint()


def test_changed_keys_names_what_decides_the_weights_and_nothing_else(recipe):
    before = recipe.to_dict()
    after = dataclasses.replace(recipe, workers=2, output="elsewhere", keep_last=9).to_dict()
    assert find_changed_keys(before, after) == []
    after = dataclasses.replace(recipe, seed=4).to_dict()
    after["optimizer"]["learning_rate"] = 0.5
    assert find_changed_keys(before, after) == ["optimizer.learning_rate", "seed"]
    swapped = {**before, "stages": dict(reversed(before["stages"].items()))}
    assert find_changed_keys(before, swapped) == ["stages (their order)"]


def test_fingerprint_sees_the_order_of_stages(recipe):
    swapped = dataclasses.replace(recipe, stages=dict(reversed(recipe.stages.items())))
    assert swapped.compute_fingerprint() != recipe.compute_fingerprint()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.slots.window=slot", r"stages\.slots\.window: renamed to span, use span: segment$"),
        ("stages.slots.window=any", r"stages\.slots\.window: renamed to span, use span: any$"),
        ("stages.slots.window=[]", r"stages\.slots\.window: renamed to span, use span instead$"),
        ("data.source=audioset", r"data\.source: renamed to dataset, use dataset: audioset$"),
        ("data.mixture.a.source=audioset", r"data\.mixture\.a\.source: renamed to dataset, use dataset: audioset$"),
        ("stages.slots.span=slot", r"span=slot is not one of 'clip', 'segment', 'any'$"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(file, override, said):
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(file, [override])
    assert "\n" not in str(caught.value)


def with_old_keys(values):
    """The recipe as the first versions wrote it."""
    values = copy.deepcopy(values)
    stage = values["stages"]["slots"]
    stage["window"] = {"segment": "slot"}.get(stage["span"], stage["span"])
    del stage["span"]
    values["data"]["source"] = values["data"].pop("dataset", "folder")
    return values


def test_the_recipe_of_a_run_is_read_with_the_keys_of_its_time(file, values):
    file.write_text(yaml.safe_dump(with_old_keys(values), sort_keys=False))
    with pytest.raises(UserError, match="renamed to (span|dataset)"):
        load_recipe(file)
    (file.parent / "run.json").write_text("{}")
    assert load_recipe(file) == recipe_from_dict(values)


def test_stage_at_counts_through_the_stages(recipe):
    places = [recipe.find_stage(step) for step in range(recipe.total_steps)]
    assert places == [("slots", k) for k in range(3)] + [("questions", k) for k in range(5)]


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tracker": "mlflow"}, "^recipe: tracker=mlflow is not one of 'none', 'wandb', 'trackio'$"),
        ({"seed": "x"}, "^recipe: seed=x is not of type int$"),
        ({"stages": {"a": {"steps": 1, "objective": "x"}}}, "stages…objective=x is not one of 'clips', 'image_text'$"),
    ],
)
def test_a_value_of_another_kind_is_told_with_what_is_possible(values, change, said):
    with pytest.raises(UserError, match=said):
        recipe_from_dict({**values, **change})


@pytest.mark.parametrize("file", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_of_the_repository_loads(file):
    recipe = load_recipe(file)
    assert recipe.total_steps > 0
    MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)


def test_there_are_recipes():
    assert (REPOSITORY / "recipes" / "demo.yaml").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"overrides": {"loss_weights": {"text": 2.0}}}}, r"model\.overrides\.loss_weights has no effect"),
        (
            {"model": {"overrides": {"text": {"vocab_size": 99}}}},
            r"overrides\.text\.vocab_size has no effect.*tokenizer",
        ),
        ({"model": {"init": "tiny"}}, r"tokenizer\.vocab_size=300 has no effect with model\.init"),
    ],
)
def test_keys_that_something_else_decides_are_refused(values, change, said):
    with pytest.raises(UserError, match=said) as caught:
        recipe_from_dict({**values, **change})
    assert "\n" not in str(caught.value)


def test_where_there_are_no_recipes_those_of_the_package_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/small.yaml").model.preset == "small"
    with pytest.raises(UserError, match=r"recipes/smal\.yaml: no such recipe file"):
        load_recipe("recipes/smal.yaml")
    (tmp_path / "recipes").mkdir()
    with pytest.raises(UserError, match=r"recipes/small\.yaml: no such recipe file"):
        load_recipe("recipes/small.yaml")
