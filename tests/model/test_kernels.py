"""Memory-saving kernels compute what the plain ones compute, gradients included, and are chosen where they serve."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirasol.config.parts import StackConfig
from mirasol.model import kernels, transformer


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_same(ours: torch.Tensor, plain: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, inputs), gradients(plain, inputs))


@pytest.mark.parametrize("bias", [True, False])
def test_norm_and_project(bias):
    torch.manual_seed(0)
    norm = nn.LayerNorm(8).double()
    nn.init.normal_(norm.weight)
    first, second = (nn.Linear(8, width, bias=bias).double() for width in (5, 6))
    x = leaf(2, 3, 8)
    ours = torch.cat(kernels.norm_and_project_recomputing(x, norm, first, second), dim=-1)
    plain = torch.cat([first(norm(x)), second(norm(x))], dim=-1)
    assert_same(ours, plain, [x, *norm.parameters(), *first.parameters(), *second.parameters()])


def test_frozen_weights_get_no_gradient():
    norm, linear = nn.LayerNorm(8).double(), nn.Linear(8, 5).double().requires_grad_(False)
    x = leaf(2, 8)
    kernels.norm_and_project_recomputing(x, norm, linear)[0].sum().backward()
    kernels.activate_and_project_recomputing(x, F.gelu, linear).sum().backward()
    assert linear.weight.grad is linear.bias.grad is None
    assert x.grad is not None and norm.weight.grad is not None


@pytest.mark.parametrize("gated", [True, False])
def test_activate_and_project(gated):
    torch.manual_seed(0)
    module = transformer.FeedForward(StackConfig(1, 6, 4, 1, 6, gated=gated)).double()
    hidden = leaf(2, 3, 8 if gated else 4)
    ours = kernels.activate_and_project_recomputing(hidden, module.activate, module.output)
    assert_same(ours, module.output(module.activate(hidden)), [hidden, *module.output.parameters()])


@pytest.mark.parametrize("masked", [True, False])
def test_small_attention(masked):
    torch.manual_seed(0)
    q, k, v = leaf(2, 3, 4, 8), leaf(2, 3, 5, 8), leaf(2, 3, 5, 8)
    mask = torch.ones(4, 5, dtype=torch.bool).tril() if masked else None
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_same(kernels.attend_small(q, k, v, mask), plain, [q, k, v])


def test_a_row_that_may_look_nowhere_is_zero_and_has_no_gradient():
    q, k, v = leaf(1, 1, 2, 4), leaf(1, 1, 3, 4), leaf(1, 1, 3, 4)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    mixed = kernels.attend_small(q, k, v, mask)
    assert (mixed[0, 0, 1] == 0).all()
    of_q, of_k, of_v = gradients(mixed, [q, k, v])
    assert (of_q[0, 0, 1] == 0).all()
    assert torch.stack([of_k.isfinite().all(), of_v.isfinite().all()]).all()


def test_what_is_no_number_is_not_hidden():
    q, k, v = leaf(1, 2, 4, 8), leaf(1, 2, 4, 8), leaf(1, 2, 4, 8)
    with torch.no_grad():
        k[0, 0, 1] = float("nan")
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    found = kernels.attend_small(q, k, v, mask).isnan()
    assert found[0, 0, 1:].all() and not found[0, 0, 0].any() and not found[0, 1].any()


def step(block: nn.Module, x: torch.Tensor, choice: kernels.Kernels) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Output, gradients, and the bytes kept for backward beside the weights."""
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(x, kernels=choice)
    kept = sum(size for pointer, size in sizes.items() if pointer not in own)
    return output, list(torch.autograd.grad(output.float().square().sum(), block.parameters())), kept


def test_a_bfloat16_block_keeps_half_and_gives_the_plain_gradients():
    torch.manual_seed(0)
    stack = transformer.Stack(StackConfig(1, 32, 128, 4, 8)).bfloat16()
    (block,), x = stack.blocks, torch.randn(2, 16, 32, dtype=torch.bfloat16)
    ours, gradients_of_ours, less = step(block, x, kernels.choose_kernels(x, stack.blocks))
    plain, gradients_of_plain, all_of_it = step(block, x, kernels.PLAIN)
    assert less < 0.7 * all_of_it
    torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02)
    for one, other in zip(gradients_of_ours, gradients_of_plain, strict=True):
        assert (one - other).norm() < 0.03 * other.norm() + 1e-3


def test_kernels_for_linears_are_bit_identical_in_the_forward_pass():
    torch.manual_seed(0)
    stack = StackConfig(1, 32, 128, 4, 8, gated=True)
    module, norm = transformer.FeedForward(stack).bfloat16(), nn.LayerNorm(32).bfloat16()
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16)
    choice = kernels.choose_kernels(x, transformer.Stack(stack).blocks)
    assert choice.norm_and_project is kernels.norm_and_project_recomputing
    assert torch.equal(module(x, norm, choice), module(x, norm))


BF16, FP32 = torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(1, 4)


def test_only_eager_low_precision_steps_save_memory():
    layers = transformer.Stack(StackConfig(1, 8, 8, 2, 4)).blocks

    def saves_memory(x: torch.Tensor) -> bool:
        choice = kernels.choose_kernels(x, layers)
        saving = choice.norm_and_project is kernels.norm_and_project_recomputing
        assert saving == (choice.activate_and_project is kernels.activate_and_project_recomputing)
        assert choice.attend_dense is (kernels.attend_on_processor if saving else kernels.attend_sdpa)
        return saving

    assert saves_memory(BF16) and saves_memory(BF16.half()) and not saves_memory(FP32)
    with torch.no_grad():
        assert not saves_memory(BF16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not saves_memory(BF16)


@pytest.mark.parametrize("forward_only", [True, False])
def test_compiled_layers_have_plain_kernels(forward_only):
    stack = transformer.Stack(StackConfig(1, 8, 8, 2, 4))
    assert kernels.choose_kernels(BF16, stack.blocks) != kernels.PLAIN
    kernels.compile_layers(stack, "eager", forward_only)
    assert kernels.choose_kernels(BF16, stack.blocks) == kernels.PLAIN


def test_the_attention_that_is_chosen_is_the_models():
    (block,) = layers = transformer.Stack(StackConfig(1, 8, 8, 2, 4)).blocks
    for implementation, dense, sparse in (
        ("eager", kernels.attend_eager, False), ("sdpa", kernels.attend_sdpa, False),
        ("flex_attention", kernels.attend_sdpa, True),
    ):  # fmt: skip
        block.attention.implementation = implementation
        choice = kernels.choose_kernels(FP32, layers)
        assert (choice.attend_dense, choice.sparse_masks) == (dense, sparse)
        assert choice is kernels.choose_kernels(FP32, layers), "one choice is one object, which compiled layers rely on"


def test_an_adapter_computes_for_itself():
    """Modules that are not plain linears run as they are, even where kernels save memory."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    norm, linear, x = nn.LayerNorm(8), Doubled(8, 4), torch.randn(3, 8)
    (projected,) = kernels.norm_and_project_recomputing(x, norm, linear)
    assert torch.equal(projected, linear(norm(x)))
    assert torch.equal(kernels.activate_and_project_recomputing(x, F.gelu, linear), linear(F.gelu(x)))


def test_long_sequences_and_dropout_stay_with_torchs_attention(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "attend_small", lambda q, *_: calls.append("small") or q)
    monkeypatch.setattr(kernels, "attend_sdpa", lambda q, *_: calls.append("sdpa") or q)
    short, long = torch.zeros(1, 1, 512, 4), torch.zeros(1, 1, 513, 4)
    kernels.attend_on_processor(short, short, short, None, 0.0)
    kernels.attend_on_processor(short, long, long, None, 0.0)
    kernels.attend_on_processor(short, short, short, None, 0.1)
    assert calls == ["small", "sdpa", "sdpa"]
