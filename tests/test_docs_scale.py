"""docs/scale.md: its figures of `3b` are those of the model they are said to follow from."""

import re
from pathlib import Path

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.cost.memory import compute_device_memory, count_optimizer_bytes
from mirasol.cost.step import StepCost
from mirasol.model.kernels import find_layers

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
GB = 1e9
ROW = re.compile(r"^\| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \| (?:([\d.]+) GB|none) \|$", re.MULTILINE)
VALUES = {"seed": 0, "output": "x", "data": {"root": "x"}, "stages": {"all": {"steps": 1}}}


@pytest.fixture(scope="module")
def model() -> MirasolForConditionalGeneration:
    with torch.device("meta"):
        return MirasolForConditionalGeneration(MirasolConfig.preset("3b"))


def test_the_weights_in_and_out_of_layers(model):
    inside = [sum(parameter.numel() for parameter in layer.parameters()) for layer in find_layers(model)]
    total = sum(parameter.numel() for parameter in model.parameters())
    said = re.search(r"has ([\d.]+) billion weights .* ([\d.]+) billion .* (\d+) layers have up to ([\d.]+)", PAGE)
    assert [float(number) for number in said.groups()] == [
        round(total / 1e9, 2), round((total - sum(inside)) / 1e9, 2), len(inside), round(max(inside) / 1e9, 3),
    ]  # fmt: skip


def test_the_table_is_the_plans_memory_and_the_formulas_bytes(model):
    recipe = recipe_from_dict({**VALUES, "parallel": {"kind": "fsdp"}, "precision": "bf16"})
    nothing = StepCost(0, 0, 0, 0, 0)
    weights = sum(parameter.numel() for parameter in model.parameters())
    optimizer = count_optimizer_bytes(model, recipe.optimizer)
    rows = ROW.findall(PAGE)
    assert [int(row[0]) for row in rows] == [1, 2, 8, 64, 256]
    for processes, state, held, copy, sent in rows:
        count = int(processes)
        memory = compute_device_memory(recipe, model, nothing, optimizer, count)
        near = {"rel": 0.03, "abs": 0.051}  # two digits, or one behind the point
        assert float(state) == pytest.approx(16 * weights / count / GB, **near)
        gathered = memory.gathered if count > 1 else 0
        assert float(held) == pytest.approx((memory.peak - memory.gathered + gathered) / GB, **near)
        assert float(copy) == pytest.approx(12 * weights / count / GB, **near)
        assert float(sent or 0) == pytest.approx(8 * weights * (count - 1) / count / GB, **near)
