"""The weights that come with the package keep what is said of them, on clips of a seed that nothing was tuned on."""

import hashlib
import json

import pytest

from mirasol.checkpoint import find_shipped_checkpoint, load_checkpoint, read_doubt, read_rendered_world
from mirasol.data.datasets.registry import read_dataset
from mirasol.evaluation.answer import AnswerSettings
from mirasol.evaluation.controls import CONTROLS
from mirasol.evaluation.evaluate import evaluate_dataset
from mirasol.evaluation.metrics import OPEN, score_chance
from mirasol.synthetic.synthesize import synthesize

FOLDER = find_shipped_checkpoint("tiny")
SEED_NEVER_USED = 20_261_123
SIZE_LIMIT = 8_000_000  # bytes


def evaluate_on_fresh_clips(folder, count, controls=()):
    synthesize(folder, seed=SEED_NEVER_USED, train=0, validation=0, test=count)
    settings = AnswerSettings(folder, controls, score_candidates=False, threads=2)
    return evaluate_dataset(load_checkpoint("tiny"), read_dataset("folder", folder, "test"), settings)


def test_they_are_small_and_their_making_is_on_record():
    assert FOLDER is not None, "the package ships no weights"
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) <= SIZE_LIMIT
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    for key in ("recipe", "steps", "training_seconds", "versions"):
        assert record[key], key
    assert record["recipe"]["seed"] is not None


def test_when_they_are_not_sure_was_measured_with_these_weights():
    doubt = read_doubt(FOLDER)
    assert doubt is not None, "measure it again: `mirasol evaluate tiny DATA --calibrate` (docs/evaluation.md)"
    assert 0.3 < doubt.threshold < 0.95 and doubt.highest_surprise is not None
    assert read_rendered_world(FOLDER) == "shapes and sounds"


def test_they_answer_fresh_clips(tmp_path):
    score = evaluate_on_fresh_clips(tmp_path / "data", 40).protocols[OPEN].by_type
    assert score.accuracy >= 0.95
    assert min(score.by_type.values()) >= 0.90, score.by_type


@pytest.mark.slow
def test_they_answer_from_what_is_seen_and_heard(tmp_path):
    evaluation = evaluate_on_fresh_clips(tmp_path / "data", 400, tuple(CONTROLS))
    test = evaluation.protocols[OPEN].by_type
    controls = {name: scores.by_type for name, scores in evaluation.controls[OPEN].items()}
    assert test.accuracy >= 0.95
    assert min(test.by_type.values()) >= 0.90, test.by_type
    chance = score_chance(evaluation.examples)
    assert controls["no_media"].accuracy <= chance.accuracy + 0.10
    for control, question_type in (("no_video", "sight"), ("no_audio", "hearing"), ("shifted_audio", "bound")):
        left = controls[control].by_type[question_type]
        assert left <= chance.by_type[question_type] + 0.15, (control, question_type, left)
        assert left <= test.by_type[question_type] / 2 + 0.1, (control, question_type, left)
