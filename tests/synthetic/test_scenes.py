import dataclasses
import itertools
from collections import Counter

import pytest

from mirasol.synthetic.scenes import (
    EDGE_JITTER,
    FRAME_RATES,
    MAX_EVENTS,
    SAMPLE_RATES,
    SLOT_COUNTS,
    SPLITS,
    compute_stable_hash,
    make_scene,
    make_split_scene,
)
from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS as WORLD
from mirasol.synthetic.worlds import WORLDS


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed) for seed in range(6000)]


def share(counter: Counter) -> dict:
    return {key: count / counter.total() for key, count in counter.items()}


def test_a_scene_is_a_function_of_its_seed():
    assert make_scene(7) == make_scene(7)
    assert make_scene(7).signature() != make_scene(8).signature()


def test_the_hash_depends_on_nothing_but_its_arguments():
    # Python's own hash of text changes from process to process; this number must never change.
    assert compute_stable_hash(0, "train", 3) == 8484224544305657519
    assert compute_stable_hash(0, "train", 3) != compute_stable_hash(0, "test", 3)


def test_a_slot_holds_at_most_one_event_of_each_stream_and_events_stay_inside_it(scenes):
    for scene in scenes[:500]:
        for events in (scene.shapes, scene.sounds):
            assert len({event.slot for event in events}) == len(events)
            assert list(events) == sorted(events, key=lambda event: event.slot)
            for event in events:
                assert 0 <= event.slot < scene.slots
                assert EDGE_JITTER[0] <= event.onset - event.slot <= EDGE_JITTER[1]
                assert EDGE_JITTER[0] <= event.slot + 1 - event.offset <= EDGE_JITTER[1]


def test_attributes_and_counts_are_uniform_and_the_length_tells_nothing_of_them(scenes):
    for slots in SLOT_COUNTS:
        mine = [scene for scene in scenes if scene.slots == slots]
        assert len(mine) == pytest.approx(len(scenes) / len(SLOT_COUNTS), rel=0.1)
        counts = Counter((len(scene.shapes), len(scene.sounds)) for scene in mine)
        assert len(counts) == MAX_EVENTS**2
        assert all(value == pytest.approx(1 / MAX_EVENTS**2, abs=0.02) for value in share(counts).values())
        shapes = Counter((event.shape, event.colour) for scene in mine for event in scene.shapes)
        assert set(shapes) == set(itertools.product(WORLD.shapes, WORLD.colours))
        assert all(value == pytest.approx(1 / 16, abs=0.012) for value in share(shapes).values())
        ways = Counter(event.motion for scene in mine for event in scene.shapes)
        assert set(ways) == set(WORLD.motions)
        assert all(value == pytest.approx(1 / 4, abs=0.03) for value in share(ways).values())
        sounds = Counter((event.timbre, event.pitch) for scene in mine for event in scene.sounds)
        assert set(sounds) == set(itertools.product(WORLD.timbres, WORLD.pitches))
        assert all(value == pytest.approx(1 / 8, abs=0.02) for value in share(sounds).values())


def test_sight_says_nothing_about_what_is_heard_in_the_same_slot(scenes):
    pairs = Counter(
        (shape.colour, scene.find_sound(shape.slot).timbre)
        for scene in scenes
        for shape in scene.shapes
        if scene.find_sound(shape.slot)
    )
    assert all(value == pytest.approx(1 / 16, abs=0.01) for value in share(pairs).values())


def test_events_often_share_a_slot_but_not_always(scenes):
    kinds = Counter(
        (scene.find_shape(slot) is not None, scene.find_sound(slot) is not None)
        for scene in scenes
        for slot in range(scene.slots)
    )
    assert all(value > 0.15 for value in share(kinds).values())
    together = sum(scene.find_sound(shape.slot) is not None for scene in scenes for shape in scene.shapes)
    assert 0.6 < together / sum(len(scene.shapes) for scene in scenes) < 0.9


def test_formats_vary(scenes):
    styles = [scene.style for scene in scenes[:2000]]
    assert {style.frame_rate for style in styles} == set(FRAME_RATES)
    assert {style.sample_rate for style in styles} == set(SAMPLE_RATES)
    assert {style.channels for style in styles} == {1, 2}
    assert all(96 <= side <= 144 and side % 2 == 0 for style in styles for side in (style.width, style.height))
    assert sum(style.width != style.height for style in styles) > 0.5 * len(styles)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_no_two_splits_share_a_scene_whatever_their_seeds(world):
    held = {split: set() for split in SPLITS}
    counts = {"train": 1500, "validation": 150, "test": 150}
    for seed in (0, 1):
        for split, count in counts.items():
            held[split] |= {make_split_scene(seed, split, index, world).signature() for index in range(count)}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not held[one] & held[other]
    # The test can fail: scenes drawn without regard to splits do meet.
    free = [{make_scene(compute_stable_hash(name, index), world).signature() for index in range(6000)} for name in "ab"]
    assert free[0] & free[1]


def test_splits_are_no_different_in_kind():
    for split in SPLITS:
        scenes = [make_split_scene(2, split, index) for index in range(300)]
        assert sum(len(scene.shapes) for scene in scenes) / 300 == pytest.approx(2.5, abs=0.25)
        assert {scene.slots for scene in scenes} == set(SLOT_COUNTS)


def test_an_event_is_named_by_its_slot():
    scene = make_scene(11)
    assert all(scene.find_shape(event.slot) is event for event in scene.shapes)
    assert all(scene.find_sound(event.slot) is event for event in scene.sounds)
    empty = dataclasses.replace(scene, shapes=(), sounds=())
    assert empty.find_shape(0) is None and empty.find_sound(0) is None
