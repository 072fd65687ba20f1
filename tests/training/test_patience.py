"""A run with `patience` ends when its validation no longer improves, interrupted or not."""

import itertools
import json

import pytest

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError
from mirasol.training.export import export_run
from mirasol.training.logging import BestStep, read_metrics
from mirasol.training.trainer import train

STAGES = {"questions": {"steps": 6, "clips_per_step": 2, "questions_per_clip": 2}}


def make_part(accuracy: float) -> dict:
    values = {"accuracy": accuracy, "text_loss": 1 - accuracy}
    return {"clip": {**values, "by_type": {"sight": {**values, "rows": 4}}}}


@pytest.fixture
def scored(monkeypatch):
    """Makes the validation after each step score what it is told, by the number of the step."""

    def set_scores(scores: dict[int, float], steps: "itertools.count") -> None:
        monkeypatch.setattr(
            "mirasol.training.validation.Validation.run", lambda *_: make_part(scores.get(next(steps), 0.0))
        )

    return set_scores


@pytest.mark.parametrize(
    ("accuracies", "patience", "last"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 1, 6),  # always better
        ([0.5, 0.5, 0.5], 2, 3),  # equal is not better
        ([0.5, 0.4, 0.6, 0.5, 0.55], 2, 5),
        ([0.9], 1, 2),
    ],
)
def test_it_ends_after_as_many_validations_that_are_no_better(values, console, scored, accuracies, patience, last):
    values |= {"stages": STAGES, "validate_every": 1, "keep_best": "clip.accuracy", "patience": patience}
    scored(dict(enumerate(accuracies, 1)), itertools.count(1))
    checkpoint = train(recipe_from_dict(values), console=console)
    assert json.loads((checkpoint / "training.json").read_text())["steps"] == last
    lines = read_metrics(checkpoint.parent / "metrics.jsonl")
    assert max(line["step"] for line in lines) == last
    best = BestStep("clip.accuracy", [line for line in lines if line["kind"] == "validation"])
    assert last == 6 or best.worse_since == patience


def test_its_result_is_the_last_step_and_its_best_one_stays(values, console, scored, tmp_path):
    values |= {"stages": STAGES, "validate_every": 1, "keep_best": "clip.accuracy", "patience": 2, "keep_last": 1}
    scored({1: 0.1, 2: 0.8, 3: 0.2, 4: 0.3}, itertools.count(1))
    run = train(recipe_from_dict(values), console=console).parent
    for best, steps in ((True, 2), (False, 4)):
        out = export_run(run, tmp_path / str(best), best=best)
        assert json.loads((out / "training.json").read_text())["steps"] == steps


@pytest.mark.parametrize("killed_at", [3, "result"])
def test_an_interrupted_run_ends_at_the_same_step_with_the_same_bits(
    values, console, scored, killed_at, monkeypatch, tmp_path
):
    values |= {
        "stages": STAGES,
        "validate_every": 1,
        "keep_best": "clip.accuracy",
        "patience": 2,
        "checkpoint_every": 1,
    }
    scores = {1: 0.1, 2: 0.8, 3: 0.2, 4: 0.3}
    scored(scores, itertools.count(1))
    whole = train(recipe_from_dict({**values, "output": str(tmp_path / "whole")}), console=console)
    with monkeypatch.context() as patch:
        name = "write_result" if killed_at == "result" else "training_step"
        original = getattr(__import__("mirasol.training.trainer", fromlist=[name]), name)

        def stop(run, *rest):
            if killed_at == "result" or rest[0].step == killed_at:
                raise KeyboardInterrupt
            return original(run, *rest)

        patch.setattr(f"mirasol.training.trainer.{name}", stop)
        scored(scores, itertools.count(1))
        with pytest.raises(KeyboardInterrupt):
            train(recipe_from_dict(values), console=console)
    scored(scores, itertools.count(1 if killed_at == "result" else killed_at + 1))
    resumed = train(recipe_from_dict(values), resume=True, console=console)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((resumed / "training.json").read_text())["steps"] == 4


def test_what_decides_the_end_may_not_change_when_a_run_resumes(values):
    values |= {"keep_best": "clip.accuracy", "patience": 2}
    recipe = recipe_from_dict(values)
    for change in ({"keep_best": "clip.text_loss"}, {"validate_every": 3}, {"validation_clips": 1}, {"patience": 3}):
        assert recipe_from_dict(values | change).compute_fingerprint() != recipe.compute_fingerprint()
    assert recipe_from_dict(values | {"workers": 2}).compute_fingerprint() == recipe.compute_fingerprint()


@pytest.mark.parametrize(("patience", "keep_best"), [(2, None), (0, "clip.accuracy"), (-1, "clip.accuracy")])
def test_a_patience_that_waits_for_nothing_is_refused(values, patience, keep_best):
    with pytest.raises(UserError, match=f"patience={patience}"):
        recipe_from_dict(values | {"patience": patience, "keep_best": keep_best})
