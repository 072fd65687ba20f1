"""The text decoder: causal self-attention over prompt and target, cross-attention to the latents."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.model.transformer import Attention, FeedForward, LayerDrop, added, sinusoid


class TextLayers(NamedTuple):
    """What the layers of the text decoder went through, where it was asked for; empty elsewhere.

    hidden_states: the embedded tokens and each layer's output, the last one normed, [row, token, width]
    attentions: weights of the self-attention of each layer, [row, head, token, key]
    cross_attentions: weights of each cross-attention layer, [row, head, token, latent]
    """

    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    cross_attentions: tuple[Tensor, ...] = ()


class TextBlock(nn.Module):
    """Causal self-attention and feed-forward, then cross-attention to the latents where the layer has it."""

    branches = 4

    def __init__(self, config: MirasolConfig, index: int):
        super().__init__()
        stack = config.text.stack
        self.index = index
        self.attention_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.attention = Attention(stack)
        self.feed_forward_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.feed_forward = FeedForward(stack)
        self.dropout = nn.Dropout(stack.dropout)
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
        kept: Float[Tensor, "branch row 1 1"] | None = None,
    ) -> tuple[
        Float[Tensor, "row token width"],
        Float[Tensor, "row head token key"] | None,
        Float[Tensor, "row head token latent"] | None,
    ]:
        """Output, and the weights of self- and cross-attention when asked for. Without latents the cross-attention
        block is passed over, its feed-forward too. `kept` is what `LayerDrop` gives for this block."""
        queries, keys_values = self.attention.projections(x, self.attention_norm)
        if cache is not None:
            keys_values = cache.self_attention_cache.update(*keys_values, self.index)
            # A static cache has slots that nobody has written yet: they stay out of sight.
            mask = nn.functional.pad(mask, (0, keys_values[0].shape[2] - mask.shape[-1]))
        mixed, own_weights = self.attention.mix(queries, keys_values, mask, with_weights)
        x = added(x, self.dropout(mixed), kept, 0)
        x = added(x, self.dropout(self.feed_forward(x, self.feed_forward_norm)), kept, 1)
        if self.cross_attention is None or latents is None:
            return x, own_weights, None
        mixed, weights = self._look_at_latents(x, latents, latent_mask, cache, with_weights)
        x = added(x, self.dropout(mixed), kept, 2)
        if self.cross_feed_forward is not None:
            x = added(x, self.dropout(self.cross_feed_forward(x, self.cross_feed_forward_norm)), kept, 3)
        return x, own_weights, weights

    def _look_at_latents(
        self,
        x: Float[Tensor, "row token width"],
        latents: Float[Tensor, "clip latent latent_width"],
        latent_mask: Bool[Tensor, "clip latent"],
        cache: EncoderDecoderCache | None,
        with_weights: bool,
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
            # Every row by itself: the weights that come out are then those that were used, and have gradients.
            keys, values = (part.repeat_interleave(rows // clips, dim=0) for part in keys_values)
            keys_values, latent_mask = (keys, values), latent_mask.repeat_interleave(rows // clips, dim=0)
            clips = rows
        # [rows, L] → [clips, rows/clips · L]: cross-attention has no order among queries, so rows can be one sequence.
        queries = self.cross_attention_norm(x).reshape(clips, -1, x.shape[-1])
        mixed, weights = self.cross_attention(queries, keys_values, latent_mask[:, None, None, :], with_weights)
        return mixed.reshape(x.shape), weights


class TextDecoder(nn.Module):
    """Embeds tokens, runs the blocks; input and output embeddings are tied unless the config parts them."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width, latent_width = config.text.stack.width, config.latent.stack.width
        self.embedding = nn.Embedding(config.text.vocab_size, width)
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
        attention_mask: Tensor | None,
        latents: Float[Tensor, "clip latent latent_width"],
        latent_mask: Bool[Tensor, "clip latent"],
        cache: EncoderDecoderCache | None = None,
        with_weights: bool = False,
        longest: int | None = None,
        embedded: Float[Tensor, "row token width"] | None = None,
        with_hidden_states: bool = False,
    ) -> tuple[Float[Tensor, "row token width"], TextLayers]:
        """What the decoder makes of every token, and what its layers went through where that is asked for. The tokens
        come as `ids`, or `embedded` already.

        Positions count the real tokens, so that padding on the left changes nothing. `longest` is the length of the
        longest text in a row, where a ready 4D mask puts several beside each other.
        """
        past = int(cache.get_seq_length()) if cache is not None else 0
        x = self.embedding(ids) if embedded is None else embedded
        mask, positions = causal_mask_and_positions(x, attention_mask, past)
        if cache is None or not any(cache.is_updated.values()):  # later tokens read the latents' keys in the cache
            latents = self.latent_input(latents)
        x = x + self.position_codes(positions, longest or past + x.shape[1]).to(x)
        hidden_states, attentions, cross_attentions = [x], [], []
        kept = self.layer_drop(x, len(self.blocks), TextBlock.branches)
        for block, kept_of_block in zip(self.blocks, kept, strict=True):
            x, own_weights, weights = block(x, mask, latents, latent_mask, cache, with_weights, kept_of_block)
            if with_weights:
                attentions.append(own_weights)
                cross_attentions += [] if weights is None else [weights]
            if with_hidden_states:
                hidden_states.append(x)
        x = self.norm(x)
        seen = (*hidden_states[:-1], x) if with_hidden_states else ()
        return x, TextLayers(seen, tuple(attentions), tuple(cross_attentions))

    def read(
        self, ids: Int[Tensor, "row token"], is_real: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        """The contrastive pass (MaMMUT): the same weights over the text alone, without cross-attention, every token
        with all the real ones in sight. Padding may stand on either side."""
        positions = (is_real.long().cumsum(dim=1) - 1).clamp(min=0)
        # A padding token looks at itself as well: a row of nothing would be NaN.
        mask = is_real[:, None, None, :] | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        x = self.embedding(ids)
        x = x + self.position_codes(positions, ids.shape[1]).to(x)
        kept = self.layer_drop(x, len(self.blocks), TextBlock.branches)
        for block, kept_of_block in zip(self.blocks, kept, strict=True):
            x, _, _ = block(x, mask, None, None, None, False, kept_of_block)
        return self.norm(x)

    def position_codes(self, positions: Int[Tensor, "row token"], length: int) -> Float[Tensor, "row token width"]:
        """What is added to the tokens for their places in rows of `length`: a fixed code, or rows of the learned table.

        Raises:
            UserError: more tokens than the learned table has rows.
        """
        if self.position is None:
            return sinusoid(positions, self.embedding.embedding_dim)
        if length > len(self.position):
            raise UserError(f"text of {length} tokens: text.max_length={len(self.position)} learned positions are all")
        return self.position[positions]

    @property
    def output_weight(self) -> Float[Tensor, "vocabulary width"]:
        """The output embedding: the input's own, unless they are parted."""
        return self.embedding.weight if self.output is None else self.output.weight

    def logits(self, hidden: Float[Tensor, "*row width"]) -> Float[Tensor, "*row vocabulary"]:
        return nn.functional.linear(hidden, self.output_weight)


def causal_mask_and_positions(
    x: Float[Tensor, "row token width"], attention_mask: Tensor | None, past: int
) -> tuple[Bool[Tensor, "row 1 token key"], Int[Tensor, "row token"]]:
    """Which keys each token may look at, and its position among the real tokens of its row.

    `attention_mask` covers past and present tokens ([row, past + token]; 1 is real), or is a ready 4D mask.
    """
    rows, length = x.shape[:2]
    query = past + torch.arange(length, device=x.device)
    if attention_mask is not None and attention_mask.ndim == 4:
        # Boolean, or additive with zeros where a key may be seen.
        visible = (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)[:, 0]
    else:
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + length, dtype=torch.long, device=x.device)
        key = torch.arange(past + length, device=x.device)
        visible = (key[None, :] <= query[:, None]) & attention_mask.bool()[:, None, :]
    positions = (visible.sum(-1) - 1).clamp(min=0)
    # A padding token looks at itself: a row of nothing would be NaN.
    key = torch.arange(visible.shape[-1], device=x.device)
    return (visible | (key[None, :] == query[:, None]))[:, None], positions
