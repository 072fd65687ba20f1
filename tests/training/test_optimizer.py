"""Learning rate as a function of the step, and what decays."""

import dataclasses

import pytest
import torch

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import OptimizerRecipe, Recipe, Stage
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.training import optim
from mirasol.training.optim import Optimizer, compute_learning_rate, split_by_decay


def recipe_with(optimizer: OptimizerRecipe, **stages: Stage) -> Recipe:
    from mirasol.config.recipe import DataRecipe

    stages = stages or {"a": Stage(steps=40), "b": Stage(steps=61)}
    return Recipe(seed=0, output="x", data=DataRecipe(root="x"), stages=stages, optimizer=optimizer)


def test_warm_up_rises_to_the_peak_and_the_schedules_end_where_they_should():
    """Half-way down: cosine and linear in the middle of what follows the warm-up, the plateau in its last tenth."""
    for schedule, half_way in (("cosine", 55), ("linear", 55), ("plateau", 91)):
        settings = OptimizerRecipe(learning_rate=2.0, warmup_steps=10, schedule=schedule, final_scale=0.1)
        rates = [compute_learning_rate(recipe_with(settings), step) for step in range(101)]
        assert rates[0] == pytest.approx(0.2)
        assert rates[9] == rates[10] == max(rates) == 2.0
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[-1] == pytest.approx(0.2)
        assert rates[half_way] == pytest.approx(1.1)


def test_constant_schedule_and_no_warm_up():
    settings = OptimizerRecipe(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert {compute_learning_rate(recipe_with(settings), step) for step in (0, 50, 100)} == {2.0}


def test_a_stage_scales_the_rate():
    settings = OptimizerRecipe(learning_rate=2.0, warmup_steps=0, schedule="constant")
    recipe = recipe_with(settings, a=Stage(steps=5), b=Stage(steps=5, learning_rate_scale=0.5))
    assert [compute_learning_rate(recipe, step) for step in (4, 5)] == [2.0, 1.0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", text={"vocab_size": 40}))


def test_only_weights_of_linear_and_convolution_layers_decay(model):
    decay, rest = split_by_decay(model)
    assert decay.keys() | rest.keys() == dict(model.named_parameters()).keys()
    assert not decay.keys() & rest.keys()
    assert all(parameter.ndim >= 2 for parameter in decay.values())
    assert all(name.endswith(".weight") and "norm" not in name for name in decay)
    for name in ("text.embedding.weight", "combiner.token_position", "reconstruction.queries", "latent.hidden_latent"):
        assert name in rest
    assert "text.blocks.0.attention.query.weight" in decay
    assert "chunk_encoder.tubes.projections.0.weight" in decay


def test_the_optimizer_decays_just_these(model):
    model = MirasolForConditionalGeneration(model.config)
    optimizer = Optimizer(model, OptimizerRecipe(weight_decay=0.5))
    optimizer.set_learning_rate(0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decay, rest = split_by_decay(model)
    for name, parameter in decay.items():
        torch.testing.assert_close(parameter, before[name] * 0.95)
    for name, parameter in rest.items():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_state_goes_through_save_and_load(model, name, tmp_path):
    settings = OptimizerRecipe(name=name)
    first = MirasolForConditionalGeneration(model.config)
    second = MirasolForConditionalGeneration(model.config)
    second.load_state_dict(first.state_dict())
    optimizers = Optimizer(first, settings), Optimizer(second, settings)

    def step(one_model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in one_model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    step(first, optimizers[0], 0)
    torch.save(optimizers[0].tensors(), tmp_path / "state.pt")
    second.load_state_dict(first.state_dict())
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded.keys() == optimizers[1].tensors().keys()
    for key, value in optimizers[1].tensors().items():
        value.copy_(loaded[key])
    step(first, optimizers[0], 1)
    step(second, optimizers[1], 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert len(optimizers[0].members) == (2 if name == "muon" else 1)


def test_gradients_are_clipped_to_the_limit_and_left_alone_without():
    model = torch.nn.Linear(2, 1, bias=False)
    for limit, expected in ((1.0, 1.0), (None, 5.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        optimizer = Optimizer(model, dataclasses.replace(OptimizerRecipe(), gradient_clip=limit))
        assert optimizer.clip_gradients() == pytest.approx(5.0)
        assert float(model.weight.grad.norm()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("largest_stack", [1, 3_000, 2**22])
def test_muon_moves_matrices_as_pytorchs_does_one_by_one(largest_stack, monkeypatch):
    """In groups of any size, wide and tall, of one row, those without a gradient not at all; in bf16, as PyTorch's."""
    monkeypatch.setattr(optim, "choose_product_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(optim, "LARGEST_STACK", largest_stack)
    shapes = [(24, 24), (24, 60), (60, 24), (24, 60), (1, 30), (30, 1), (7, 130), (24, 24), (5, 5)]
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.95}
    members = optim.Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for parameter in ours:
        members[0].state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in ours]
        for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
            other.data.copy_(mine.data)
        for member in members:
            member.step()
        for mine, other, begun in zip(ours, theirs, before, strict=True):
            change = (other - begun).norm()
            assert (mine - other).norm() <= 0.02 * change
        assert torch.equal(ours[-1], before[-1])


def test_muon_multiplies_in_what_the_device_is_fast_at(monkeypatch):
    """bf16 is many times slower than fp32 on a CPU without AVX-512, where PyTorch has no fast product for it."""
    taken = []
    monkeypatch.setattr(optim, "orthogonalise", lambda matrices, *_: taken.append(matrices.dtype) or matrices)
    for capability, dtype in (("AVX512", torch.bfloat16), ("AVX2", torch.float32), ("DEFAULT", torch.float32)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert optim.choose_product_dtype(torch.device("cpu")) == dtype
        assert optim.choose_product_dtype(torch.device("cuda")) == torch.bfloat16
        parameter = torch.nn.Parameter(torch.eye(3))
        parameter.grad = torch.eye(3)
        member = optim.Muon([parameter], lr=0.1, weight_decay=0.0, momentum=0.95)
        member.state[parameter]["momentum_buffer"] = torch.zeros(3, 3)
        member.step()
        assert taken.pop() == dtype
        assert parameter.dtype == torch.float32


def test_muon_takes_nearly_the_same_step_in_either_precision(monkeypatch):
    """Of well-conditioned matrices; what the gradient hardly has, bf16 rounds."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 60, generator=generator)
    gradient = torch.linalg.qr(torch.randn(60, 24, generator=generator))[0].T
    gradient = gradient + 0.01 * torch.randn(24, 60, generator=generator)
    changes = []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(optim, "choose_product_dtype", lambda device, dtype=dtype: dtype)
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = gradient.clone()
        member = optim.Muon([parameter], lr=0.1, weight_decay=0.0, momentum=0.95)
        member.state[parameter]["momentum_buffer"] = torch.zeros_like(start)
        member.step()
        changes.append(parameter.detach() - start)
    assert (changes[0] - changes[1]).norm() <= 0.02 * changes[1].norm()
    assert changes[1].norm() > 0
