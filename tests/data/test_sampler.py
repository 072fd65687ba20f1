"""Batches: a pure function of (recipe, step), every clip once an epoch, exactly Q rows for each."""

import dataclasses
from collections import Counter

import pytest

from mirasol.config.recipe import Stage
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.example import ClipExamples, Example
from mirasol.data.randomness import draw_uniform, hash64, permute_index
from mirasol.data.sampler import BatchPlan, draw_questions, drop_modality
from mirasol.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permuted_is_a_permutation_and_depends_on_its_key(size):
    first = [permute_index(index, size, 1, "a") for index in range(size)]
    assert sorted(first) == list(range(size))
    if size > 10:
        second = [permute_index(index, size, 2, "a") for index in range(size)]
        fixed = sum(a == b for a, b in zip(first, second, strict=True))
        assert fixed < size / 4


def test_permuted_sends_an_index_anywhere():
    places = Counter(permute_index(0, 5, key) for key in range(2000))
    assert all(300 < places[k] < 500 for k in range(5))


def test_hashes_are_fixed_and_tell_types_and_places_apart():
    # Fixed numbers: a change would silently change every run that is resumed.
    assert hash64(0, "order", 1) == 10577087362255649123
    assert [permute_index(place, 10, 0, "order") for place in range(10)] == [8, 1, 2, 7, 0, 6, 5, 3, 9, 4]
    assert (
        len(
            {
                hash64(1, 2),
                hash64("1", 2),
                hash64(2, 1),
                hash64(12),
                hash64(1, "2"),
            }
        )
        == 5
    )
    assert 0 < draw_uniform("x") < 1


def test_batches_are_a_pure_function_of_recipe_and_step(recipe, examples):
    one, other = BatchPlan(recipe, examples), BatchPlan(recipe, examples)
    forwards = [one.batch(step) for step in range(recipe.total_steps)]
    backwards = [other.batch(step) for step in reversed(range(recipe.total_steps))]
    assert forwards == backwards[::-1]
    assert one.compute_noise_seed(3) == other.compute_noise_seed(3) != one.compute_noise_seed(4)


def test_another_seed_gives_other_batches(recipe, examples):
    other = dataclasses.replace(recipe, seed=4)
    assert BatchPlan(recipe, examples).batch(4).clips != BatchPlan(other, examples).batch(4).clips


def test_a_stage_keeps_its_batches_when_an_earlier_one_grows(values, examples):
    short = BatchPlan(recipe_from_dict(values), examples).batch(3)
    values["stages"]["slots"]["steps"] = 10
    long = BatchPlan(recipe_from_dict(values), examples).batch(10)
    assert short.examples == long.examples


def test_every_clip_comes_once_an_epoch(values, examples):
    values["stages"] = {"all": {"steps": 10, "clips_per_step": 3, "questions_per_clip": 2}}
    plan = BatchPlan(recipe_from_dict(values), examples)
    seen = [clip.media for step in range(10) for clip in plan.batch(step).clips]
    epochs = [seen[first : first + 5] for first in range(0, 30, 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_stages_take_slots_or_whole_clips_of_the_types_asked_for(values, examples):
    values["stages"]["questions"]["question_types"] = ["hearing", "count"]
    plan = BatchPlan(recipe_from_dict(values), examples)
    slots, questions = plan.batch(0), plan.batch(3)
    assert all(clip.start is not None for clip in slots.clips)
    assert all(clip.start is None and clip.end is None for clip in questions.clips)
    assert {e.question_type for row in questions.examples for e in row} == {"hearing", "count"}


def test_a_stage_without_examples_is_refused_by_name(values, examples):
    values["stages"]["questions"]["question_types"] = ["smell"]
    with pytest.raises(UserError, match=r"stages\.questions.*smell"):
        BatchPlan(recipe_from_dict(values), examples)


def clip_of(types: str) -> ClipExamples:
    rows = tuple(Example(f"q{place}", "a.mp4", None, None, "?", "!", kind) for place, kind in enumerate(types))
    return ClipExamples("a.mp4", None, None, rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type_weights": {"bounds": 2.0}}, r"stages\.questions\.type_weights: .*'bounds': did you mean 'bound'"),
        ({"question_types": ["hearing", "sigt"]}, r"stages\.questions\.question_types: .*'sigt': did you mean 'sight'"),
        ({"question_types": ["zzz"]}, "'zzz': they have .*'hearing'"),
    ],
)
def test_a_question_type_that_the_data_lack_is_refused_by_name(values, examples, change, said):
    values["stages"]["questions"].update(change)
    with pytest.raises(UserError, match=said):
        BatchPlan(recipe_from_dict(values), examples)


def test_questions_are_drawn_without_replacement_and_repeats_are_counted():
    clip = clip_of("abcde")
    drawn, repeated = draw_questions(clip, Stage(steps=1, questions_per_clip=4), 0)
    assert len({e.id for e in drawn}) == 4
    assert repeated == 0
    drawn, repeated = draw_questions(clip, Stage(steps=1, questions_per_clip=12), 0)
    assert repeated == 7
    assert sorted(Counter(e.id for e in drawn).values()) == [2, 2, 2, 3, 3]


def test_batch_rows_are_exactly_q_and_repeats_add_up(values, examples):
    values["stages"] = {"all": {"steps": 2, "clips_per_step": 5, "questions_per_clip": 60}}
    plan = BatchPlan(recipe_from_dict(values), examples)
    batch = plan.batch(0)
    assert {len(row) for row in batch.examples} == {60}
    assert batch.repeated == sum(60 - len({e.id for e in row}) for row in batch.examples) > 0
    assert [len(row) for row in batch.prompts] == [60] * 5


def test_type_weights_are_shares_of_types_whatever_their_numbers():
    clip = clip_of("a" * 9 + "b")
    stage = Stage(steps=1, questions_per_clip=1, type_weights={"a": 1.0, "b": 3.0})
    counts = Counter(draw_questions(clip, stage, key)[0][0].question_type for key in range(2000))
    assert 0.70 < counts["b"] / 2000 < 0.80
    plain = Stage(steps=1, questions_per_clip=1)
    counts = Counter(draw_questions(clip, plain, key)[0][0].question_type for key in range(2000))
    assert 0.07 < counts["b"] / 2000 < 0.13


def test_dropped_modalities_come_in_their_shares_and_never_both():
    stage = Stage(steps=1, drop_video=0.2, drop_audio=0.1)
    drawn = Counter(drop_modality(stage, 0, "stage", position) for position in range(5000))
    assert abs(drawn["video"] / 5000 - 0.2) < 0.02
    assert abs(drawn["audio"] / 5000 - 0.1) < 0.02
    assert drop_modality(stage, 7, "x") == drop_modality(stage, 7, "x")
    assert {drop_modality(Stage(steps=1), 0, position) for position in range(100)} == {None}
    with pytest.raises(UserError, match="drop_video"):
        Stage(steps=1, drop_video=0.6, drop_audio=0.6)
    for share in (-0.1, 1.5):
        with pytest.raises(UserError, match="shift_audio=.* must be a share"):
            Stage(steps=1, shift_audio=share)
