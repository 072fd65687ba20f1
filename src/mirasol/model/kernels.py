"""How the layers are computed: kernels for linears and attention, recomputation and compilation.

Nothing here changes what a layer computes. A stack chooses its `Kernels` once for each pass (`choose_kernels`), by
device, precision and whether gradients are needed; its layers call what was chosen and know of none of that.

The memory-saving kernels serve eager training steps in bfloat16 or float16 on any device. They keep the residual
stream, queries, keys, values and the feed-forward's hidden layer for backward; normed inputs, activations and attention
weights, which are cheap, are computed again there. Their forward arithmetic is that of the plain modules, bit for bit
for the linears. float32 has the plain kernels because torch's attention is the faster one there, autocast because it
casts inside each linear, and a compiled layer because the compiler itself decides what to keep.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from mirasol.errors import UserError
from mirasol.model.masks import BlockCausal

# What `attn_implementation` may be.
ATTENTION = ("eager", "sdpa", "flex_attention")

# What the backward pass computes again: nothing, the feed-forwards' hidden layers, or whole layers.
RECOMPUTE = ("none", "hidden", "block")

# Queries times keys up to which `attend_small` serves. Above, the scores no longer fit a processor's caches, and
# torch's flash kernel catches up.
LARGEST_SCORES = 512 * 512

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _compute_linear_gradients(
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
            of_linears += _compute_linear_gradients(ctx.needs_input_grad[4 + 2 * index :], gradient, normed, bias)
            of_input = gradient @ weight
            of_normed = of_input if of_normed is None else of_normed.add_(of_input)
        of_norm = torch.ops.aten.native_layer_norm_backward(
            of_normed, x, x.shape[-1:], mean, inverse_deviation, scale, shift, list(ctx.needs_input_grad[:3])
        )
        return *of_norm, None, *of_linears


def _are_linear(*modules: nn.Module) -> bool:
    """False for an adapter or a quantised layer, which has arithmetic of its own."""
    return all(type(module) is nn.Linear for module in modules)


def norm_and_project(
    x: Float[Tensor, "*batch width"], norm: nn.Module | None, *linears: nn.Module
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """`linear(norm(x))` of each linear; without a norm, x is normed already."""
    normed = x if norm is None else norm(x)
    return tuple(linear(normed) for linear in linears)


def norm_and_project_recomputing(
    x: Float[Tensor, "*batch width"], norm: nn.Module | None, *linears: nn.Module
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """`norm_and_project` that keeps x for backward and computes norm(x) again there."""
    if type(norm) is not nn.LayerNorm or not _are_linear(*linears):
        return norm_and_project(x, norm, *linears)
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
        of_linear = _compute_linear_gradients(ctx.needs_input_grad[2:], gradient, activated.detach(), bias)
        (of_hidden,) = torch.autograd.grad(activated, hidden, gradient @ weight)
        return of_hidden, None, *of_linear


def activate_and_project(
    hidden: Float[Tensor, "*batch hidden"], activation: Callable[[Tensor], Tensor], linear: nn.Module
) -> Float[Tensor, "*batch width"]:
    """`linear(activation(hidden))`."""
    return linear(activation(hidden))


def activate_and_project_recomputing(
    hidden: Float[Tensor, "*batch hidden"], activation: Callable[[Tensor], Tensor], linear: nn.Module
) -> Float[Tensor, "*batch width"]:
    """`activate_and_project` that keeps `hidden` for backward and computes the activation, which has no weights and no
    randomness, again there."""
    if not _are_linear(linear):
        return activate_and_project(hidden, activation, linear)
    return _ActivatedLinear.apply(hidden, activation, linear.weight, linear.bias)


def _compute_attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Attention weights; a row whose keys are all masked gets zeros, as in torch's own attention."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    if mask is None:
        return scores.softmax(dim=-1)
    hidden = ~mask
    return scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1).masked_fill_(hidden, 0.0)


class _SmallAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, mask):
        ctx.save_for_backward(q, k, v, mask)
        return _compute_attention_weights(q, k, mask) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, mask = ctx.saved_tensors
        weights = _compute_attention_weights(q, k, mask)
        of_weights = gradient @ v.mT
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_scores /= math.sqrt(q.shape[-1])
        return of_scores @ k, of_scores.mT @ q, weights.mT @ gradient, None


def attend_small(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch head key width"],
    v: Float[Tensor, "batch head key width"],
    mask: Bool[Tensor, "..."] | None,
) -> Float[Tensor, "batch head query width"]:
    """Attention by plain matrix products that keeps queries, keys and values for backward and computes the weights
    again there."""
    return _SmallAttention.apply(q, k, v, mask)


def attend_eagerly(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch head key width"],
    v: Float[Tensor, "batch head key width"],
    mask: Bool[Tensor, "..."] | None,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch head query width"], Float[Tensor, "batch head query key"]]:
    """Attention by its definition, softmax(q k^T / sqrt(width)) v, and its weights before dropout."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        # A row whose keys are all masked gets zeros, as in the other implementations.
        weights = weights.masked_fill(~mask, 0.0)
    return F.dropout(weights, dropout) @ v, weights


def attend_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The kernel of `attn_implementation="eager"`."""
    return attend_eagerly(q, k, v, mask, dropout)[0]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The kernel of `attn_implementation="sdpa"`: torch's fused attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attend_on_processor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """`attend_sdpa` for training in low precision on a CPU, where torch's flash kernel is 2 to 4 times slower than
    `attend_small` for short sequences, its backward pass above all."""
    if dropout or q.shape[-2] * k.shape[-2] > LARGEST_SCORES:
        return attend_sdpa(q, k, v, mask, dropout)
    return attend_small(q, k, v, mask)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Flex attention, in a layer that is compiled as a whole or on a CPU."""
    return flex_attention(q, k, v, block_mask=mask)


@functools.cache
def _compile_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def attend_flex_compiled(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Flex attention on a GPU in a layer that is not compiled: without the compiler it would make all the scores."""
    return _compile_flex_attention()(q, k, v, block_mask=mask)


@dataclass(frozen=True)
class Kernels:
    """What computes the layers of one pass of a stack.

    norm_and_project: linears of a normed input. activate_and_project: a linear of an activated hidden layer.
    attend_dense: attention under a Boolean mask or none. attend_blocks: attention under flex attention's mask.
    sparse_masks: whether block-causal masks are made for flex attention. fuses_norms: whether `norm_and_project` gets
    the norm, so that what is normed need not be kept.
    """

    norm_and_project: Callable[..., tuple[Tensor, ...]] = norm_and_project
    activate_and_project: Callable[..., Tensor] = activate_and_project
    attend_dense: Callable[..., Tensor] = attend_sdpa
    attend_blocks: Callable[..., Tensor] = attend_flex
    sparse_masks: bool = False
    fuses_norms: bool = False

    def split_norm(
        self, norm: nn.Module, x: Float[Tensor, "*batch width"]
    ) -> tuple[Float[Tensor, "*batch width"], nn.Module | None]:
        """What a layer is given in place of `norm(x)`: that and no norm, or x and the norm where it is fused.

        A module is an argument in the second case alone: hooks that move arguments and weights (accelerate's) would
        take it for one of theirs."""
        return (x, norm) if self.fuses_norms else (norm(x), None)

    def attend(
        self,
        q: Float[Tensor, "batch head query width"],
        k: Float[Tensor, "batch head key width"],
        v: Float[Tensor, "batch head key width"],
        mask: Bool[Tensor, "..."] | BlockMask | None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "batch head query width"]:
        """Scaled dot-product attention.

        Raises:
            UserError: dropout of the weights under flex attention, which has none.
        """
        # Without a mask, or with one that differs from row to row as the text's, flex attention has nothing to skip.
        if not isinstance(mask, BlockMask):
            return self.attend_dense(q, k, v, mask, dropout)
        if dropout:
            raise UserError(
                f"attention_dropout={dropout}: flex_attention cannot drop attention weights; "
                "set the stack's attention_dropout to 0.0 or attn_implementation to 'sdpa'"
            )
        return self.attend_blocks(q, k, v, mask)

    def prepare_mask(
        self, mask: BlockCausal | None, device: torch.device
    ) -> Bool[Tensor, "query key"] | BlockMask | None:
        """The mask in the form that `attend` takes."""
        if mask is None:
            return None
        return mask.sparse(device) if self.sparse_masks else mask.dense(device)


PLAIN = Kernels()


@functools.cache
def _make_kernels(implementation: str, saves_memory: bool, on_cpu: bool, compiles_flex: bool) -> Kernels:
    dense = attend_eager if implementation == "eager" else attend_sdpa
    if implementation == "sdpa" and saves_memory and on_cpu:
        dense = attend_on_processor
    return Kernels(
        norm_and_project_recomputing if saves_memory else norm_and_project,
        activate_and_project_recomputing if saves_memory else activate_and_project,
        dense,
        attend_flex_compiled if compiles_flex else attend_flex,
        implementation == "flex_attention",
        saves_memory,
    )


def _is_hooked(layers: nn.ModuleList) -> bool:
    """Whether anything is to be called before, after or in place of the forward of a module inside the layers."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    for layer in layers:
        for module in layer.modules():
            if module is layer:  # whose hooks work in any case
                continue
            has_hooks = module._forward_hooks or module._forward_pre_hooks
            if has_hooks or module._backward_hooks or module._backward_pre_hooks:
                return True
            if "forward" in module.__dict__ and not isinstance(module.forward, Recomputed):
                return True
    return False


def choose_kernels(x: Tensor, layers: nn.ModuleList) -> Kernels:
    """The kernels for one pass of `x` through the layers of a stack, which all have the same attention."""
    is_compiled = torch.compiler.is_compiling() or _is_compiled(layers[0])
    saves_memory = (
        x.dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and not is_compiled
        and not getattr(layers[0], "keeps_activations", False)
        and not torch.is_autocast_enabled(x.device.type)
        and not _is_hooked(layers)
    )
    return _make_kernels(
        layers[0].attention.implementation, saves_memory, x.device.type == "cpu", x.is_cuda and not is_compiled
    )


@contextlib.contextmanager
def load_offloaded_weights(module: nn.Module) -> Iterator[None]:
    """A context in which a module's weights are in memory for use outside its own forward, where accelerate (1.x)
    keeps them on disk or elsewhere between its calls."""
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, None)


def hold_weights(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`load_offloaded_weights` of a module that is offloaded; any other has its weights in memory."""
    return contextlib.nullcontext() if getattr(module, "_hf_hook", None) is None else load_offloaded_weights(module)


def disable_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def call_and_recompute(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """What `function` returns; its activations are dropped and computed again in the backward pass."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


class Recomputed:
    """Takes the place of the `forward` of a module: in training its activations are dropped and computed again."""

    def __init__(self, module: nn.Module, checkpoint_function: Callable[..., Any]):
        self.module, self.checkpoint_function = module, checkpoint_function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = partial(type(self.module).forward, self.module, **kwargs)
        # Computed twice, a layer would write to its cache twice.
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return forward(*args) if cached or not self.module.training else self.checkpoint_function(forward, *args)


def recompute_activations(
    model: nn.Module, what: str, checkpoint_function: Callable[..., Any] = call_and_recompute, every: int = 1
) -> None:
    """Makes the backward pass compute every `every`-th module of the kind `what` again, and no other.

    checkpoint_function: called as `checkpoint_function(forward, *arguments)` in place of `forward(*arguments)`

    Raises:
        UserError: `what` is none of `RECOMPUTE`.
    """
    if what not in RECOMPUTE:
        raise UserError(f"recompute={what!r}: choose one of {', '.join(RECOMPUTE)}")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Recomputed):
            # transformers looks at the flag to tell whether a model is checkpointed.
            del module.forward, module.gradient_checkpointing
    wanted = [module for module in model.modules() if _find_recomputed_kind(module) == what]
    for module in wanted[::every]:
        module.forward, module.gradient_checkpointing = Recomputed(module, checkpoint_function), True


def _find_recomputed_kind(module: nn.Module) -> str | None:
    """The kind of `RECOMPUTE` that a module belongs to, which its class names."""
    return getattr(type(module), "recomputed_as", None)


def find_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Every Transformer layer of a model: what is compiled, recomputed or sharded as one piece."""
    return (module for module in model.modules() if _find_recomputed_kind(module) == "block")


def compile_layers(model: nn.Module, backend: str = "inductor", forward_only: bool = False) -> None:
    """Compiles every layer in place, without graph breaks; names in the state dict stay.

    forward_only: leave the layers' hooks out of it, as FSDP's, which gather the weights, cannot be compiled.
    """
    # To the compiler the layers of all stacks are one function with as many variants as there are shapes, widths and
    # places in a cache: more than the eight it allows.
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    for layer in find_layers(model):
        if forward_only:
            layer.forward = torch.compile(layer.forward, backend=backend)
        else:
            layer.compile(fullgraph=True, backend=backend)


def keep_activations(model: nn.Module) -> None:
    """Gives every layer the plain kernels in training too, those that a compiled layer is made of."""
    for layer in find_layers(model):
        layer.keeps_activations = True


def _is_compiled(layer: nn.Module) -> bool:
    """Whether `compile_layers`, or `compile` of torch itself, was called on a layer."""
    return layer._compiled_call_impl is not None or hasattr(layer.forward, "_torchdynamo_orig_callable")
