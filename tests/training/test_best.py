"""The best checkpoint: which it is, and that it stays."""

import json
from pathlib import Path

import pytest

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError
from mirasol.training.checkpoint import Checkpoints
from mirasol.training.export import export_run
from mirasol.training.logging import BestStep
from mirasol.training.trainer import train


def line(step: int, accuracy: float, loss: float) -> dict:
    part = {
        "accuracy": accuracy,
        "text_loss": loss,
        "by_type": {"sight": {"accuracy": 1 - accuracy, "text_loss": loss, "rows": 4}},
    }
    return {"kind": "validation", "step": step, "clip": part}


LINES = [line(10, 0.5, 3.0), line(20, 0.7, 1.0), line(30, 0.7, 2.0), line(40, 0.1, 1.5)]


@pytest.mark.parametrize(
    ("metric", "step"), [("clip.accuracy", 20), ("clip.text_loss", 20), ("clip.by_type.sight.accuracy", 40)]
)
def test_the_least_loss_and_the_most_of_all_else_is_best_and_of_equal_ones_the_first(metric, step):
    assert BestStep(metric, LINES).step == step
    later = BestStep(metric, LINES[:2])
    assert [later.add(one["step"], one) for one in LINES[2:]] == [False, step == 40]
    assert later.step == step


@pytest.mark.parametrize("metric", ["clip.f1", "clip", "clip.by_type.sight", "segment.accuracy"])
def test_a_number_that_is_not_there_is_refused_with_those_that_are(metric):
    with pytest.raises(
        UserError, match=rf"keep_best={metric} is not a validation metric: .* clip\.accuracy, clip\.text_loss"
    ):
        BestStep(metric, LINES)


def test_the_best_checkpoint_stays_and_is_found_again(values, console, monkeypatch, tmp_path):
    accuracies = iter([0.1, 0.9, 0.2, 0.3])
    measured = "mirasol.training.validation.Validation.run"
    monkeypatch.setattr(measured, lambda *_: {"clip": line(0, next(accuracies), 1.0)["clip"]})
    values.update(validate_every=2, checkpoint_every=3, keep_last=1, keep_best="clip.accuracy", samples=0)
    values["stages"] = {"questions": {"steps": 7, "clips_per_step": 2, "questions_per_clip": 2}}
    folder = train(recipe_from_dict(values), console=console).parent
    # Written at 2 and 4, since they were the best so far, and at 3, 6 and 7.
    assert Checkpoints(folder / "checkpoints", 1).list_steps() == [4, 7]
    assert json.loads((export_run(folder, tmp_path / "best", best=True) / "training.json").read_text())["steps"] == 4


@pytest.mark.parametrize("metric", ["accuracy", "image.accuracy"])
def test_a_metric_of_no_part_is_refused_before_anything_is_written(values, console, metric):
    values["keep_best"] = metric
    with pytest.raises(UserError, match=f"keep_best={metric} is not a validation metric: write"):
        train(recipe_from_dict(values), console=console)
    assert not Path(values["output"]).exists()


def test_keep_best_without_a_validation_is_refused(values):
    values["keep_best"] = "clip.accuracy"
    values["data"]["validation_split"] = None
    with pytest.raises(UserError, match="keep_best=clip.accuracy has no effect without data.validation_split"):
        recipe_from_dict(values)
