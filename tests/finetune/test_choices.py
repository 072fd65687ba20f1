"""The rules that choose a recipe: whatever the clips are, a recipe that can be read, the same for the same facts."""

import functools
import itertools

import pytest
import yaml

from mirasol import MirasolConfig
from mirasol.config.recipe_io import parse_overrides, recipe_from_dict
from mirasol.errors import UserError
from mirasol.finetune.choices import (
    STAGE,
    ClipFacts,
    Wishes,
    check_overrides,
    choose_recipe,
    find_quantile,
    format_choices,
    make_values,
)

PATHS = {"output": "out", "data": {"root": "."}, "model": {"init": "tiny"}}
SMALL, LARGE = {"vit": 1_000_000, "tubes": 10, "audio": 10, "text": 20}, {"vit": 90_000_000, "text": 20_000_000}


make_config = functools.cache(MirasolConfig.preset)


def make_facts(train=40, validation=6, questions=1, seconds=(2.0,), longest=20, kinds=("clip",), has_classes=True):
    return ClipFacts(train, validation, (questions,) * train, seconds, longest, kinds, has_classes)


def choose(facts, config=None, parameters=SMALL, cores=2, is_gpu=False, **wishes):
    """The recipe as plain data, and the choices."""
    overrides = parse_overrides(wishes.pop("overrides", ()))
    wished = Wishes(**wishes, overrides=overrides)
    choices = choose_recipe(facts, config or make_config("tiny"), parameters, cores, is_gpu, wished)
    return make_values(choices, PATHS, overrides), choices


FACTS = [
    make_facts(train, max(1, train // 7), questions, seconds, longest, kinds, classes)
    for (train, questions), seconds, (longest, kinds, classes) in itertools.product(
        [(1, 1), (2, 3), (60, 1), (500, 12), (100_000, 1)],
        [(), (0.1,), (0.1, 2.0, 10_800.0)],
        [(20, ("clip",), True), (90, ("segment",), False), (5000, ("clip", "segment"), False)],
    )
]


@pytest.mark.parametrize("facts", FACTS, ids=range(len(FACTS)))
@pytest.mark.parametrize("preset", ["tiny", "1b"])
def test_any_clips_give_choices_and_the_same_ones_the_same(facts, preset):
    config = make_config(preset)
    values, choices = choose(facts, config, is_gpu=preset == "1b")
    assert choose(facts, config, is_gpu=preset == "1b")[0] == values
    stage = values["stages"][STAGE]
    assert 2 <= stage["clips_per_step"] <= 16
    assert 1 <= stage["questions_per_clip"] <= 12
    assert stage["epochs"] >= 5 and values["patience"]
    assert values["validation_clips"] <= facts.validation
    assert (values["data"].get("decode") == "ahead") == (facts.train == 100_000)
    assert all(choice.why for choice in choices)
    assert all(line == line.strip() for line in format_choices(choices))


@pytest.mark.parametrize("facts", FACTS[::23], ids=range(len(FACTS[::23])))
def test_they_are_a_recipe(facts):
    assert recipe_from_dict(choose(facts, is_gpu=True)[0]).stages[STAGE].epochs


@pytest.mark.parametrize(
    "given",
    ["optimizer.learning_rate=1e-5", f"stages.{STAGE}.clips_per_step=4", "patience=2", "keep_best=clip.text_loss",
     f"stages.{STAGE}.epochs=3", "seed=4", "data.decode=ahead", f"stages.{STAGE}.drop_audio=0.5"],
)  # fmt: skip
def test_what_the_user_gives_holds(given):
    values, _ = choose(make_facts(), overrides=[given])
    key, _, text = given.partition("=")
    for part in key.split("."):
        values = values[part]
    assert values == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("output=elsewhere", "output=elsewhere: give --output instead"),
        ("data.root=x", "give FOLDER instead"),
        ("data.options.prompt=x", "give FOLDER instead"),
        ("model.init=x", "give --from instead"),
        ("stages.more.steps=3", "one stage, finetune"),
        ("optimizer.rate=1", "unknown key 'optimizer.rate'"),
        (f"stages.{STAGE}.clips_per_step=many", "clips_per_step"),
        ("seed=x", "seed"),
        ("stages=3", "stages"),
        (f"stages.{STAGE}.epochs=0", "epochs=0"),
    ],
)
def test_what_no_recipe_has_is_refused_before_anything_is_read(given, part):
    with pytest.raises(UserError, match=part) as caught:
        check_overrides(parse_overrides([given]))
    assert "\n" not in str(caught.value)


def test_later_rules_follow_what_the_user_gives():
    both = (choose(make_facts(train=400), overrides=[f"stages.{STAGE}.clips_per_step={n}"])[0] for n in (16, 4))
    fast, slow = (values["optimizer"]["learning_rate"] for values in both)
    assert slow == pytest.approx(fast / 2, rel=0.05)


@pytest.mark.parametrize(("wishes", "length"), [({"epochs": 7}, (None, 7)), ({"steps": 90}, (90, None))])
def test_a_length_that_is_asked_for_is_taken(wishes, length):
    stage = choose(make_facts(), **wishes)[0]["stages"][STAGE]
    assert (stage.get("steps"), stage.get("epochs")) == length


def test_few_clips_leave_a_large_model_its_encoders():
    for facts, parameters, trained in (
        (make_facts(), LARGE, ["text"]),
        (make_facts(train=5000), LARGE, None),
        (make_facts(), SMALL, None),
    ):
        assert choose(facts, parameters=parameters)[0]["stages"][STAGE].get("trains") == trained


def test_wider_models_learn_more_slowly():
    tiny, large = (choose(make_facts(), make_config(name))[0]["optimizer"] for name in ("tiny", "1b"))
    assert tiny["learning_rate"] > 2 * large["learning_rate"]


@pytest.mark.parametrize(("seconds", "chunks"), [((0.3,), 4), ((4.0,), 8), ((60.0,), None)])
def test_short_clips_have_fewer_chunks_where_their_number_is_fixed(seconds, chunks):
    model = choose(make_facts(seconds=seconds), make_config("1b"))[0]["model"]
    assert model.get("num_chunks") == chunks


@pytest.mark.parametrize(
    ("seconds", "length"),
    [((0.1,), 0.1), ((0.213,), 0.22), ((0.1, 4.0), None), ((4.0,), None), ((32.0,), None), ((64.0,), 1.0),
     ((2.0, 2.0, 10_800.0), None), ((10_800.0,), 168.8)],
)  # fmt: skip
def test_chunks_of_a_fixed_length_change_only_where_clips_hardly_fit(seconds, length):
    """Of `tiny`: at most 64 chunks of half a second."""
    model = choose(make_facts(seconds=seconds))[0]["model"]
    assert model.get("overrides", {}).get("chunking", {}).get("chunk_seconds") == length


@pytest.mark.parametrize(("longest", "data"), [(64, (None, None)), (100, (100, None)), (10_000, (256, "truncate"))])
def test_long_texts_are_learned_as_far_as_the_model_goes(longest, data):
    values = choose(make_facts(longest=longest))[0]["data"]
    assert (values.get("max_text_length"), values.get("on_long_text")) == data


def test_a_quantile_is_one_of_the_values():
    values = tuple(float(n) for n in range(1, 101))
    assert [find_quantile(values, share) for share in (0.01, 0.5, 0.95, 1.0)] == [1.0, 50.0, 95.0, 100.0]
    assert find_quantile((3.0,), 0.95) == 3.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"trains": ["text", "latent"]}, True),
        ({"trains": None}, False),
        ({"trains": ["text", "audio"]}, False),
        ({"trains": ["text"], "augment": {"flip": 0.5}}, False),
        ({"trains": ["text"], "dropout": 0.1}, False),
    ],
)
def test_frozen_encoders_compute_a_clip_once(given, expected):
    from mirasol.finetune.finetune import is_encoded_once

    recipe = recipe_from_dict({"seed": 0, **PATHS, "stages": {STAGE: {"epochs": 3, **given}}})
    assert is_encoded_once(recipe, make_config("tiny")) == expected


@pytest.mark.parametrize("span", ["clip", "segment"])
def test_the_best_step_is_judged_by_the_kind_of_clip_that_trains(span):
    facts = make_facts(kinds=("clip", "segment"), has_classes=False)
    assert choose(facts)[0]["keep_best"] == "any.text_loss"
    assert choose(facts, overrides=[f"stages.{STAGE}.span={span}"])[0]["keep_best"] == f"{span}.text_loss"
