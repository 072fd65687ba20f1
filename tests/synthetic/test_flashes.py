"""Flashes: what only enough frames show, questions that a blind guesser cannot answer."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from mirasol.data.example import Example
from mirasol.evaluation.baselines import AnswerPrior
from mirasol.evaluation.metrics import normalise
from mirasol.media.timeline import ChunkGrid, cut_into_chunks
from mirasol.synthetic.flashes import (
    ASKED,
    EVENT_COUNTS,
    FLASH_SECONDS,
    LONG_SECONDS,
    NUMBER_WORDS,
    SEGMENT_SECONDS,
    list_flash_questions,
    make_flash_scene,
    make_long_flash_scene,
)
from mirasol.synthetic.render import render_frames, write_clip
from mirasol.synthetic.scenes import make_split_scene


@pytest.fixture(scope="module")
def scenes():
    return [make_split_scene(5, "test", index, make=make_flash_scene) for index in range(150)]


def count_seen(scene, frames: int) -> int:
    """How many flashes are on show in some frame of the file at the times at which that many frames are taken."""
    grid = cut_into_chunks(0.0, scene.seconds, ChunkGrid(8, None, frames // 8, frames // 8))
    times = np.asarray(grid.frame_times).ravel()
    shown = np.floor(times * scene.style.frame_rate + 1e-6) / scene.style.frame_rate
    return sum(bool(((event.onset <= shown) & (shown < event.offset)).any()) for event in scene.shapes)


def test_128_frames_show_every_flash_and_32_about_a_third(scenes):
    total = sum(len(scene.shapes) for scene in scenes)
    assert all(count_seen(scene, 128) == len(scene.shapes) for scene in scenes)
    assert 0.25 < sum(count_seen(scene, 32) for scene in scenes) / total < 0.5
    long = [make_split_scene(5, "test", index, make=make_long_flash_scene) for index in range(30)]
    assert all(count_seen(scene, 512) == len(scene.shapes) and scene.slots in LONG_SECONDS for scene in long)
    assert sum(count_seen(scene, 128) for scene in long) < 0.5 * sum(len(scene.shapes) for scene in long)


def test_events_of_a_kind_are_apart_and_last_as_long_as_they_say(scenes):
    for scene in scenes:
        for events in (scene.shapes, scene.sounds):
            slots = [event.slot for event in events]
            assert len(slots) in EVENT_COUNTS and all(b - a >= SEGMENT_SECONDS for a, b in pairwise(slots))
            assert all(event.slot < event.onset < event.offset < event.slot + 1 for event in events)
        assert all(FLASH_SECONDS < event.offset - event.onset < 2 * FLASH_SECONDS for event in scene.shapes)
        assert all(0 <= event.onset < event.offset <= scene.slots for event in scene.distractors)
    assert {len(scene.shapes) for scene in scenes} == set(EVENT_COUNTS)


def test_flashes_are_in_the_pixels_and_distractors_are_grey(scenes):
    scene = next(scene for scene in scenes if scene.style.frame_rate == 8)
    frames = render_frames(scene).astype(int)
    colourful = (frames.max(-1) - frames.min(-1) > 90).sum((1, 2))
    times = np.arange(len(frames)) / scene.style.frame_rate
    during = np.zeros(len(frames), bool)
    for event in scene.shapes:
        during |= (times >= event.onset) & (times < event.offset)
    assert colourful[during].min() > 30 and colourful[~during].max() < 10


def test_answers_are_uniform_over_their_candidates_whatever_the_prompt(scenes):
    found = defaultdict(Counter)
    for index in range(700):
        scene = make_flash_scene(10_000 + index)
        for question in list_flash_questions(scene, 0, "test", index):
            assert question.target in question.candidates
            found[question.template, question.candidates][question.target] += 1
    assert {template for template, _ in found} == {name for names in ASKED.values() for name in names} | {
        "count shapes", "count sounds"
    }  # fmt: skip
    for (template, candidates), counts in found.items():
        total = counts.total()
        if total < 100:
            continue
        expected = total / len(candidates)
        chi = sum((counts[one] - expected) ** 2 / expected for one in candidates)
        assert chi < len(candidates) - 1 + 5 * np.sqrt(2 * (len(candidates) - 1)), (template, counts)


def test_a_blind_guesser_with_all_training_questions_is_at_chance():
    def make_examples(split, count):
        for index in range(count):
            scene = make_split_scene(0, split, index, make=make_flash_scene)
            for question in list_flash_questions(scene, 0, split, index):
                if question.candidates:
                    yield (
                        Example(f"{split}{index}", "", None, None, question.prompt, question.target),
                        question.candidates,
                    )

    prior = AnswerPrior([example for example, _ in make_examples("train", 250)], normalise)
    asked = list(make_examples("test", 200))
    right = np.mean([prior.guess(example.prompt) == normalise(example.target) for example, _ in asked])
    chance = np.mean([1 / len(candidates) for _, candidates in asked])
    assert 0.2 < chance < 0.3 and abs(right - chance) < 0.035


def test_training_describes_segments_with_at_most_one_event_of_a_kind(scenes):
    for index, scene in enumerate(scenes[:20]):
        described = [one for one in list_flash_questions(scene, 0, "train", index) if one.question_type == "describe"]
        for one in described:
            seen, heard = one.target.split(" , ")
            assert one.end - one.start == SEGMENT_SECONDS and len(seen.split()) <= 2 and len(heard.split()) <= 2
        # A clip of an odd number of seconds ends with one that belongs to no segment.
        covered = scene.slots - scene.slots % SEGMENT_SECONDS
        assert sum("nothing" not in one.target for one in described) == sum(e.slot < covered for e in scene.shapes)


def test_counts_are_those_of_the_events(scenes):
    for index, scene in enumerate(scenes[:20]):
        asked = {one.prompt: one.target for one in list_flash_questions(scene, 0, "test", index)}
        assert asked["how many shapes appear?"] == NUMBER_WORDS[len(scene.shapes) - EVENT_COUNTS[0]]
        assert asked["how many sounds are heard?"] == NUMBER_WORDS[len(scene.sounds) - EVENT_COUNTS[0]]


def test_the_file_is_the_same_each_time(tmp_path, scenes):
    for name in ("one", "two"):
        write_clip(make_flash_scene(77), tmp_path / f"{name}.mp4")
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
