"""Several data sets in one run: exact shares, each in its own order, at any position, after any interruption."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import Example
from mirasol.data.example_table import ExampleTable
from mirasol.data.mixture import BLOCK, Mixture
from mirasol.data.sampler import BatchPlan
from mirasol.errors import UserError
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train


def clips(name: str, count: int):
    table = ExampleTable.of(Example(f"{name}{i}", f"{name}{i}.mp4", None, None, "what?", "it") for i in range(count))
    return table.clips(~table.windowed)


SETS = {"a": clips("a", 7), "b": clips("b", 30), "c": clips("c", 5)}
WEIGHTS = {"a": 1.0, "b": 2.5, "c": 0.3}


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(SETS, WEIGHTS, (3, "stage"))


def test_every_data_set_has_its_share_and_walks_its_own_permutation(mixture):
    walked = {name: [] for name in SETS}
    for position in range(3 * BLOCK):
        name, clip, epoch = mixture.at(position)
        walked[name].append((epoch, clip.media))
        assert clip.media.startswith(name)
    for name, seen in walked.items():
        share = WEIGHTS[name] / sum(WEIGHTS.values())
        assert abs(len(seen) - 3 * BLOCK * share) <= 1
        # Epoch after epoch, each full one shows every clip once.
        assert [epoch for epoch, _ in seen] == [place // len(SETS[name]) for place in range(len(seen))]
        for epoch in range(seen[-1][0]):
            assert sorted(media for at, media in seen if at == epoch) == sorted({clip.media for clip in SETS[name]})
    orders = [[media for at, media in walked["b"] if at == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_shares_hold_early_on_too(mixture):
    first = Counter(mixture.place(position)[0] for position in range(400))
    assert first["b"] / 400 == pytest.approx(2.5 / 3.8, abs=0.08)


def test_each_position_has_a_place_of_its_own(mixture):
    places = {mixture.place(position) for position in range(2 * BLOCK)}
    assert len(places) == 2 * BLOCK
    far = 10**12  # at once, without counting up to it
    assert len({mixture.place(far + step) for step in range(50)}) == 50


def test_a_share_too_small_to_keep_is_refused():
    with pytest.raises(UserError, match=r"data\.mixture\.c\.weight=0\.0001 is less than 1 in 1024"):
        Mixture(SETS, {**WEIGHTS, "c": 0.0001}, (3, "stage"))


@pytest.fixture
def mixed(values, data_root, tmp_path):
    """A recipe over two folders: the shapes, and a copy of two of their clips."""
    other = tmp_path / "other"
    rows = (data_root / "train.jsonl").read_text().splitlines(keepends=True)
    for split in ("train", "validation"):
        (other / "clips" / split).mkdir(parents=True)
        some = [row for row in (data_root / f"{split}.jsonl").read_text().splitlines(keepends=True) if "-000000" in row]
        (other / f"{split}.jsonl").write_text("".join(some))
        shutil.copy(data_root / "clips" / split / f"{split}-000000.mp4", other / "clips" / split)
    assert rows
    values["data"] = {
        "cache": values["data"]["cache"],
        "mixture": {"many": {"root": str(data_root), "weight": 3.0}, "few": {"root": str(other)}},
    }
    values["stages"] = {
        "both": {"steps": 3, "clips_per_step": 4, "questions_per_clip": 2},
        "one": {"steps": 2, "clips_per_step": 2, "questions_per_clip": 2, "data_sets": ["few"]},
    }
    return values


def test_a_mixture_trains_is_counted_and_is_validated_by_data_set(mixed, console):
    recipe = recipe_from_dict({**mixed, "checkpoint_every": 5, "validate_every": 5})
    train(recipe, console=console)
    lines = read_metrics(Path(recipe.output) / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["clips_of_many"] + line["clips_of_few"] for line in steps] == [4, 4, 4, 2, 2]
    assert [line["clips_of_many"] for line in steps[3:]] == [0, 0]
    assert sum(line["clips_of_many"] for line in steps) > 0
    [validation] = [line for line in lines if line["kind"] == "validation"]
    assert {"many_clip", "few_clip"} <= set(validation)


def test_media_of_all_data_sets_are_found_below_one_folder(mixed, data_root):
    recipe = recipe_from_dict(mixed)
    from mirasol.data.splits import read_data

    by_name, absent = read_data(recipe.data, "train")
    assert not absent
    for examples in by_name.values():
        assert all((recipe.data.folder / example.media).is_file() for example in examples)
    plan = BatchPlan(recipe, by_name)
    batch = plan.batch(0)
    for clip, name in zip(batch.clips, batch.data_sets, strict=True):
        assert clip.media in {example.media for example in by_name[name]}


def test_a_single_data_set_is_walked_as_it_was_before_there_were_mixtures(recipe, examples):
    # The order of runs of earlier versions: those resumed must not see other clips.
    plan = BatchPlan(recipe, examples)
    [table] = plan.mixtures["questions"].clips.values()
    from mirasol.data.randomness import permute_index

    expected = [
        table[permute_index(index, len(table), recipe.seed, "order", "questions", 0)].media for index in range(3)
    ]
    assert [clip.media for clip in plan.batch(3).clips] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["data"].update(root="x"), r"data\.root has no effect with data\.mixture"),
        (lambda v: v["data"]["mixture"]["few"].update(weight=0.0), "weight=0.0 must be positive"),
        (lambda v: v["data"]["mixture"]["few"].update(wieght=1.0), r"data\.mixture\.few\.wieght.*weight"),
        (lambda v: v["stages"]["one"].update(data_sets=["fewer"]), "'fewer' is not in data.mixture: many, few"),
        (lambda v: v["stages"]["one"].update(data_sets=[]), "is empty"),
        (lambda v: v["stages"]["both"].update(data_sets=["few"]), "data.mixture.many: no stage trains on it"),
        (lambda v: v["data"].update(mixture={}), r"missing key 'data\.root'"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused(mixed, change, message):
    change(mixed)
    with pytest.raises(UserError, match=message):
        recipe_from_dict(mixed)


def test_windows_and_whole_clips_mix_and_what_no_stage_takes_is_told(values, examples, console):
    values["stages"] = {"all": {"steps": 8, "clips_per_step": 6, "questions_per_clip": 1, "span": "any"}}
    plan = BatchPlan(recipe_from_dict(values), examples)
    seen = [clip for step in range(8) for clip in plan.batch(step).clips]
    assert {clip.start is None for clip in seen} == {True, False}
    assert not plan.unused

    values["stages"] = {"whole": {"steps": 1, "clips_per_step": 2, "questions_per_clip": 1}}
    recipe = recipe_from_dict(values)
    slots = sum(example.start is not None for example in examples)
    assert BatchPlan(recipe, examples).unused == {"segment": slots}
    train(recipe, console=console)
    assert f"{slots} examples (with a start and an end) are of a kind that no stage trains on" in (
        console.file.getvalue()
    )


def test_images_and_clips_of_one_mixture_train_in_stages_of_their_own(values, data_root, image_shapes, console):
    values["model"]["overrides"] = {**values["model"]["overrides"], "contrastive": {"width": 8}}
    pictures = {"root": str(image_shapes), "validation_split": None}
    values["data"] = {
        "cache": values["data"]["cache"],
        "mixture": {"pictures": pictures, "clips": {"root": str(data_root)}},
    }
    values["stages"] = {
        "images": {
            "steps": 1, "clips_per_step": 2, "questions_per_clip": 1, "objective": "image_text",
            "data_sets": ["pictures"],
        },
        "clips": {"steps": 1, "clips_per_step": 2, "questions_per_clip": 1, "data_sets": ["clips"]},
    }  # fmt: skip
    recipe = recipe_from_dict(values)
    lines = read_metrics(train(recipe, console=console).parent / "metrics.jsonl")
    assert ["contrastive_loss" in line for line in lines if line["kind"] == "train"] == [True, False]
    assert replace(recipe.data, cache=None).folder.is_dir()
    assert read_examples(image_shapes, "train")
