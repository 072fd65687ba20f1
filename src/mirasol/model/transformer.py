"""The one Transformer everything is made of: attention, feed-forward, block and stack.

The paper's supplement (section 4, "Model Details") gives the sizes of the stacks and no more. Pre-LN and GELU are
those of ViT, which the chunk encoder follows. Gated feed-forwards are read out of the parameter counts: 8 layers of
width 1024 and hidden width 4096 have the supplement's 128M weights (128 x 2^20) with a gate and without biases.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from mirasol.config.parts import StackConfig
from mirasol.model.cache import KeyValueCache
from mirasol.model.kernels import PLAIN, Kernels, attend_eagerly, choose_kernels
from mirasol.model.masks import BlockCausal


def sinusoid(positions: Real[Tensor, "*shape"], width: int, tau: float = 10_000.0) -> Float[Tensor, "*shape width"]:
    """Fixed sin/cos code of scalar positions; `width` is even."""
    # The code of the original Transformer, with all sines before all cosines.
    frequencies = tau ** -(torch.arange(width // 2, device=positions.device, dtype=torch.float32) / (width // 2))
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of queries made of `x` over keys and values made of a context of the same width.

    implementation: one of `mirasol.model.kernels.ATTENTION`; `set_attn_implementation` sets it in the whole model, and
        each pass of a stack chooses its kernels by it
    """

    implementation = "sdpa"

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.heads = stack.heads
        self.dropout = stack.attention_rate
        # heads x head_width may differ from the width: the Token Turing Machine has 12 heads of 64 at width 1024.
        inner = stack.heads * stack.head_width
        self.query = nn.Linear(stack.width, inner, bias=stack.bias)
        # Keys and values in one matrix product, since they always have the same input.
        self.key_value = nn.Linear(stack.width, 2 * inner, bias=stack.bias)
        self.output = nn.Linear(inner, stack.width, bias=stack.bias)

    def split(self, x: Float[Tensor, "batch token inner"]) -> Float[Tensor, "batch head token width"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context: Float[Tensor, "batch key width"]) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, each [batch, head, key, head width]; a cache keeps these."""
        keys, values = self.key_value(context).chunk(2, dim=-1)
        return self.split(keys), self.split(values)

    def project(
        self,
        x: Float[Tensor, "batch query width"],
        norm: nn.Module | None = None,
        context: Float[Tensor, "batch key width"] | None = None,
        kernels: Kernels = PLAIN,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Queries of x, and keys and values of the context (x by default), for `attend`; both are normed first."""
        if context is None:
            queries, key_value = kernels.norm_and_project(x, norm, self.query, self.key_value)
        else:
            (key_value,) = kernels.norm_and_project(context, norm, self.key_value)
            (queries,) = kernels.norm_and_project(x, norm, self.query)
        keys, values = key_value.chunk(2, dim=-1)
        return self.split(queries), (self.split(keys), self.split(values))

    def attend(
        self,
        queries: Float[Tensor, "batch head query head_width"],
        keys_values: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "..."] | BlockMask | None = None,
        with_weights: bool = False,
        kernels: Kernels = PLAIN,
    ) -> tuple[Float[Tensor, "batch query width"], Float[Tensor, "batch head query key"] | None]:
        """The output for projected queries, keys and values, and on request the weights, which are then computed
        eagerly whatever the implementation."""
        # The functional kernels do not know the training mode.
        dropout = self.dropout if self.training else 0.0
        if with_weights:
            mixed, weights = attend_eagerly(queries, *keys_values, mask, dropout)
        else:
            mixed, weights = kernels.attend(queries, *keys_values, mask, dropout), None
        return self.output(mixed.transpose(1, 2).flatten(2)), weights

    def forward(
        self,
        x: Float[Tensor, "batch query width"],
        context: Float[Tensor, "batch key width"] | None = None,
        mask: Bool[Tensor, "..."] | BlockMask | None = None,
        with_weights: bool = False,
        kernels: Kernels = PLAIN,
        norm: nn.Module | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        index: int = 0,
    ) -> tuple[Float[Tensor, "batch query width"], Float[Tensor, "batch head query key"] | None]:
        """Attention of x over the context (x by default), or over given `keys_values`. The inputs are normed, unless
        `kernels` have the norm computed here (`Kernels.split_norm`). cache: where keys and values of layer `index` are
        added to the earlier ones."""
        if keys_values is None:
            queries, keys_values = self.project(x, norm, context, kernels)
        else:
            queries = self.split(self.query(x))
        if cache is not None:
            keys_values = cache.update(*keys_values, index)
            # A static cache has slots that are not written yet: they are masked.
            mask = F.pad(mask, (0, keys_values[0].shape[2] - mask.shape[-1]))
        return self.attend(queries, keys_values, mask, with_weights, kernels)


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """CLIP's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


class FeedForward(nn.Module):
    """Two linears and an activation between them; `gated` multiplies the hidden layer by a linear gate (GEGLU)."""

    recomputed_as = "hidden"

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.gated, self.activation = stack.gated, ACTIVATIONS[stack.activation]
        # A gated hidden layer is computed together with its gate, hidden features first.
        self.hidden = nn.Linear(stack.width, stack.hidden * (2 if stack.gated else 1), bias=stack.bias)
        self.output = nn.Linear(stack.hidden, stack.width, bias=stack.bias)

    def activate(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch _"]:
        if not self.gated:
            return self.activation(hidden)
        hidden, gate = hidden.chunk(2, dim=-1)
        return self.activation(hidden) * gate

    def forward(
        self, x: Float[Tensor, "*batch width"], norm: nn.Module | None = None, kernels: Kernels = PLAIN
    ) -> Float[Tensor, "*batch width"]:
        """The feed-forward of x, which is normed, unless `kernels` have the norm computed here."""
        (hidden,) = kernels.norm_and_project(x, norm, self.hidden)
        return kernels.activate_and_project(hidden, self.activate, self.output)


# SplitMix64 (Steele et al., 2014): the constants as signed 64-bit numbers.
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def draw_from_seeds(seeds: Int[Tensor, " row"], count: int) -> Float[Tensor, "row count"]:
    """Uniform numbers in [0, 1), each a hash of its row's seed and its place alone."""
    bits = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * _GOLDEN
    # Shifts of signed numbers keep the sign: it is masked away.
    bits = (bits ^ (bits >> 30 & 2**34 - 1)) * _FIRST
    bits = (bits ^ (bits >> 27 & 2**37 - 1)) * _SECOND
    bits = bits ^ (bits >> 31 & 2**33 - 1)
    return (bits >> 40 & 2**24 - 1).float() * 2.0**-24


class RowNoise(nn.Module):
    """Uniform random numbers for the rows of a batch: from PyTorch's generator, or from each clip's own seed, so that a
    clip gets the same ones in whatever part of a batch it is computed.

    seeds: of the clips of the batch at hand, int64 [clip]; None draws from PyTorch's generator. Rows are in the order
        of the clips, as many for each.
    """

    seeds: Int[Tensor, " clip"] | None = None

    def forward(self, rows: int, each: int, device: torch.device) -> Float[Tensor, "row each"]:
        """As `draw`."""
        return self.draw(rows, each, device)

    def draw(self, rows: int, each: int, device: torch.device) -> Float[Tensor, "row each"]:
        """`each` numbers for every row; other ones each time, until there are new seeds."""
        if self.seeds is None:
            return torch.rand(rows, each, device=device)
        clips = len(self.seeds)
        assert rows % clips == 0
        numbers = draw_from_seeds(self.seeds, rows // clips * each)
        self.seeds = self.seeds + 1  # the ViT draws for pictures, then for sound
        return numbers.reshape(rows, each)


class LayerDrop(RowNoise):
    """Stochastic depth (Huang et al., 2016): in training, which sequences skip which residual branches.

    The rate grows linearly with depth, from rate/n at the first of n blocks to `rate` at the last, because all later
    blocks build on early features. Branches that are kept are scaled by 1/(1 - rate of its block), so that their
    expectation does not change and nothing is scaled outside training. Skipped branches are computed all the same:
    every weight always has a gradient, and every process of a run takes the same path.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def forward(
        self, x: Float[Tensor, "batch token width"], blocks: int, branches: int
    ) -> Sequence[Float[Tensor, "branch batch 1 1"] | None]:
        """The factors of each block's branches; None where nothing is skipped."""
        if not self.training or not self.rate:
            return [None] * blocks
        rates = self.rate * torch.arange(1, blocks + 1, device=x.device) / blocks
        rates = rates[:, None, None, None, None]
        # Drawn here for all blocks at once, so that a compiled layer draws nothing and one graph serves all rates.
        drawn = self.draw(x.shape[0], blocks * branches, x.device).T.unflatten(0, (blocks, branches))
        kept = drawn[..., None, None] >= rates
        return (kept / (1 - rates)).to(x.dtype).unbind()


def add_branch(
    x: Float[Tensor, "batch token width"],
    branch: Float[Tensor, "batch token width"],
    factors: Float[Tensor, "branch batch 1 1"] | None,
    index: int,
) -> Float[Tensor, "batch token width"]:
    """The residual stream plus one branch, times its factor if `LayerDrop` gave any."""
    return x + branch if factors is None else x + branch * factors[index]


class Block(nn.Module):
    """Pre-LN self-attention and feed-forward, each added to the residual stream."""

    branches = 2
    recomputed_as = "block"

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
        factors: Float[Tensor, "branch batch 1 1"] | None = None,
        kernels: Kernels = PLAIN,
    ) -> Float[Tensor, "batch query width"]:
        """The outputs of x, which attends to `context` (by default to itself). `factors`: see `LayerDrop`."""
        if context is not None:
            context, _ = kernels.split_norm(self.attention_norm, context)
        given, norm = kernels.split_norm(self.attention_norm, x)
        mixed, _ = self.attention(given, context, mask, kernels=kernels, norm=norm)
        x = add_branch(x, self.dropout(mixed), factors, 0)
        branch = self.feed_forward(*kernels.split_norm(self.feed_forward_norm, x), kernels)
        return add_branch(x, self.dropout(branch), factors, 1)

    def step(
        self, x: Float[Tensor, "batch token width"], cache: KeyValueCache, last: int, kernels: Kernels = PLAIN
    ) -> Float[Tensor, "batch query width"]:
        """The same for one more chunk, which attends to those in the cache: the outputs of its `last` tokens."""
        # Earlier chunks do not attend to this one, so that their keys and values in the cache never change.
        normed = self.attention_norm(x)
        keys_values = cache.append(self.attention.keys_values(normed))
        mixed, _ = self.attention(normed[:, -last:], kernels=kernels, keys_values=keys_values)
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
        """The outputs of all tokens, or of the `last` tokens of each chunk (without a mask the sequence is one chunk);
        the last block then computes no others, since nothing reads them."""
        # The Combiner keeps m of hundreds of outputs per chunk: the last of its 8 blocks would waste most of its work.
        *first, final = self.blocks
        *first_factors, factors = self.layer_drop(x, len(self.blocks), Block.branches)
        kernels = choose_kernels(x, self.blocks)
        visible = kernels.prepare_mask(mask, x.device)
        for block, block_factors in zip(first, first_factors, strict=True):
            x = block(x, visible, factors=block_factors, kernels=kernels)
        if last is None:
            return self.norm(final(x, visible, factors=factors, kernels=kernels))
        wanted = x.unflatten(1, (1 if mask is None else mask.chunks, -1))[:, :, -last:].flatten(1, 2)
        visible = kernels.prepare_mask(mask and mask.for_last(last), x.device)
        return self.norm(final(wanted, visible, x, factors, kernels))

    def step(
        self, x: Float[Tensor, "batch token width"], caches: list[KeyValueCache], last: int
    ) -> Float[Tensor, "batch query width"]:
        """One more chunk of a stream, in evaluation mode: the outputs of its `last` tokens."""
        kernels = choose_kernels(x, self.blocks)
        for block, cache in zip(self.blocks[:-1], caches[:-1], strict=True):
            x = block.step(x, cache, x.shape[1], kernels)
        return self.norm(self.blocks[-1].step(x, caches[-1], last, kernels))


def set_dropout_rates(part: nn.Module, stack: StackConfig) -> None:
    """Sets the rates of every dropout and layer drop in `part` to those of `stack`."""
    for module in part.modules():
        if isinstance(module, nn.Dropout):
            module.p = stack.dropout
        elif isinstance(module, Attention):
            module.dropout = stack.attention_rate
        elif isinstance(module, LayerDrop):
            module.rate = stack.layer_drop
