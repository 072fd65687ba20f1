"""The weights that come with the package keep what is said of them, on clips of a seed that nothing was tuned on."""

import hashlib
import json

import pytest

from mirasol.checkpoint import load_checkpoint, shipped_checkpoint
from mirasol.data.datasets.folder_reader import read_examples
from mirasol.data.example import group_by_clip
from mirasol.evaluation.evaluate import evaluate
from mirasol.evaluation.metrics import chance
from mirasol.evaluation.protocol import evaluate_with_controls
from mirasol.synthetic.synthesize import synthesize

FOLDER = shipped_checkpoint("tiny")
SEED_NEVER_USED = 20_261_123
SIZE_LIMIT = 8_000_000  # bytes


def fresh_clips(folder, count):
    synthesize(folder, seed=SEED_NEVER_USED, train=0, validation=0, test=count, workers=2)
    return group_by_clip(read_examples(folder, "test"))


def test_they_are_small_and_their_making_is_on_record():
    assert FOLDER is not None, "the package ships no weights"
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) <= SIZE_LIMIT
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    for key in ("recipe", "steps", "training_seconds", "versions"):
        assert record[key], key
    assert record["recipe"]["seed"] is not None


def test_they_answer_fresh_clips(tmp_path):
    tiny = load_checkpoint("tiny")
    clips = fresh_clips(tmp_path / "data", 120)
    score = evaluate(tiny.model, tiny.processor, clips, tmp_path / "data")
    assert score.accuracy >= 0.95
    assert min(score.by_type.values()) >= 0.90, score.by_type


@pytest.mark.slow
def test_they_answer_from_what_is_seen_and_heard(tmp_path):
    tiny = load_checkpoint("tiny")
    clips = fresh_clips(tmp_path / "data", 400)
    results = evaluate_with_controls(tiny.model, tiny.processor, clips, tmp_path / "data")
    assert results.test.accuracy >= 0.95
    assert min(results.test.by_type.values()) >= 0.90, results.test.by_type
    luck = chance(example for clip in clips for example in clip.examples)
    assert results.controls["no_media"].accuracy <= luck.accuracy + 0.10
    for control, question_type in (("no_video", "sight"), ("no_audio", "hearing"), ("shifted_audio", "bound")):
        left = results.controls[control].by_type[question_type]
        assert left <= luck.by_type[question_type] + 0.15, (control, question_type, left)
        assert left <= results.test.by_type[question_type] / 2 + 0.1, (control, question_type, left)
