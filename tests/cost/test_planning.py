"""What a run costs before it begins: the parts that are not one step's."""

import dataclasses

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.recipe import OptimizerRecipe
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.cost import plan as planning
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.devices import find_peak_tflops
from mirasol.cost.memory import count_optimizer_bytes
from mirasol.cost.plan import plan_run
from mirasol.cost.step import StepCost, StepShape
from mirasol.errors import UserError
from mirasol.training.optim import Optimizer


@pytest.fixture
def uncounted(monkeypatch):
    """Steps have a fixed cost: counting them is tested elsewhere."""
    cost = StepCost(forward_flops=2 * 10**9, backward_flops=4 * 10**9, recomputed_flops=10**9, saved_bytes=70,
                    peak_bytes=100)  # fmt: skip
    monkeypatch.setattr(planning, "count_step_cost", lambda *given, **named: cost)
    return cost


def test_times_and_epochs_follow_from_the_flops(recipe, uncounted):
    plan = plan_run(recipe, Assumptions(mfu=0.5, peak_tflops=2e-3))
    slots, questions = plan.stages["slots"], plan.stages["questions"]
    assert slots.step_flops == 6 * 10**9 and slots.recomputed_flops == 10**9
    assert slots.step_seconds == pytest.approx(6.0)
    assert plan.seconds == pytest.approx(slots.seconds + questions.seconds) == pytest.approx(8 * 6.0)
    assert questions.epochs == pytest.approx(5 * 3 / questions.clips)
    assert questions.epoch_seconds == pytest.approx(6.0 * questions.clips / 3)
    model = MirasolForConditionalGeneration(
        MirasolConfig.preset("tiny", **recipe.model.overrides | {"text": {"vocab_size": 300, "stack": {
            **recipe.model.overrides["text"]["stack"]}}})
    )  # fmt: skip
    assert plan.parameters == model.num_parameters()
    assert sum(row["parameters"] for row in plan.components.values()) == plan.parameters
    assert plan.result_bytes == 4 * plan.parameters


def test_chunks_are_those_of_the_data_or_the_most_there_can_be(values, recipe, uncounted):
    found = plan_run(recipe, Assumptions(peak_tflops=1.0))
    assert found.stages["slots"].shape.chunks == 2  # a slot is one second, a chunk half of one
    assert 1 < found.stages["questions"].shape.chunks < 64
    values["data"]["root"] = values["data"]["root"] + "-absent"
    absent = plan_run(recipe_from_dict(values), Assumptions(peak_tflops=1.0))
    assert absent.stages["slots"].clips is None and absent.stages["slots"].epoch_seconds is None
    assert absent.stages["questions"].shape.chunks == 64
    assert any("-absent" in note for note in absent.notes)
    assert any("are at most these" in note and "64 chunks (chunking.max_chunks), 32 s" in note for note in absent.notes)
    assert not any("at most these" in note for note in found.notes)
    given = Assumptions(peak_tflops=1.0, chunks=5, text_length=20, target_tokens=3)
    assert plan_run(recipe, given).stages["questions"].shape == StepShape(3, 5, 4, 20, 3)


def test_frozen_weights_have_neither_gradients_nor_moments(values, uncounted):
    values["stages"]["slots"]["trains"] = values["stages"]["questions"]["trains"] = ["audio"]
    plan = plan_run(recipe_from_dict(values), Assumptions(peak_tflops=1.0))
    audio = plan.components["audio"]["parameters"]
    memory = plan.stages["questions"].memory
    assert memory.gradients == 4 * plan.stages["questions"].trained <= 4 * audio
    assert memory.optimizer == 2 * memory.gradients
    assert memory.weights == 4 * plan.parameters


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_those_of_the_real_optimizer(recipe, name):
    settings = OptimizerRecipe(name=name)
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **recipe.model.overrides))
    optimizer = Optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [v for member in optimizer.members for state in member.state.values() for v in state.values()]
    held = sum(v.numel() * v.element_size() for v in tensors if isinstance(v, torch.Tensor) and v.numel() > 1)
    assert count_optimizer_bytes(model, settings) == pytest.approx(held, rel=1e-3)


def test_processes_share_the_work_and_with_fsdp_the_weights(values, uncounted):
    values["stages"] = {"questions": {"steps": 2, "clips_per_step": 8}}
    alone = plan_run(recipe_from_dict(values), Assumptions(peak_tflops=1.0)).stages["questions"]
    values |= {"accumulation": 2, "parallel": {"kind": "ddp"}}
    ddp = plan_run(recipe_from_dict(values), Assumptions(processes=2, peak_tflops=1.0)).stages["questions"]
    assert (ddp.shape.clips, ddp.microbatches) == (2, 2)
    assert ddp.step_flops == 4 * alone.step_flops  # each of the four microbatches costs as much here
    assert ddp.step_seconds == pytest.approx(2 * alone.step_seconds)
    assert ddp.memory.weights == alone.memory.weights
    assert ddp.memory.peak >= ddp.memory.weights + ddp.memory.optimizer + ddp.memory.gradients + uncounted.peak_bytes
    values |= {"parallel": {"kind": "fsdp"}, "ema": 0.99}
    fsdp = plan_run(recipe_from_dict(values), Assumptions(processes=2, peak_tflops=1.0)).stages["questions"]
    assert fsdp.memory.optimizer == -(-alone.memory.optimizer // 2)
    assert fsdp.memory.weights == alone.memory.weights  # half of the weights and half of their average
    assert 0 < fsdp.memory.gathered < 2 * alone.memory.weights
    values["parallel"] = {"kind": "fsdp", "reshard": False}
    whole = plan_run(recipe_from_dict(values), Assumptions(processes=2, peak_tflops=1.0)).stages["questions"]
    assert whole.memory.gathered > fsdp.memory.gathered


def test_what_cannot_be_planned_is_an_error(values, recipe, uncounted, tmp_path):
    with pytest.raises(UserError, match="--processes 2: set parallel.kind to ddp or fsdp"):
        plan_run(recipe, Assumptions(processes=2, peak_tflops=1.0))
    shared = recipe_from_dict({**values, "parallel": {"kind": "ddp"}})
    with pytest.raises(UserError, match="clips_per_step=3 does not divide among 2 processes"):
        plan_run(shared, Assumptions(processes=2, peak_tflops=1.0))
    values["model"] = {"init": str(tmp_path / "later")}
    del values["tokenizer"]
    later = recipe_from_dict(values)
    with pytest.raises(UserError, match=r"later: no such checkpoint.*--preset 3b"):
        plan_run(later, Assumptions(peak_tflops=1.0))
    assert plan_run(later, Assumptions(peak_tflops=1.0, preset="tiny")).parameters > 0


def test_stages_that_are_alike_are_counted_once(values, monkeypatch):
    calls = []
    monkeypatch.setattr(
        planning, "count_step_cost", lambda *given, **named: calls.append(given) or StepCost(1, 2, 0, 1, 1)
    )
    values["stages"]["again"] = dict(values["stages"]["questions"])
    plan = plan_run(recipe_from_dict(values), Assumptions(peak_tflops=1.0))
    assert len(calls) == 2
    assert dataclasses.asdict(plan.stages["again"].cost) == dataclasses.asdict(plan.stages["questions"].cost)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("kind", "attention"), [("none", 0.2), ("fsdp", 0.0)])
def test_what_a_stage_drops_is_counted_and_by_its_device(values, monkeypatch, kind, attention):
    """Masks of dropout are kept for the backward pass; those of attention weights only by a processor's kernels."""
    counted = []

    def step_cost(model, *given, **named):
        block = model.latent.stack.blocks[0]
        counted.append((block.dropout.p, block.attention.dropout, model.latent.stack.layer_drop.rate))
        return StepCost(1, 2, 0, 1, 1)

    monkeypatch.setattr(planning, "count_step_cost", step_cost)
    stage = {"steps": 1, "clips_per_step": 2, "questions_per_clip": 1}
    values["stages"] = {"one": {**stage, "dropout": 0.2}, "two": {**stage, "dropout": 0.0, "layer_drop": 0.3}}
    values |= {"device": "auto", "parallel": {"kind": kind}}
    plan_run(recipe_from_dict(values), Assumptions(peak_tflops=1.0))
    assert counted == [(0.2, attention, 0.0), (0.0, 0.0, 0.3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_time_is_this_processors_unless_the_recipe_is_for_gpus(values):
    def source(**keys) -> str:
        return find_peak_tflops(recipe_from_dict({**values, **keys}), None)[1]

    assert "measured here" in source(device="auto")
    assert "measured here" in source(device="cpu", parallel={"kind": "ddp"})
    assert "H100" in source(device="auto", parallel={"kind": "fsdp"})
    assert "H100" in source(device="cuda")
