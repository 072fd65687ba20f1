"""The moving average of the weights: what it is, that the model gets its own back, and that a run resumes with it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError
from mirasol.training.checkpoint import Checkpoints
from mirasol.training.optim import WeightAverage
from mirasol.training.trainer import train


def test_the_average_follows_the_weights():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay=0.5)
    torch.nn.init.ones_(model.weight)
    average.update(1)  # at first faster: 2/11 is kept
    expected = 1 - 2 / 11
    torch.testing.assert_close(average.values["weight"], torch.full((1, 2), expected))
    for _ in range(3):
        average.update(1000)
        expected = (1 + expected) / 2
    torch.testing.assert_close(average.values["weight"], torch.full((1, 2), expected))
    with average.use_as_weights():
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 2), expected))
    assert torch.equal(model.weight.detach(), torch.ones(1, 2))
    torch.testing.assert_close(average.values["weight"], torch.full((1, 2), expected))


def test_a_run_ends_with_the_average_and_resumes_to_the_same_bits(values, console):
    values.update(ema=0.9, keep_last=4, validate_every=100)
    values["stages"] = {"slots": {"steps": 4, "span": "segment", "clips_per_step": 2, "questions_per_clip": 1}}
    checkpoint = train(recipe_from_dict(values), console=console)
    weights = (checkpoint / "model.safetensors").read_bytes()
    found = load_file(checkpoint / "model.safetensors")
    recipe = recipe_from_dict(values)
    shutil.rmtree(checkpoint)
    shutil.rmtree(Path(values["output"]) / "checkpoints" / "step-00000004")
    assert (train(recipe, console=console, resume=True) / "model.safetensors").read_bytes() == weights

    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from mirasol.training.checkpoint_io import ShardReader

    checkpoints = Checkpoints(Path(values["output"]) / "checkpoints", 4)
    held = ShardReader(checkpoints.path(4)).read_metadata().state_dict_metadata
    tensors: dict = {"model": {}, "optimizer": {}, "average": {}}
    for key, value in held.items():
        assert isinstance(value, TensorStorageMetadata)
        part, name = key.split(".", 1)
        tensors[part][name] = torch.zeros(value.size, dtype=value.properties.dtype)
    checkpoints.load(4, tensors)
    assert all(torch.equal(found[name], tensors["average"][name]) for name in found)
    assert any(not torch.equal(found[name], tensors["model"][name]) for name in found)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_averages_nothing_is_refused(values, decay):
    with pytest.raises(UserError, match=rf"ema={decay} must be in \(0, 1\)"):
        recipe_from_dict({**values, "ema": decay})
