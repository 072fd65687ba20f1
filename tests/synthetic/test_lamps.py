"""Lamps: ages in the chunks that the processor cuts, and questions that only a memory answers."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from mirasol.config.model import MirasolConfig
from mirasol.data.example import Example
from mirasol.evaluation.baselines import AnswerPrior
from mirasol.evaluation.metrics import normalise
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.synthetic.lamps import (
    AGES,
    CHUNK_SECONDS,
    CHUNKS,
    LONG,
    SHORT,
    SHORT_CHUNKS,
    find_age,
    list_lamp_questions,
    make_lamp_scene,
)
from mirasol.synthetic.render import write_clip
from mirasol.synthetic.scenes import make_split_scene


@pytest.fixture(scope="module")
def extractor():
    config = MirasolConfig.preset(
        "tiny",
        chunking={"chunk_seconds": CHUNK_SECONDS, "max_chunks": 512},
        video={"image_size": 16, "frames_per_chunk": 1, "tubes": [{"kernel": (1, 8, 8), "stride": (1, 8, 8)}]},
        reconstruction={"image_size": 16, "patch": (1, 8, 8)},
    )
    return MirasolFeatureExtractor(**config.media_settings())


@pytest.mark.parametrize(
    ("scene", "chunks"),
    [
        (make_split_scene(3, "test", 0, make=make_lamp_scene), (CHUNKS,)),
        (make_split_scene(4, "test", 9, make=make_lamp_scene), (CHUNKS,)),
        *((make_lamp_scene(seed, test=False), (*SHORT_CHUNKS, CHUNKS)) for seed in range(5)),
    ],
)
def test_ages_are_those_of_the_chunks_that_the_processor_cuts(scene, chunks, extractor, tmp_path):
    """Each lamp is seen in its colour in one chunk, and in no other is its quarter as colourful."""
    write_clip(scene, tmp_path / "clip.mp4")
    tensors = extractor.tensors(extractor.read(tmp_path / "clip.mp4"))
    frames = np.moveaxis(tensors["video"].numpy().astype(float)[:, 0], 1, -1)  # 0 to 255
    assert len(frames) in chunks and len(frames) == len(tensors["audio"]) == scene.seconds / CHUNK_SECONDS
    quarters = {
        shape: frames[:, top : top + 8, left : left + 8].mean((1, 2))
        for shape, (top, left) in zip(scene.world.shapes, ((0, 0), (0, 8), (8, 0), (8, 8)), strict=True)
    }
    assert sorted(event.shape for event in scene.shapes) == sorted(quarters)
    for event in scene.shapes:
        colourful = np.ptp(quarters[event.shape], axis=-1)
        lit = int(colourful.argmax())
        assert len(frames) - 1 - lit == find_age(scene, event)
        assert colourful[lit] > 2 * np.delete(colourful, lit).max()
        shown = quarters[event.shape][lit] - np.median(quarters[event.shape], axis=0)
        centred = {name: np.array(rgb, float) - np.mean(rgb) for name, rgb in scene.world.colours.items()}
        like = {
            name: (shown - shown.mean()) @ rgb / np.linalg.norm(shown - shown.mean()) / np.linalg.norm(rgb)
            for name, rgb in centred.items()
        }
        assert max(like, key=like.get) == event.colour


def test_test_clips_ask_for_four_of_the_five_ages_and_training_for_any():
    asked, trained = Counter(), defaultdict(list)
    for index in range(150):
        scene = make_lamp_scene(index)
        kinds = [question.question_type for question in list_lamp_questions(scene, "test")]
        assert len(set(kinds)) == 4 and set(kinds) <= {f"age {age}" for age in AGES}
        asked.update(kinds)
        scene = make_lamp_scene(index, test=False)
        [kind] = {question.question_type for question in list_lamp_questions(scene, "train")} - {"describe"}
        assert kind == (LONG if scene.seconds == CHUNKS * CHUNK_SECONDS else SHORT)
        ages = [find_age(scene, event) for event in scene.shapes]
        assert len(set(ages)) == 4 and min(ages) >= 1 and max(ages) < scene.seconds / CHUNK_SECONDS
        trained[kind] += ages
    assert min(asked.values()) > 0.6 * max(asked.values())
    assert set(trained) == {SHORT, LONG} and max(trained[SHORT]) < max(SHORT_CHUNKS)
    # As many of them below 16 chunks as above, on a logarithmic scale.
    assert 0.3 < np.mean(np.array(trained[LONG]) < 16) < 0.7 and max(trained[LONG]) > 200


def test_training_describes_chunks_with_and_without_a_lamp():
    described = 0
    for seed in range(30):
        scene = make_lamp_scene(seed, test=False)
        lit = {event.slot * CHUNK_SECONDS: event for event in scene.shapes}
        found = [one for one in list_lamp_questions(scene, "train") if one.question_type == "describe"]
        assert not [one for one in list_lamp_questions(scene, "validation") if one.question_type == "describe"]
        assert len(found) == (0 if scene.seconds == CHUNKS * CHUNK_SECONDS else 12)
        described += len(found)
        for one in found:
            assert one.end - one.start == CHUNK_SECONDS and 0 <= one.start < one.end <= scene.seconds
            event = lit.get(one.start)
            if event is None:
                assert one.target == "nothing"
            else:
                assert one.target in (f"{event.colour} {event.shape}", event.colour)
                assert (one.target == event.colour) == (event.shape in one.prompt)
    assert described > 12 * 10


def test_distractors_are_grey_and_apart_from_the_lamps():
    for seed in range(20):
        scene = make_lamp_scene(seed)
        lit = {event.slot for event in scene.shapes}
        assert len(lit) == 4 and not lit & {event.slot for event in scene.distractors}
        assert all(event.colour == "" and len(set(event.tint)) == 1 for event in scene.distractors)
        assert len(scene.distractors) > 30 and len(scene.sounds) > 10
        for before, after in pairwise(scene.sounds):
            assert before.offset <= after.onset and after.offset < scene.seconds


def test_a_blind_guesser_with_all_training_questions_is_at_chance():
    def make_examples(split, count):
        for index in range(count):
            scene = make_lamp_scene(1000 + index, test=split == "test")
            for one in list_lamp_questions(scene, split):
                if one.question_type == "describe":
                    continue
                assert one.target in one.candidates and len(one.candidates) == 4
                yield Example(f"{split}{index}", "", None, None, one.prompt, one.target), one

    prior = AnswerPrior([example for example, _ in make_examples("train", 300)], normalise)
    asked = list(make_examples("test", 200))
    right = np.mean([prior.guess(example.prompt) == normalise(example.target) for example, _ in asked])
    assert abs(right - 0.25) < 4 * (0.25 * 0.75 / len(asked)) ** 0.5
    answers = defaultdict(Counter)
    for _, one in asked:
        answers[one.question_type][one.target] += 1
        answers[one.prompt][one.target] += 1
    for counts in answers.values():
        expected = counts.total() / 4
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 3 + 5 * 6**0.5, counts


def test_the_file_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        write_clip(make_lamp_scene(77, test=False), tmp_path / f"{name}.mp4")
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
