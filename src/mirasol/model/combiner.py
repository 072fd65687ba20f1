"""The Combiners: features of all chunks up to t become m features of chunk t, in one pass or chunk by chunk."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import StackConfig
from mirasol.model.cache import KeyValueCache, StreamState, narrower
from mirasol.model.masks import BlockCausal, ResamplerMask
from mirasol.model.token_turing import TokenTuringCombiner
from mirasol.model.transformer import Attention, FeedForward, LayerDrop, Stack, added, form_of_mask, sinusoid


def order_tokens(
    video: Float[Tensor, "batch chunk video_token width"],
    audio: Float[Tensor, "batch chunk audio_token width"],
    order: str,
    m: int,
) -> Float[Tensor, "batch chunk token width"]:
    """One sequence per chunk. The order decides what the last m tokens are: `both_last` puts m/2 of each there."""
    if order == "audio_last":
        return torch.cat([video, audio], dim=2)
    if order == "video_last":
        return torch.cat([audio, video], dim=2)
    # When one modality has fewer than m/2 tokens the other fills up the rest.
    last_audio = max(min(m // 2, audio.shape[2]), m - video.shape[2])
    last_video = m - last_audio
    video_rest, video_last = video.tensor_split([video.shape[2] - last_video], dim=2)
    audio_rest, audio_last = audio.tensor_split([audio.shape[2] - last_audio], dim=2)
    return torch.cat([video_rest, audio_rest, video_last, audio_last], dim=2)


class AttentionCombiner(nn.Module):
    """What the Combiners made of attention share: their sizes, the codes of their tokens, and their past."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        combiner = config.combiner
        self.m, self.scope, self.window, self.depth = combiner.m, combiner.scope, combiner.window, combiner.stack.depth
        tokens = config.video.tokens + config.audio.tokens
        self.token_position = nn.Parameter(torch.empty(tokens, combiner.stack.width))

    def chunk_code(self, chunks: int, first: int = 0) -> Float[Tensor, "chunk 1 width"]:
        """A fixed code of each chunk; `first` is the number of the first."""
        numbers = torch.arange(first, first + chunks, device=self.token_position.device)
        return sinusoid(numbers, self.token_position.shape[-1])[:, None].to(self.token_position)

    def positions(self, chunks: int, first: int = 0) -> Float[Tensor, "chunk token width"]:
        """A learned code of the token within its chunk plus a fixed code of the chunk."""
        return self.token_position + self.chunk_code(chunks, first)

    def begin(self, batch: int, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream; with the scope `chunk` there is nothing to keep."""
        layers = self.depth if self.scope == "past" else 0
        return StreamState(caches=[KeyValueCache(narrower(self.window, window)) for _ in range(layers)])


class StackCombiner(AttentionCombiner):
    """A block-causal Transformer over the tokens of all chunks up to t; x_t is the last m outputs of chunk t."""

    def tokens(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> Float[Tensor, "batch chunk token width"]:
        """What the Transformer reads of each chunk; `first` is the number of the first chunk."""
        raise NotImplementedError

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        tokens = self.tokens(video, audio)
        _, chunks, count, _ = tokens.shape
        if self.scope == "chunk":
            return self.stack(tokens.flatten(0, 1), last=self.m).unflatten(0, tokens.shape[:2])
        mask = BlockCausal(chunks, count, count, self.window)
        return self.stack(tokens.flatten(1, 2), mask, last=self.m).unflatten(1, (chunks, self.m))

    def step(
        self,
        video: Float[Tensor, "batch 1 video_token width"],
        audio: Float[Tensor, "batch 1 audio_token width"],
        state: StreamState,
    ) -> Float[Tensor, "batch 1 m width"]:
        """x of one more chunk of a stream."""
        tokens = self.tokens(video, audio, first=state.chunks)
        state.chunks += 1
        if self.scope == "chunk":
            return self.stack(tokens[:, 0], last=self.m)[:, None]
        return self.stack.step(tokens[:, 0], state.caches, last=self.m)[:, None]


class TransformerCombiner(StackCombiner):
    """The paper's main Combiner: the Transformer reads the features alone (SUPP, section 3)."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.order = config.combiner.token_order
        self.stack = Stack(config.combiner.stack)

    def tokens(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> Float[Tensor, "batch chunk token width"]:
        """The features, in the order that decides which of them become x."""
        return order_tokens(video, audio, self.order, self.m) + self.positions(video.shape[1], first)


class ClsCombiner(StackCombiner):
    """The same Transformer with m learned tokens after each chunk's features; x_t is the outputs of these."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.cls = nn.Parameter(torch.empty(self.m, config.combiner.stack.width))
        self.stack = Stack(config.combiner.stack)

    def tokens(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> Float[Tensor, "batch chunk token width"]:
        """The features, then the learned tokens."""
        batch, chunks = video.shape[:2]
        features = torch.cat([video, audio], dim=2) + self.positions(chunks, first)
        cls = (self.cls + self.chunk_code(chunks, first)).to(features).expand(batch, -1, -1, -1)
        return torch.cat([features, cls], dim=2)


class PerceiverBlock(nn.Module):
    """Latents look at features and at themselves, each normed for itself; then a feed-forward."""

    branches = 2

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.feature_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.latent_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.attention = Attention(stack)
        self.feed_forward_norm = nn.LayerNorm(stack.width, stack.norm_eps)
        self.feed_forward = FeedForward(stack)
        self.dropout = nn.Dropout(stack.dropout)

    def forward(
        self,
        latents: Float[Tensor, "batch latent width"],
        features: Float[Tensor, "batch feature width"],
        mask: Bool[Tensor, "latent key"] | BlockMask | None,
        kept: Float[Tensor, "branch batch 1 1"] | None = None,
    ) -> Float[Tensor, "batch latent width"]:
        normed = self.latent_norm(latents)
        context = torch.cat([self.feature_norm(features), normed], dim=1)
        mixed, _ = self.attention(normed, self.attention.keys_values(context), mask)
        latents = added(latents, self.dropout(mixed), kept, 0)
        return added(latents, self.dropout(self.feed_forward(self.feed_forward_norm(latents))), kept, 1)

    def step(
        self,
        latents: Float[Tensor, "batch latent width"],
        features: Float[Tensor, "batch feature width"],
        cache: KeyValueCache,
    ) -> Float[Tensor, "batch latent width"]:
        """The same of one more chunk, which sees the features in the cache; its latents are seen by nothing later."""
        normed = self.latent_norm(latents)
        own = self.attention.keys_values(normed)
        keys_values = cache.append(self.attention.keys_values(self.feature_norm(features)), passing=own)
        mixed, _ = self.attention(normed, keys_values)
        latents = latents + mixed
        return latents + self.feed_forward(self.feed_forward_norm(latents))


class PerceiverCombiner(AttentionCombiner):
    """Perceiver resampling: m learned latents of chunk t look at the features of the chunks up to t and at each other;
    the features stay what they are, layer after layer."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        stack = config.combiner.stack
        self.latents = nn.Parameter(torch.empty(self.m, stack.width))
        self.blocks = nn.ModuleList(PerceiverBlock(stack) for _ in range(stack.depth))
        self.layer_drop = LayerDrop(stack.layer_drop)
        self.norm = nn.LayerNorm(stack.width, stack.norm_eps)

    def inputs(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> tuple[Float[Tensor, "batch chunk token width"], Float[Tensor, "batch chunk m width"]]:
        """Features and latents of each chunk; `first` is the number of the first chunk."""
        batch, chunks = video.shape[:2]
        features = torch.cat([video, audio], dim=2) + self.positions(chunks, first)
        return features, (self.latents + self.chunk_code(chunks, first)).to(features).expand(batch, -1, -1, -1)

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        features, latents = self.inputs(video, audio)
        _, chunks, tokens, _ = features.shape
        alone = self.scope == "chunk"
        mask, axes = (None, (0, 1)) if alone else (ResamplerMask(chunks, self.m, tokens, self.window), (1, 2))
        features, x = features.flatten(*axes), latents.flatten(*axes)
        visible = form_of_mask(mask, self.blocks[0].attention.implementation, x.device)
        kept = self.layer_drop(x, len(self.blocks), PerceiverBlock.branches)
        for block, kept_of_block in zip(self.blocks, kept, strict=True):
            x = block(x, features, visible, kept_of_block)
        return self.norm(x).view(latents.shape)

    def step(
        self,
        video: Float[Tensor, "batch 1 video_token width"],
        audio: Float[Tensor, "batch 1 audio_token width"],
        state: StreamState,
    ) -> Float[Tensor, "batch 1 m width"]:
        """x of one more chunk of a stream."""
        features, latents = self.inputs(video, audio, first=state.chunks)
        state.chunks += 1
        x, features = latents[:, 0], features[:, 0]
        for number, block in enumerate(self.blocks):
            x = block(x, features, None) if self.scope == "chunk" else block.step(x, features, state.caches[number])
        return self.norm(x)[:, None]


class ConcatCombiner(nn.Module):
    """No Combiner at all (the baseline of the paper's Table 5a): every feature of chunk t is kept as it is."""

    def __init__(self, config: MirasolConfig):
        super().__init__()

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        return torch.cat([video, audio], dim=2)

    def begin(self, batch: int, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream: there is nothing to keep."""
        return StreamState()

    def step(
        self,
        video: Float[Tensor, "batch 1 video_token width"],
        audio: Float[Tensor, "batch 1 audio_token width"],
        state: StreamState,
    ) -> Float[Tensor, "batch 1 m width"]:
        """x of one more chunk of a stream."""
        state.chunks += 1
        return self(video, audio)


COMBINERS: dict[str, type[nn.Module]] = {
    "transformer": TransformerCombiner,
    "cls": ClsCombiner,
    "perceiver": PerceiverCombiner,
    "ttm": TokenTuringCombiner,
    "concat": ConcatCombiner,
}


def make_combiner(config: MirasolConfig) -> nn.Module:
    """The Combiner of `config.combiner.kind`: (video features, audio features) → x [batch, chunk, m, width].

    For a stream `begin` makes a state, and `step` takes the features of one chunk and the state, which it changes.
    """
    return COMBINERS[config.combiner.kind](config)
