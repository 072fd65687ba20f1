"""The text decoder: causal self-attention over prompt and target, cross-attention to the latents.

The paper takes it from MaMMUT (arXiv 2303.16839; supplement, section 4, "Model Pretraining"): one decoder with two
passes, a generative one that cross-attends and a contrastive one (`read`) that does not.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.model.kernels import PLAIN, Kernels, choose_kernels, hold_weights
from mirasol.model.transformer import Attention, FeedForward, LayerDrop, add_branch, sinusoid


class TextLayers(NamedTuple):
    """Intermediate results of the text decoder's layers; empty unless requested.

    hidden_states: the embedded tokens and each layer's output, the last one after the final norm, [row, token, width]
    attentions: weights of the self-attention of each layer, [row, head, token, key]
    cross_attentions: weights of each cross-attention layer, [row, head, token, latent]
    """

    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    cross_attentions: tuple[Tensor, ...] = ()


class TextBlock(nn.Module):
    """Causal self-attention and feed-forward, then cross-attention to the latents where the layer has it."""

    branches = 4
    recomputed_as = "block"

    def __init__(self, config: MirasolConfig, index: int):
        super().__init__()
        stack = config.text.stack
        self.index = index
        self.attention_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.attention = Attention(stack)
        self.feed_forward_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.feed_forward = FeedForward(stack)
        self.dropout = nn.Dropout(stack.dropout)
        # MaMMUT's cross-attention is a block of its own after every n-th layer, not a part of each layer.
        self.cross_attention = self.cross_feed_forward = self.cross_latent_norm = None
        if index in config.text.cross_attention_layers:
            self.cross_attention_norm = nn.LayerNorm(stack.width, stack.norm_eps)
            if config.text.cross_attention_latent_norm:
                self.cross_latent_norm = nn.LayerNorm(stack.width, stack.norm_eps)
            self.cross_attention = Attention(stack)
            if config.text.cross_attention_ffn:
                self.cross_feed_forward_norm = nn.LayerNorm(stack.width, stack.norm_eps)
                self.cross_feed_forward = FeedForward(stack)

    def forward(
        self,
        x: Float[Tensor, "row token width"],
        mask: Bool[Tensor, "row 1 token key"],
        latents: Float[Tensor, "clip latent latent_width"] | None,
        latent_mask: Bool[Tensor, "clip latent"] | None,
        cache: EncoderDecoderCache | None,
        with_weights: bool,
        factors: Float[Tensor, "branch row 1 1"] | None = None,
        kernels: Kernels = PLAIN,
    ) -> tuple[
        Float[Tensor, "row token width"],
        Float[Tensor, "row head token key"] | None,
        Float[Tensor, "row head token latent"] | None,
    ]:
        """Output, and on request the weights of self- and cross-attention. Without latents the cross-attention block is
        skipped, its feed-forward too. `factors`: see `LayerDrop`."""
        given, norm = kernels.split_norm(self.attention_norm, x)
        earlier = None if cache is None else cache.self_attention_cache
        mixed, own_weights = self.attention(given, None, mask, with_weights, kernels, norm, None, earlier, self.index)
        x = add_branch(x, self.dropout(mixed), factors, 0)
        branch = self.feed_forward(*kernels.split_norm(self.feed_forward_norm, x), kernels)
        x = add_branch(x, self.dropout(branch), factors, 1)
        if self.cross_attention is None or latents is None:
            return x, own_weights, None
        mixed, weights = self._attend_to_latents(x, latents, latent_mask, cache, with_weights, kernels)
        x = add_branch(x, self.dropout(mixed), factors, 2)
        if self.cross_feed_forward is not None:
            branch = self.cross_feed_forward(*kernels.split_norm(self.cross_feed_forward_norm, x), kernels)
            x = add_branch(x, self.dropout(branch), factors, 3)
        return x, own_weights, weights

    def _attend_to_latents(
        self,
        x: Float[Tensor, "row token width"],
        latents: Float[Tensor, "clip latent latent_width"],
        latent_mask: Bool[Tensor, "clip latent"],
        cache: EncoderDecoderCache | None,
        with_weights: bool,
        kernels: Kernels,
    ) -> tuple[Float[Tensor, "row token width"], Float[Tensor, "row head token latent"] | None]:
        """Cross-attention. The rows of one clip share its keys and values: they are computed once per clip."""
        rows, clips = x.shape[0], latents.shape[0]
        if cache is not None and cache.is_updated.get(self.index):
            layer = cache.cross_attention_cache.layers[self.index]
            keys_values = layer.keys, layer.values
        else:
            normed = latents if self.cross_latent_norm is None else self.cross_latent_norm(latents)
            keys_values = self.cross_attention.keys_values(normed)
            if cache is not None:
                keys_values = cache.cross_attention_cache.update(*keys_values, self.index)
                cache.is_updated[self.index] = True
        if with_weights:
            # Each row on its own, so that the weights returned are the ones used, and have gradients.
            keys, values = (part.repeat_interleave(rows // clips, dim=0) for part in keys_values)
            keys_values, latent_mask = (keys, values), latent_mask.repeat_interleave(rows // clips, dim=0)
            clips = rows
        # [rows, L] → [clips, rows/clips · L]: cross-attention has no order of queries, so rows can form one sequence.
        queries = self.cross_attention_norm(x).reshape(clips, -1, x.shape[-1])
        visible = latent_mask[:, None, None, :]
        mixed, weights = self.cross_attention(queries, None, visible, with_weights, kernels, keys_values=keys_values)
        return mixed.reshape(x.shape), weights


class TextDecoder(nn.Module):
    """Embeds tokens and runs the blocks. Input and output embeddings are tied unless `text.tied` is False."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width, latent_width = config.text.stack.width, config.latent.stack.width
        self.embedding = nn.Embedding(config.text.vocab_size, width)
        # As in the original Transformer: embeddings of std width^-0.5 suit the output, but next to a code of rms 0.71
        # words at one place would enter the first layer alike.
        self.scale = width**0.5 if config.text.scale_embedding else 1.0
        # 1024 → 1536 in the 3B model: once here, since the cross-attentions work at the decoder's width.
        self.latent_input = nn.Identity() if latent_width == width else nn.Linear(latent_width, width)
        self.blocks = nn.ModuleList(TextBlock(config, index) for index in range(config.text.stack.depth))
        self.layer_drop = LayerDrop(config.text.stack.layer_drop)
        self.norm = nn.LayerNorm(width, config.text.stack.norm_eps)
        learned = config.text.learned_positions
        self.position = nn.Parameter(torch.empty(config.text.max_length, width)) if learned else None
        self.output = None if config.text.tied else nn.Linear(width, config.text.vocab_size, bias=False)

    def forward(
        self,
        ids: Int[Tensor, "row token"] | None,
        attention_mask: Int[Tensor, "row key"] | Bool[Tensor, "..."] | None,
        latents: Float[Tensor, "clip latent latent_width"] | None,
        latent_mask: Bool[Tensor, "clip latent"] | None,
        cache: EncoderDecoderCache | None = None,
        with_weights: bool = False,
        longest: int | None = None,
        embedded: Float[Tensor, "row token width"] | None = None,
        with_hidden_states: bool = False,
    ) -> tuple[Float[Tensor, "row token width"], TextLayers]:
        """The hidden state of every token after the last norm, and on request the layers' intermediate results.

        The tokens come as `ids`, or `embedded` as `embedding` gives them. Positions count the real tokens, so that
        padding on the left changes nothing. attention_mask: see `make_text_mask`. longest: length of the longest text
        in a row, where a 4D mask lets one row hold several. Without latents the text is read alone, under its mask
        (`read`).
        """
        if latents is None:
            return self.read(ids, attention_mask.bool()), TextLayers()
        past = int(cache.get_seq_length()) if cache is not None else 0
        # MaMMUT's generative pass.
        x = self.embedding(ids) if embedded is None else embedded
        mask, positions = make_text_mask(x, attention_mask, past)
        if cache is None or not any(cache.is_updated.values()):  # otherwise their keys are in the cache
            latents = self.latent_input(latents)
        x = self.add_positions(x, positions, longest or past + x.shape[1])
        hidden_states, attentions, cross_attentions = [x], [], []
        kernels = choose_kernels(x, self.blocks)
        factors = self.layer_drop(x, len(self.blocks), TextBlock.branches)
        for block, block_factors in zip(self.blocks, factors, strict=True):
            x, own_weights, weights = block(x, mask, latents, latent_mask, cache, with_weights, block_factors, kernels)
            if with_weights:
                attentions.append(own_weights)
                cross_attentions += [] if weights is None else [weights]
            if with_hidden_states:
                hidden_states.append(x)
        x = self.norm(x)
        states = (*hidden_states[:-1], x) if with_hidden_states else ()
        return x, TextLayers(states, tuple(attentions), tuple(cross_attentions))

    def read(
        self, ids: Int[Tensor, "row token"], is_real: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        """MaMMUT's contrastive pass: the same weights over the text alone, without cross-attention and without a causal
        mask, so that each token attends to all real ones. Padding may be on either side."""
        positions = (is_real.long().cumsum(dim=1) - 1).clamp(min=0)
        # A padding token also attends to itself: a row without keys would be NaN.
        mask = is_real[:, None, None, :] | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        x = self.add_positions(self.embedding(ids), positions, ids.shape[1])
        kernels = choose_kernels(x, self.blocks)
        factors = self.layer_drop(x, len(self.blocks), TextBlock.branches)
        for block, block_factors in zip(self.blocks, factors, strict=True):
            x, _, _ = block(x, mask, None, None, None, False, block_factors, kernels)
        return self.norm(x)

    def add_positions(
        self, embedded: Float[Tensor, "row token width"], positions: Int[Tensor, "row token"], length: int
    ) -> Float[Tensor, "row token width"]:
        """The scaled embeddings plus the codes of their positions in texts of `length`."""
        return torch.add(self.position_codes(positions, length).to(embedded), embedded, alpha=self.scale)

    def position_codes(self, positions: Int[Tensor, "row token"], length: int) -> Float[Tensor, "row token width"]:
        """What is added to the tokens for their positions in texts of `length`: a fixed code or learned positions.

        Raises:
            UserError: more tokens than the learned table has rows.
        """
        if self.position is None:
            return sinusoid(positions, self.embedding.embedding_dim)
        if length > len(self.position):
            raise UserError(f"text of {length} tokens: the model has text.max_length={len(self.position)} positions")
        return self.position[positions]

    @property
    def output_weight(self) -> Float[Tensor, "vocabulary width"]:
        """The output embedding, which is the input embedding where they are tied."""
        return self.embedding.weight if self.output is None else self.output.weight

    def logits(self, hidden: Float[Tensor, "*row width"]) -> Float[Tensor, "*row vocabulary"]:
        if self.output is not None:
            return self.output(hidden)
        with hold_weights(self.embedding):
            return nn.functional.linear(hidden, self.embedding.weight)


def make_text_mask(
    x: Float[Tensor, "row token width"], attention_mask: Int[Tensor, "row key"] | Bool[Tensor, "..."] | None, past: int
) -> tuple[Bool[Tensor, "row 1 token key"], Int[Tensor, "row token"]]:
    """Which keys each token attends to, and its position among the real tokens of its row.

    `attention_mask` covers past and present tokens ([row, past + token]; 1 is real), or is a complete Boolean 4D mask.
    """
    rows, length = x.shape[:2]
    query = past + torch.arange(length, device=x.device)
    if attention_mask is not None and attention_mask.ndim == 4:
        visible = attention_mask[:, 0]
    else:
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + length, dtype=torch.long, device=x.device)
        key = torch.arange(past + length, device=x.device)
        visible = (key[None, :] <= query[:, None]) & attention_mask.bool()[:, None, :]
    positions = (visible.sum(-1) - 1).clamp(min=0)
    # A padding token attends to itself: a row without keys would be NaN.
    key = torch.arange(visible.shape[-1], device=x.device)
    return (visible | (key[None, :] == query[:, None]))[:, None], positions
