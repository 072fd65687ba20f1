"""The one Transformer everything is made of: attention, feed-forward, block and stack."""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mirasol.config.parts import StackConfig
from mirasol.errors import UserError
from mirasol.model.cache import KeyValueCache
from mirasol.model.masks import BlockCausal
from mirasol.model.recompute import (
    activated_linear,
    keeps_less,
    normed_linears,
    small_attention,
    suits_small_attention,
)

# What `attn_implementation` may be.
ATTENTION = ("eager", "sdpa", "flex_attention")


def sinusoid(positions: Real[Tensor, "*shape"], width: int, tau: float = 10_000.0) -> Float[Tensor, "*shape width"]:
    """Fixed sin/cos code of scalar positions; `width` is even."""
    frequencies = tau ** -(torch.arange(width // 2, device=positions.device, dtype=torch.float32) / (width // 2))
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@functools.cache
def _fused_flex_attention() -> Callable:
    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    # On its own flex attention makes the whole score matrix, unless it is compiled; in a compiled block it is already.
    if q.is_cuda and not torch.compiler.is_compiling():
        return _fused_flex_attention()(q, k, v, block_mask=mask)
    return flex_attention(q, k, v, block_mask=mask)


def attend(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch head key width"],
    v: Float[Tensor, "batch head key width"],
    mask: Bool[Tensor, "..."] | BlockMask | None,
    dropout: float,
    implementation: str = "sdpa",
    with_weights: bool = False,
) -> tuple[
    Float[Tensor, "batch head query width"],
    Float[Tensor, "batch head query key"] | None,
]:
    """Scaled dot-product attention by one of `ATTENTION`. The weights are only there when they are asked for, and
    then they are computed eagerly whatever the implementation.

    Raises:
        UserError: dropout of the weights under flex attention, which has none.
    """
    if isinstance(mask, BlockMask) and not with_weights:
        if dropout:
            raise UserError(
                f"attention_dropout={dropout}: flex_attention cannot drop attention weights; "
                "set the stack's attention_dropout to 0.0 or attn_implementation to 'sdpa'"
            )
        return _flex(q, k, v, mask), None
    # Without a mask, or with one that differs from row to row as the text's, flex attention has nothing to skip.
    if implementation != "eager" and not with_weights:
        if implementation == "sdpa" and suits_small_attention(q, k, dropout):
            return small_attention(q, k, v, mask), None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        # A row that may look nowhere weighs nothing, as in the other implementations.
        weights = weights.masked_fill(~mask, 0.0)
    return F.dropout(weights, dropout) @ v, weights if with_weights else None


class Attention(nn.Module):
    """Multi-head attention of queries made of `x` over keys and values made of a context of the same width.

    implementation: one of `ATTENTION`; the whole model sets it in all its parts (`set_attn_implementation`)
    """

    implementation = "sdpa"

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.heads = stack.heads
        self.dropout = stack.attention_rate
        inner = stack.heads * stack.head_width
        self.query = nn.Linear(stack.width, inner, bias=stack.bias)
        self.key_value = nn.Linear(stack.width, 2 * inner, bias=stack.bias)
        self.output = nn.Linear(inner, stack.width, bias=stack.bias)

    def split(self, x: Float[Tensor, "batch token inner"]) -> Float[Tensor, "batch head token width"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context: Float[Tensor, "batch key width"]) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, each [batch, head, key, head width]; a cache keeps these."""
        keys, values = self.key_value(context).chunk(2, dim=-1)
        return self.split(keys), self.split(values)

    def projections(
        self,
        x: Float[Tensor, "batch query width"],
        norm: nn.LayerNorm,
        context: Float[Tensor, "batch key width"] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Queries of `norm(x)`, and keys and values of the normed context, which is x unless it is given: for `mix`."""
        if not keeps_less(x, self.query, self.key_value):
            normed = norm(x)
            keys_values = self.keys_values(normed if context is None else norm(context))
            return self.split(self.query(normed)), keys_values
        if context is None:
            queries, key_value = normed_linears(x, norm, self.query, self.key_value)
        else:
            (queries,) = normed_linears(x, norm, self.query)
            (key_value,) = normed_linears(context, norm, self.key_value)
        keys, values = key_value.chunk(2, dim=-1)
        return self.split(queries), (self.split(keys), self.split(values))

    def mix(
        self,
        queries: Float[Tensor, "batch head query head_width"],
        keys_values: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "..."] | BlockMask | None = None,
        with_weights: bool = False,
    ) -> tuple[Float[Tensor, "batch query width"], Float[Tensor, "batch head query key"] | None]:
        """The output for queries that are projected and split already."""
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(queries, *keys_values, mask, dropout, self.implementation, with_weights)
        return self.output(mixed.transpose(1, 2).flatten(2)), weights

    def forward(
        self,
        x: Float[Tensor, "batch query width"],
        keys_values: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "..."] | BlockMask | None = None,
        with_weights: bool = False,
    ) -> tuple[Float[Tensor, "batch query width"], Float[Tensor, "batch head query key"] | None]:
        return self.mix(self.split(self.query(x)), keys_values, mask, with_weights)


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """CLIP's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


class FeedForward(nn.Module):
    """Two linears, a GELU (or the stack's own activation) between them; `gated` multiplies the hidden layer by a linear
    gate (GEGLU)."""

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.gated, self.activation = stack.gated, ACTIVATIONS[stack.activation]
        self.hidden = nn.Linear(stack.width, stack.hidden * (2 if stack.gated else 1), bias=stack.bias)
        self.output = nn.Linear(stack.hidden, stack.width, bias=stack.bias)

    def activate(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch _"]:
        if not self.gated:
            return self.activation(hidden)
        hidden, gate = hidden.chunk(2, dim=-1)
        return self.activation(hidden) * gate

    def forward(
        self, x: Float[Tensor, "*batch width"], norm: nn.LayerNorm | None = None
    ) -> Float[Tensor, "*batch width"]:
        """The feed-forward of x, or of `norm(x)`: given the norm, a step in bfloat16 need not keep its output."""
        if norm is not None and keeps_less(x, self.hidden, self.output):
            (hidden,) = normed_linears(x, norm, self.hidden)
            return activated_linear(hidden, self.activate, self.output)
        return self.output(self.activate(self.hidden(x if norm is None else norm(x))))


class LayerDrop(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, which sequences pass over which residual branches.

    The rate grows linearly with depth, from rate/n at the first of n blocks to `rate` at the last, for early features
    are what all later blocks build on. What is kept is scaled by 1/(1 - rate of its block): the expectation stays, and
    outside training nothing has to be scaled. The branches are computed all the same, so that every weight always has
    a gradient and no process of a run takes another path than the rest.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def forward(
        self, x: Float[Tensor, "batch token width"], blocks: int, branches: int
    ) -> Sequence[Float[Tensor, "branch batch 1 1"] | None]:
        """For each block what its branches are multiplied by; None where nothing is ever passed over."""
        if not self.training or not self.rate:
            return [None] * blocks
        rates = self.rate * torch.arange(1, blocks + 1, device=x.device) / blocks
        rates = rates[:, None, None, None, None]
        kept = torch.rand(blocks, branches, x.shape[0], 1, 1, device=x.device) >= rates
        return (kept / (1 - rates)).to(x.dtype).unbind()


def added(
    x: Float[Tensor, "batch token width"],
    branch: Float[Tensor, "batch token width"],
    kept: Float[Tensor, "branch batch 1 1"] | None,
    index: int,
) -> Float[Tensor, "batch token width"]:
    """The residual stream with a branch added, as often as `LayerDrop` keeps this branch."""
    return x + branch if kept is None else x + branch * kept[index]


class Block(nn.Module):
    """Pre-LN self-attention and feed-forward, each added to the residual stream."""

    branches = 2

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.attention = Attention(stack)
        self.feed_forward_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.feed_forward = FeedForward(stack)
        self.dropout = nn.Dropout(stack.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch query width"],
        mask: Bool[Tensor, "..."] | BlockMask | None = None,
        context: Float[Tensor, "batch key width"] | None = None,
        kept: Float[Tensor, "branch batch 1 1"] | None = None,
    ) -> Float[Tensor, "batch query width"]:
        """The tokens whose outputs are wanted look at the context: at themselves unless it is given. `kept` is what
        `LayerDrop` gives for this block."""
        queries, keys_values = self.attention.projections(x, self.attention_norm, context)
        mixed, _ = self.attention.mix(queries, keys_values, mask)
        x = added(x, self.dropout(mixed), kept, 0)
        return added(x, self.dropout(self.feed_forward(x, self.feed_forward_norm)), kept, 1)

    def step(
        self, x: Float[Tensor, "batch token width"], cache: KeyValueCache, last: int
    ) -> Float[Tensor, "batch query width"]:
        """The same of one more chunk, which sees those in the cache: the outputs of its `last` tokens."""
        normed = self.attention_norm(x)
        keys_values = cache.append(self.attention.keys_values(normed))
        mixed, _ = self.attention(normed[:, -last:], keys_values)
        x = x[:, -last:] + mixed
        return x + self.feed_forward(self.feed_forward_norm(x))


class Stack(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(stack) for _ in range(stack.depth))
        self.layer_drop = LayerDrop(stack.layer_drop)
        self.norm = nn.LayerNorm(stack.width, stack.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "batch token width"],
        mask: BlockCausal | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "batch query width"]:
        """Every token's output, or those of the `last` tokens of each chunk (without a mask the sequence is one
        chunk). The last block then computes no others, since nothing reads them."""
        *first, final = self.blocks
        *kept_first, kept = self.layer_drop(x, len(self.blocks), Block.branches)
        visible = form_of_mask(mask, final.attention.implementation, x.device)
        for block, kept_of_block in zip(first, kept_first, strict=True):
            x = block(x, visible, kept=kept_of_block)
        if last is None:
            return self.norm(final(x, visible, kept=kept))
        wanted = x.unflatten(1, (1 if mask is None else mask.chunks, -1))[:, :, -last:].flatten(1, 2)
        visible = form_of_mask(mask and mask.for_last(last), final.attention.implementation, x.device)
        return self.norm(final(wanted, visible, x, kept))

    def step(
        self, x: Float[Tensor, "batch token width"], caches: list[KeyValueCache], last: int
    ) -> Float[Tensor, "batch query width"]:
        """One more chunk of a stream, not in training: the outputs of its `last` tokens."""
        for block, cache in zip(self.blocks[:-1], caches[:-1], strict=True):
            x = block.step(x, cache, x.shape[1])
        return self.norm(self.blocks[-1].step(x, caches[-1], last))


def form_of_mask(
    mask: BlockCausal | None, implementation: str, device: torch.device
) -> Bool[Tensor, "query key"] | BlockMask | None:
    """The mask as the implementation of attention takes it."""
    if mask is None:
        return None
    return mask.sparse(device) if implementation == "flex_attention" else mask.dense(device)
