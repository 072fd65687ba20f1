import dataclasses
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from mirasol.synthetic.questions import (
    EVALUATION_CAPS,
    QUESTION_TYPES,
    TEMPLATES,
    TRAINING_CAP,
    Question,
    choose_questions,
    describe_slots,
    list_all_questions,
    make_conversations,
    make_pairs,
    make_stories,
)
from mirasol.synthetic.scenes import SLOT_COUNTS, Scene, compute_stable_hash, make_scene, make_split_scene
from mirasol.synthetic.synthesize import list_clip_questions
from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS, SIGNS_AND_SIGNALS, WORLDS


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed) for seed in range(400)]


def scene_of(slots: int, shapes: dict[int, str], sounds: dict[int, str]) -> Scene:
    """A scene written out by hand: {slot: "red circle left"}, {slot: "low bell"}."""
    model = make_scene(0)
    seen = [
        dataclasses.replace(
            model.shapes[0], slot=slot, colour=words.split()[0], shape=words.split()[1], motion=words.split()[2]
        )
        for slot, words in shapes.items()
    ]
    heard = [
        dataclasses.replace(model.sounds[0], slot=slot, pitch=words.split()[0], timbre=words.split()[1])
        for slot, words in sounds.items()
    ]
    return dataclasses.replace(model, slots=slots, shapes=tuple(seen), sounds=tuple(heard))


def answers(scene: Scene, question_type: str) -> dict[str, str]:
    return {q.prompt: q.target for q in list_all_questions(scene) if q.question_type == question_type}


STAGE = scene_of(
    5,
    {0: "red circle left", 1: "blue square up", 3: "red cross down"},
    {0: "low bell", 1: "high drum", 2: "low buzz", 4: "low bell"},
)


def test_sight_asks_only_what_has_one_answer():
    assert answers(STAGE, "sight") == {
        "what colour is the circle?": "red",
        "what colour is the square?": "blue",
        "what colour is the cross?": "red",
        "what shape is blue?": "square",
        "which way does the blue shape move?": "up",
        "which way does the circle move?": "left",
        "which way does the square move?": "up",
        "which way does the cross move?": "down",
        "what shape moves left?": "circle",
        "what shape moves up?": "square",
        "what shape moves down?": "cross",
    }


def test_hearing_asks_only_what_has_one_answer():
    assert answers(STAGE, "hearing") == {
        "is the drum low or high?": "high",
        "is the buzz low or high?": "low",
        "which sound is high?": "drum",
        "which sound is heard first?": "bell",
        "which sound is heard last?": "bell",
        "is the first sound low or high?": "low",
    }


def test_bound_needs_an_answer_that_is_unique_in_the_clip():
    # The bell beside the red circle comes again at the end, so it is not asked for.
    assert answers(STAGE, "bound") == {
        "which sound plays while the blue square is visible?": "drum",
        "which sound plays while the square is visible?": "drum",
        "what colour is seen while the drum plays?": "blue",
        "which shape is seen while the drum plays?": "square",
    }
    alone = scene_of(4, {2: "red circle left"}, {2: "low bell"})
    assert answers(alone, "bound") == {}


def test_order_asks_for_the_neighbour():
    found = answers(STAGE, "order")
    assert found["which sound comes after the drum?"] == "buzz"
    assert found["which sound comes before the drum?"] == "bell"
    assert found["which sound comes after the buzz?"] == "bell"
    assert not any("the bell" in prompt for prompt in found)
    assert found["which colour comes after blue?"] == "red"
    assert found["what shape comes before the cross?"] == "square"
    assert found["what colour comes after the circle?"] == "blue"
    assert found["what shape comes before the blue one?"] == "circle"
    assert "what shape comes before the circle?" not in found


def test_count_and_range():
    assert answers(STAGE, "count") == {"how many shapes appear?": "three", "how many sounds are heard?": "four"}
    assert answers(STAGE, "range") == {
        "how does the colour change from first to last?": "red to red",
        "how does the pitch change from first to last?": "low to low",
        "which sound is first and which is last?": "bell then bell",
        "which shape is first and which is last?": "circle then cross",
    }
    assert answers(scene_of(4, {2: "red circle left"}, {2: "low bell"}), "range") == {}


def test_story_and_describe():
    assert {q.prompt: q.target for q in make_stories(STAGE)} == {
        "list the shapes in order": "circle square cross",
        "list the colours in order": "red blue red",
        "list the motions in order": "left up down",
        "list the sounds in order": "bell drum buzz bell",
        "list the pitches in order": "low high low low",
    }
    assert {q.prompt: q.target for q in make_pairs(STAGE)} == {
        "list the shapes with their sounds": "circle bell square drum cross nothing",
        "list the colours with their sounds": "red bell blue drum red nothing",
    }
    assert [(q.start, q.end, q.target) for q in describe_slots(STAGE)] == [
        (0, 1, "red circle left , low bell"),
        (1, 2, "blue square up , high drum"),
        (2, 3, "nothing , low buzz"),
        (3, 4, "red cross down , silence"),
        (4, 5, "nothing , low bell"),
    ]
    assert describe_slots(scene_of(4, {}, {1: "low buzz"}))[0].start == 1


def test_a_prompt_has_one_answer_among_its_candidates(scenes):
    for scene in scenes:
        asked = list_all_questions(scene)
        assert len({q.prompt for q in asked}) == len(asked)
        for question in asked:
            assert question.target in question.candidates
            assert len(set(question.candidates)) == len(question.candidates) >= 2
            assert len(question.target.split()) <= (3 if question.question_type == "range" else 2)


def test_every_template_is_used_and_every_candidate_is_an_answer(scenes):
    found = defaultdict(set)
    offered = defaultdict(set)
    for scene in [*scenes, *(make_scene(seed) for seed in range(1000, 2000))]:
        for question in list_all_questions(scene):
            found[question.question_type, question.template].add(question.target)
            offered[question.question_type, question.template].update(question.candidates)
    assert set(found) == {(kind, name) for kind, templates in TEMPLATES.items() for name in templates}
    assert found == offered
    assert tuple(TEMPLATES) == QUESTION_TYPES == tuple(EVALUATION_CAPS)


def shifted(scene: Scene, by: int) -> Scene:
    """The scene with its sound rolled round by whole slots."""
    sounds = [dataclasses.replace(event, slot=(event.slot + by) % scene.slots) for event in scene.sounds]
    return dataclasses.replace(scene, sounds=tuple(sorted(sounds, key=lambda event: event.slot)))


def test_shifting_the_sound_by_whole_slots_changes_every_bound_answer(scenes):
    seen = 0
    for scene in scenes:
        bound = answers(scene, "bound")
        seen += len(bound)
        for by in range(1, scene.slots):
            moved = answers(shifted(scene, by), "bound")
            assert not any(moved.get(prompt) == target for prompt, target in bound.items())
        assert answers(scene, "sight") == answers(shifted(scene, 1), "sight")
    assert seen > 300


def test_evaluation_sets_are_spread_over_the_types(scenes):
    total = Counter()
    for scene in scenes:
        asked = choose_questions(scene, np.random.default_rng(0), training=False)
        counts = Counter(q.question_type for q in asked)
        assert all(count <= EVALUATION_CAPS[kind] for kind, count in counts.items())
        assert counts["count"] == 1
        total += counts
    assert 5 < total.total() / len(scenes) <= 7
    assert min(total.values()) > 0.75 * max(total.values())


def test_training_sets_hold_both_counts_and_no_more_than_their_cap(scenes):
    for scene in scenes:
        asked = choose_questions(scene, np.random.default_rng(0), training=True)
        assert len(asked) == min(TRAINING_CAP, len(list_all_questions(scene)))
        assert sum(q.question_type == "count" for q in asked) == 2


def test_questions_are_a_function_of_scene_and_generator(scenes):
    for training in (True, False):
        first, second = (choose_questions(scenes[5], np.random.default_rng(3), training=training) for _ in range(2))
        assert first == second


@pytest.fixture(scope="module", params=WORLDS)
def samples(request) -> dict[str, list[tuple[Question, int]]]:
    """Questions with their scene's number of slots, as synthesize() writes them."""
    drawn, world = {}, WORLDS[request.param]
    counts = {"train": 3000, "test": 600} if world is SHAPES_AND_SOUNDS else {"train": 1000, "test": 400}
    for split, count in counts.items():
        pairs = ((make_split_scene(17, split, index, world), index) for index in range(count))
        drawn[split] = [
            (q, scene.slots) for scene, index in pairs for q in list_clip_questions(scene, 17, split, index)
        ]
    return drawn


@pytest.mark.parametrize("knows_length", [False, True])
def test_blind_guessing_stays_at_chance(samples, knows_length):
    def key(question: Question, slots: int) -> tuple:
        return (question.prompt, slots if knows_length else None)

    table = defaultdict(Counter)
    for question, slots in samples["train"]:
        table[key(question, slots)][question.target] += 1
    right, chance, count = Counter(), Counter(), Counter()
    for question, slots in samples["test"]:
        kind = question.question_type
        right[kind] += table[key(question, slots)].most_common(1)[0][0] == question.target
        chance[kind] += 1 / len(question.candidates)
        count[kind] += 1
    assert set(count) == set(QUESTION_TYPES)
    for kind in QUESTION_TYPES:
        assert abs(right[kind] - chance[kind]) / count[kind] < 0.07, kind
    assert (right.total() - chance.total()) / count.total() < 0.02


def test_counts_do_not_follow_from_the_length_of_the_clip(samples):
    for slots in SLOT_COUNTS:
        words = Counter(q.target for q, length in samples["train"] if q.question_type == "count" and length == slots)
        assert len(words) == 4
        assert all(count / words.total() == pytest.approx(0.25, abs=0.04) for count in words.values())


def test_what_training_alone_asks_is_never_in_a_test_set(samples):
    assert {q.question_type for q, _ in samples["test"]} == set(QUESTION_TYPES)
    assert {q.question_type for q, _ in samples["train"]} == {*QUESTION_TYPES, "describe", "story"}
    assert compute_stable_hash("questions", 17, "train", 0) != compute_stable_hash("questions", 17, "test", 0)


def test_the_documentation_lists_every_template():
    page = (Path(__file__).parents[2] / "docs" / "shapes-and-sounds.md").read_text()
    for kind, templates in TEMPLATES.items():
        for name in templates:
            assert f"| {kind} | {name} |" in page


def test_a_conversation_asks_true_questions_each_once(scenes):
    for scene in scenes[:100]:
        answers = {question.prompt: question.target for question in list_all_questions(scene)}
        for question in make_conversations(scene, np.random.default_rng(scene.seed)):
            *earlier, last = question.prompt.split("\n")
            prompts = [*earlier[::2], last]
            assert 2 <= len(prompts) <= 4 and len(set(prompts)) == len(prompts)
            assert [answers[prompt] for prompt in prompts] == [*earlier[1::2], question.target]


def list_words(texts) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z]+", text)}


def test_worlds_share_the_words_of_questions_and_none_for_what_is_seen_or_heard(scenes):
    answers, prompts = {}, {}
    for world in (SHAPES_AND_SOUNDS, SIGNS_AND_SIGNALS):
        asked = [q for seed in range(200) for q in list_all_questions(make_scene(seed, world))]
        asked += [q for seed in range(100) for q in describe_slots(make_scene(seed, world))]
        answers[world.name] = list_words(q.target for q in asked if q.question_type != "count")
        prompts[world.name] = list_words(q.prompt for q in asked)
    assert answers["shapes"] & answers["signs"] == {"to", "then", "nothing", "silence"}
    assert not prompts["shapes"] & (answers["signs"] - answers["shapes"])
    assert not prompts["signs"] & (answers["shapes"] - answers["signs"])


def test_the_documentation_lists_what_every_world_has():
    page = (Path(__file__).parents[2] / "docs" / "shapes-and-sounds.md").read_text()
    for world in WORLDS.values():
        for values in (world.shapes, world.colours, world.motions, world.timbres, world.pitches):
            assert f" {', '.join(values)} |" in page
