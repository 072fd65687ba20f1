"""The one Transformer everything is made of: attention, feed-forward, block, stack, and block-causal masks."""

import math
from functools import partial

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.parts import StackConfig


def sinusoid(positions: Real[Tensor, "*shape"], width: int, tau: float = 10_000.0) -> Float[Tensor, "*shape width"]:
    """Fixed sin/cos code of scalar positions; `width` is even."""
    frequencies = tau ** -(torch.arange(width // 2, device=positions.device, dtype=torch.float32) / (width // 2))
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def block_causal_mask(chunks: int, tokens: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """True where a query may look: at every token of its own chunk and of earlier chunks."""
    chunk = torch.arange(chunks * tokens, device=device) // tokens
    return chunk[:, None] >= chunk[None, :]


def attend(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch head key width"],
    v: Float[Tensor, "batch head key width"],
    mask: Bool[Tensor, "..."] | None,
    dropout: float,
    with_weights: bool,
) -> tuple[
    Float[Tensor, "batch head query width"],
    Float[Tensor, "batch head query key"] | None,
]:
    """Scaled dot-product attention; the weights are only materialised when they are asked for."""
    if not with_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout) @ v, weights


class Attention(nn.Module):
    """Multi-head attention of queries made of `x` over keys and values made of a context of the same width."""

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.heads, self.dropout = stack.heads, stack.dropout
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

    def forward(
        self,
        x: Float[Tensor, "batch query width"],
        keys_values: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "..."] | None = None,
        with_weights: bool = False,
    ) -> tuple[Float[Tensor, "batch query width"], Float[Tensor, "batch head query key"] | None]:
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self.split(self.query(x)), *keys_values, mask, dropout, with_weights)
        return self.output(mixed.transpose(1, 2).flatten(2)), weights


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class FeedForward(nn.Module):
    """Two linears, a GELU (or the stack's own activation) between them; `gated` multiplies the hidden layer by a linear
    gate (GEGLU)."""

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.gated, self.activation = stack.gated, ACTIVATIONS[stack.activation]
        self.hidden = nn.Linear(stack.width, stack.hidden * (2 if stack.gated else 1), bias=stack.bias)
        self.output = nn.Linear(stack.hidden, stack.width, bias=stack.bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        hidden = self.hidden(x)
        if self.gated:
            hidden, gate = hidden.chunk(2, dim=-1)
            return self.output(self.activation(hidden) * gate)
        return self.output(self.activation(hidden))


class Block(nn.Module):
    """Pre-LN self-attention and feed-forward, each added to the residual stream."""

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.attention = Attention(stack)
        self.feed_forward_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.feed_forward = FeedForward(stack)
        self.dropout = nn.Dropout(stack.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch token width"],
        mask: Bool[Tensor, "..."] | None = None,
        queries: Tensor | None = None,
    ) -> Float[Tensor, "batch query width"]:
        """`queries` names the positions whose outputs are wanted; the others are only looked at."""
        normed = self.attention_norm(x)
        keys_values = self.attention.keys_values(normed)
        if queries is not None:
            x, normed = x[:, queries], normed[:, queries]
            mask = mask[..., queries, :] if mask is not None else None
        mixed, _ = self.attention(normed, keys_values, mask)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(stack) for _ in range(stack.depth))
        self.norm = nn.LayerNorm(stack.width, stack.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "batch token width"],
        mask: Bool[Tensor, "..."] | None = None,
        queries: Tensor | None = None,
    ) -> Float[Tensor, "batch query width"]:
        """The last block only computes the outputs at `queries`, since nothing reads the others."""
        *first, last = self.blocks
        for block in first:
            x = block(x, mask)
        return self.norm(last(x, mask, queries))
