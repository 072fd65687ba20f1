"""What keeps less for backward computes what the plain modules compute, gradients included."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirasol.config.parts import StackConfig
from mirasol.model import recompute, transformer


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_same(ours: torch.Tensor, plain: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, inputs), gradients(plain, inputs))


@pytest.mark.parametrize("bias", [True, False])
def test_normed_linears(bias):
    torch.manual_seed(0)
    norm = nn.LayerNorm(8).double()
    nn.init.normal_(norm.weight)
    first, second = (nn.Linear(8, width, bias=bias).double() for width in (5, 6))
    x = leaf(2, 3, 8)
    ours = torch.cat(recompute.normed_linears(x, norm, first, second), dim=-1)
    plain = torch.cat([first(norm(x)), second(norm(x))], dim=-1)
    assert_same(ours, plain, [x, *norm.parameters(), *first.parameters(), *second.parameters()])


def test_frozen_weights_get_no_gradient():
    norm, linear = nn.LayerNorm(8).double(), nn.Linear(8, 5).double().requires_grad_(False)
    x = leaf(2, 8)
    recompute.normed_linears(x, norm, linear)[0].sum().backward()
    recompute.activated_linear(x, F.gelu, linear).sum().backward()
    assert linear.weight.grad is linear.bias.grad is None
    assert x.grad is not None and norm.weight.grad is not None


@pytest.mark.parametrize("gated", [True, False])
def test_activated_linear(gated):
    torch.manual_seed(0)
    module = transformer.FeedForward(StackConfig(1, 6, 4, 1, 6, gated=gated)).double()
    hidden = leaf(2, 3, 8 if gated else 4)
    ours = recompute.activated_linear(hidden, module.activate, module.output)
    assert_same(ours, module.output(module.activate(hidden)), [hidden, *module.output.parameters()])


@pytest.mark.parametrize("masked", [True, False])
def test_small_attention(masked):
    torch.manual_seed(0)
    q, k, v = leaf(2, 3, 4, 8), leaf(2, 3, 5, 8), leaf(2, 3, 5, 8)
    mask = torch.ones(4, 5, dtype=torch.bool).tril() if masked else None
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_same(recompute.small_attention(q, k, v, mask), plain, [q, k, v])


def test_a_row_that_may_look_nowhere_is_zero_and_has_no_gradient():
    q, k, v = leaf(1, 1, 2, 4), leaf(1, 1, 3, 4), leaf(1, 1, 3, 4)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    mixed = recompute.small_attention(q, k, v, mask)
    assert (mixed[0, 0, 1] == 0).all()
    of_q, of_k, of_v = gradients(mixed, [q, k, v])
    assert (of_q[0, 0, 1] == 0).all()
    assert torch.stack([of_k.isfinite().all(), of_v.isfinite().all()]).all()


def test_what_is_no_number_is_not_hidden():
    q, k, v = leaf(1, 2, 4, 8), leaf(1, 2, 4, 8), leaf(1, 2, 4, 8)
    with torch.no_grad():
        k[0, 0, 1] = float("nan")
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    found = recompute.small_attention(q, k, v, mask).isnan()
    assert found[0, 0, 1:].all() and not found[0, 0, 0].any() and not found[0, 1].any()


def step(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = block(x)
    return output, list(torch.autograd.grad(output.float().square().sum(), block.parameters()))


def test_a_bfloat16_block_keeps_half_and_gives_the_plain_gradients(monkeypatch):
    torch.manual_seed(0)
    block = transformer.Block(StackConfig(1, 32, 128, 4, 8)).bfloat16()
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16)

    def kept() -> int:
        sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = block(x)
        assert output.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    ours, less = step(block, x), kept()
    monkeypatch.setattr(transformer, "keeps_less", lambda *_: False)
    monkeypatch.setattr(transformer, "suits_small_attention", lambda *_: False)
    plain, all_of_it = step(block, x), kept()
    assert less < 0.7 * all_of_it
    torch.testing.assert_close(ours[0], plain[0], rtol=0.02, atol=0.02)
    for one, other in zip(ours[1], plain[1], strict=True):
        assert (one - other).norm() < 0.03 * other.norm() + 1e-3


def test_only_eager_low_precision_steps_use_it():
    linear = nn.Linear(4, 4)
    assert recompute.keeps_less(torch.zeros(1, 4, dtype=torch.bfloat16), linear)
    assert not recompute.keeps_less(torch.zeros(1, 4), linear)
    assert not recompute.keeps_less(torch.zeros(1, 4, dtype=torch.bfloat16), nn.Sequential(linear))
    with torch.no_grad():
        assert not recompute.keeps_less(torch.zeros(1, 4, dtype=torch.bfloat16), linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recompute.keeps_less(torch.zeros(1, 4, dtype=torch.bfloat16), linear)
