"""Trackers beside TensorBoard: what they are told, with a module that stands in for them."""

import sys
import types

import pytest
import torch

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError
from mirasol.training.logging import make_tracker
from mirasol.training.trainer import train


class Run:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def stand_in(name: str, runs: list) -> types.ModuleType:
    """A module with what Mirasol uses of wandb and trackio."""
    module = types.ModuleType(name)

    def init(**given):
        runs.append((given, Run()))
        return runs[-1][1]

    module.init, module.Image = init, lambda array: ("image", array.shape)
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_told_what_the_run_logs(values, console, monkeypatch, name):
    runs = []
    monkeypatch.setitem(sys.modules, name, stand_in(name, runs))
    recipe = recipe_from_dict({**values, "tracker": name, "samples": 2})
    train(recipe, console=console)
    ((given, run),) = runs
    assert given["project"] == "mirasol" and given["name"].startswith("run-") and given["resume"] == "allow"
    assert given["config"] == recipe.to_dict()
    assert ("id" in given) == (name == "wandb")
    assert run.finished
    train_steps = [step for step, logged in run.logged if "train/loss" in logged]
    assert train_steps == list(range(1, 9))
    assert all(isinstance(value, int | float) for _, logged in run.logged for key, value in logged.items()
               if not key.startswith("samples/"))  # fmt: skip
    assert [step for step, logged in run.logged if "validation_clip/accuracy" in logged] == [4, 8]
    pictures = [logged["samples/reconstruction"] for _, logged in run.logged if "samples/reconstruction" in logged]
    assert pictures and pictures[0][0] == "image" and pictures[0][1][2] == 3


def test_a_missing_package_is_told_before_anything_begins(values, console, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracker=wandb: .* pip install 'mirasol\[wandb\]'"):
        train(recipe_from_dict({**values, "tracker": "wandb"}), console=console)
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_asked_for_by_default(recipe):
    assert make_tracker(recipe) is None


def test_trackio_itself_takes_a_run_offline(values, monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tracker = make_tracker(recipe_from_dict({**values, "tracker": "trackio"}))
    tracker.log_numbers(1, {"train/loss": 1.5})
    tracker.log_samples(1, "what → that", torch.zeros(3, 8, 8, dtype=torch.uint8))
    tracker.close()
    written = [path for path in (tmp_path / "trackio").rglob("*") if path.is_file()]
    assert any(path.stat().st_size for path in written)
