"""Linears and attention that keep less for backward: what is cheap to make again is made again there.

They serve eager steps whose activations are bfloat16 or float16. Kept are the residual stream, queries, keys, values
and the feed-forward's hidden layer; normed inputs, activations and attention weights are not. The forward arithmetic is
that of the plain modules, to the bit for the linears. Under `torch.compile`, which chooses what to keep by itself, and
under autocast the plain modules serve; float32 has them too, because its attention kernel is the faster one there.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Above, the scores no longer fit a processor's caches, and torch's flash kernel catches up.
LARGEST_SCORES = 512 * 512


def keeps_less(x: Tensor, *linears: nn.Module) -> bool:
    """Whether these functions serve a step over `x` in place of the plain modules."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        # A module of another kind (an adapter, a quantised layer) has arithmetic of its own.
        and all(type(linear) is nn.Linear for linear in linears)
    )


def _linear_gradients(
    needed: Sequence[bool], gradient: Tensor, inputs: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear's weight and bias."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    weight = rows.mT @ inputs.reshape(-1, inputs.shape[-1]) if needed[0] else None
    return weight, rows.sum(dim=0) if bias is not None and needed[1] else None


class _NormedLinears(Function):
    @staticmethod
    def forward(ctx, x, scale, shift, eps, *weights_biases):
        normed, mean, inverse_deviation = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, mean, inverse_deviation, *weights_biases)
        ctx.eps = eps
        return tuple(
            F.linear(normed, weight, bias)
            for weight, bias in zip(weights_biases[::2], weights_biases[1::2], strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, scale, shift, mean, inverse_deviation, *weights_biases = ctx.saved_tensors
        normed = F.layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)
        of_normed, of_linears = None, []
        for index, gradient in enumerate(gradients):
            weight, bias = weights_biases[2 * index : 2 * index + 2]
            of_linears += _linear_gradients(ctx.needs_input_grad[4 + 2 * index :], gradient, normed, bias)
            of_input = gradient @ weight
            of_normed = of_input if of_normed is None else of_normed.add_(of_input)
        of_norm = torch.ops.aten.native_layer_norm_backward(
            of_normed, x, x.shape[-1:], mean, inverse_deviation, scale, shift, list(ctx.needs_input_grad[:3])
        )
        return *of_norm, None, *of_linears


def normed_linears(
    x: Float[Tensor, "*batch width"], norm: nn.LayerNorm, *linears: nn.Linear
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """`linear(norm(x))` of each linear; keeps x, not norm(x)."""
    weights_biases = [each for linear in linears for each in (linear.weight, linear.bias)]
    return _NormedLinears.apply(x, norm.weight, norm.bias, norm.eps, *weights_biases)


class _ActivatedLinear(Function):
    @staticmethod
    def forward(ctx, hidden, activation, weight, bias):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.activation = activation
        return F.linear(activation(hidden), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, bias = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            activated = ctx.activation(hidden)
        of_linear = _linear_gradients(ctx.needs_input_grad[2:], gradient, activated.detach(), bias)
        (of_hidden,) = torch.autograd.grad(activated, hidden, gradient @ weight)
        return of_hidden, None, *of_linear


def activated_linear(
    hidden: Float[Tensor, "*batch hidden"], activation: Callable[[Tensor], Tensor], linear: nn.Linear
) -> Float[Tensor, "*batch width"]:
    """`linear(activation(hidden))`; keeps hidden alone. The activation has no weights and no randomness."""
    return _ActivatedLinear.apply(hidden, activation, linear.weight, linear.bias)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Attention weights; a row that may look nowhere weighs nothing, as in torch's own attention."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    if mask is None:
        return scores.softmax(dim=-1)
    hidden = ~mask
    return scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1).masked_fill_(hidden, 0.0)


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, mask):
        ctx.save_for_backward(q, k, v, mask)
        return _weights(q, k, mask) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, mask = ctx.saved_tensors
        weights = _weights(q, k, mask)
        of_weights = gradient @ v.mT
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_scores /= math.sqrt(q.shape[-1])
        return of_scores @ k, of_scores.mT @ q, weights.mT @ gradient, None


def suits_small_attention(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Whether `small_attention` serves: on a processor, whose flash kernel is 2 to 4 times slower in bfloat16 for short
    sequences (its backward above all)."""
    return q.device.type == "cpu" and not dropout and keeps_less(q) and q.shape[-2] * k.shape[-2] <= LARGEST_SCORES


def small_attention(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch head key width"],
    v: Float[Tensor, "batch head key width"],
    mask: Bool[Tensor, "..."] | None,
) -> Float[Tensor, "batch head query width"]:
    """Attention by plain matmuls; keeps queries, keys and values, and makes the weights again for backward."""
    return _Attention.apply(q, k, v, mask)
