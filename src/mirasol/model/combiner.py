"""The Combiners: from the features of all chunks up to t to m features of chunk t, in one pass or chunk by chunk.

The paper explores four (supplement, section 3 and Figure 1). Its text says that a Combiner takes "all the previous
features", its figure shows the current chunk alone: `combiner.scope` has both readings, "past" being the default. All
chunks then go through one block-causal pass, in which a token attends to its own and to earlier chunks.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import StackConfig, VideoConfig
from mirasol.model.cache import KeyValueCache, StreamState, find_narrowest
from mirasol.model.kernels import PLAIN, Kernels, choose_kernels
from mirasol.model.masks import BlockCausal, ResamplerMask
from mirasol.model.token_turing import TokenTuringCombiner
from mirasol.model.transformer import Attention, FeedForward, LayerDrop, Stack, add_branch, sinusoid
from mirasol.model.tubes import replace_parameter, resize_token_table

# Learned tokens that a Combiner adds stand next to the same code of their chunk, of rms 0.71: begun much smaller, all m
# would give nearly the same feature.
TOKEN_STD = 2.0


def order_tokens(
    video: Float[Tensor, "batch chunk video_token width"],
    audio: Float[Tensor, "batch chunk audio_token width"],
    order: str,
    m: int,
) -> Float[Tensor, "batch chunk token width"]:
    """The features of each chunk as one sequence, whose last m outputs become x.

    The paper keeps "the last m features" (supplement, Figure 1) and does not say which those are: `both_last` puts m/2
    of each modality there. With the other orders a small model learnt the last modality first and ignored the other.
    """
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
    """What the attention-based Combiners share: sizes, position codes and the state of a stream."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        combiner = config.combiner
        self.m, self.scope, self.window, self.depth = combiner.m, combiner.scope, combiner.window, combiner.stack.depth
        # Position codes are a reading: the supplement does not mention any in the Combiner.
        tokens = config.video.tokens + config.audio.tokens
        self.token_position = nn.Parameter(torch.empty(tokens, combiner.stack.width))

    def join(self, video: Tensor, audio: Tensor) -> Tensor:
        """One sequence per chunk, [batch, chunk, token, width]."""
        return torch.cat([video, audio], dim=2)

    def resize(self, config: MirasolConfig, old: VideoConfig, new: VideoConfig) -> None:
        """Adapts to frames of another size: the learned positions of the video tokens are interpolated."""
        before, after = (self._token_numbers(video.tokens, config.audio.tokens) for video in (old, new))
        # The rows of the table are in the order of `join`; sort them into video and audio first.
        by_modality = torch.empty_like(self.token_position)
        by_modality[before] = self.token_position.detach()
        video, audio = by_modality.split([old.tokens, config.audio.tokens])
        replace_parameter(self, "token_position", torch.cat([resize_token_table(video, old, new), audio])[after])

    def _token_numbers(self, video_tokens: int, audio_tokens: int) -> Int[Tensor, " token"]:
        """For each place of a chunk's sequence its token, numbered through video and then audio."""
        count = video_tokens + audio_tokens
        numbers = torch.arange(count, dtype=torch.float32, device=self.token_position.device)[None, None, :, None]
        return self.join(*numbers.split([video_tokens, audio_tokens], dim=2)).flatten().long()

    def chunk_code(self, chunks: int, first: int = 0) -> Float[Tensor, "chunk 1 width"]:
        """A fixed code of each chunk; `first` is the number of the first."""
        numbers = torch.arange(first, first + chunks, device=self.token_position.device)
        return sinusoid(numbers, self.token_position.shape[-1])[:, None].to(self.token_position)

    def positions(self, chunks: int, first: int = 0) -> Float[Tensor, "chunk token width"]:
        """A learned code of the token within its chunk plus a fixed code of the chunk."""
        return self.token_position + self.chunk_code(chunks, first)

    def begin(self, batch: int, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream; the scope `chunk` needs none."""
        layers = self.depth if self.scope == "past" else 0
        return StreamState(caches=[KeyValueCache(find_narrowest(self.window, window)) for _ in range(layers)])


class StackCombiner(AttentionCombiner):
    """A block-causal Transformer over the tokens of all chunks up to t; x_t is the last m outputs of chunk t."""

    def tokens(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> Float[Tensor, "batch chunk token width"]:
        """The Transformer's input for each chunk; `first` is the number of the first chunk."""
        raise NotImplementedError

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        state: StreamState | None = None,
    ) -> Float[Tensor, "batch chunk m width"]:
        """x of every chunk, or of one more chunk of the stream that `state` belongs to."""
        if state is not None:
            return self.step(video, audio, state)
        tokens = self.tokens(video, audio)
        _, chunks, count, _ = tokens.shape
        # The paper's figure: the current chunk alone, so that chunks are a second batch axis.
        if self.scope == "chunk":
            return self.stack(tokens.flatten(0, 1), last=self.m).unflatten(0, tokens.shape[:2])
        # Its text and equation, f_1..f_t → x_t: all chunks are one sequence, and one pass serves all t.
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
    """The paper's main Combiner, Figure 1a of the supplement: the Transformer's input is the features alone."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.order = config.combiner.token_order
        self.stack = Stack(config.combiner.stack)

    def join(self, video: Tensor, audio: Tensor) -> Tensor:
        return order_tokens(video, audio, self.order, self.m)

    def tokens(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> Float[Tensor, "batch chunk token width"]:
        """The features, in the order that decides which of them become x."""
        return self.join(video, audio) + self.positions(video.shape[1], first)


class ClsCombiner(StackCombiner):
    """The CLS Combiner, Figure 1c: the same Transformer with m learned tokens after each chunk's features; x_t is
    their outputs."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.cls = nn.Parameter(torch.empty(self.m, config.combiner.stack.width))
        self.stack = Stack(config.combiner.stack)

    def reset(self) -> None:
        """Draws the learned tokens."""
        nn.init.normal_(self.cls, std=TOKEN_STD)

    def tokens(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> Float[Tensor, "batch chunk token width"]:
        """The features, then the learned tokens."""
        batch, chunks = video.shape[:2]
        features = self.join(video, audio) + self.positions(chunks, first)
        # After the features, so that "the last m outputs" are theirs.
        cls = (self.cls + self.chunk_code(chunks, first)).to(features).expand(batch, -1, -1, -1)
        return torch.cat([features, cls], dim=2)


class LateFusionCombiner(AttentionCombiner):
    """No joint Combiner: the Transformer takes each modality by itself, and x_t is the last m/2 outputs of either. What
    is seen meets what is heard in the causal latent model only. Weights are those of the joint Transformer."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.stack = Stack(config.combiner.stack)

    def tokens(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> tuple[Float[Tensor, "batch chunk video_token width"], Float[Tensor, "batch chunk audio_token width"]]:
        """The features of each modality with their positions; `first` is the number of the first chunk."""
        codes = self.positions(video.shape[1], first).split([video.shape[2], audio.shape[2]], dim=1)
        return video + codes[0], audio + codes[1]

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        state: StreamState | None = None,
    ) -> Float[Tensor, "batch chunk m width"]:
        """x of every chunk, or of one more chunk of the stream that `state` belongs to."""
        if state is not None:
            return self.step(video, audio, state)
        return torch.cat([self.compress(tokens) for tokens in self.tokens(video, audio)], dim=2)

    def compress(self, tokens: Float[Tensor, "batch chunk token width"]) -> Float[Tensor, "batch chunk feature width"]:
        """The last m/2 outputs of each chunk of one modality."""
        _, chunks, tokens_per_chunk, _ = tokens.shape
        count = self.m // 2
        if self.scope == "chunk":
            return self.stack(tokens.flatten(0, 1), last=count).unflatten(0, tokens.shape[:2])
        mask = BlockCausal(chunks, tokens_per_chunk, tokens_per_chunk, self.window)
        return self.stack(tokens.flatten(1, 2), mask, last=count).unflatten(1, (chunks, count))

    def begin(self, batch: int, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream: a cache of each layer and modality, video's first."""
        video, audio = super().begin(batch, window), super().begin(batch, window)
        return StreamState(caches=[*video.caches, *audio.caches])

    def step(
        self,
        video: Float[Tensor, "batch 1 video_token width"],
        audio: Float[Tensor, "batch 1 audio_token width"],
        state: StreamState,
    ) -> Float[Tensor, "batch 1 m width"]:
        """x of one more chunk of a stream."""
        parts = self.tokens(video, audio, first=state.chunks)
        state.chunks += 1
        if self.scope == "chunk":
            return torch.cat([self.compress(tokens) for tokens in parts], dim=2)
        caches = state.caches[: self.depth], state.caches[self.depth :]
        outputs = [
            self.stack.step(tokens[:, 0], own, last=self.m // 2) for tokens, own in zip(parts, caches, strict=True)
        ]
        return torch.cat(outputs, dim=1)[:, None]


class PerceiverBlock(nn.Module):
    """Latents attend to the features and to each other, under separate norms; then a feed-forward (Flamingo's form of
    Perceiver resampling, arXiv 2204.14198)."""

    branches = 2
    recomputed_as = "block"

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
        factors: Float[Tensor, "branch batch 1 1"] | None = None,
        kernels: Kernels = PLAIN,
    ) -> Float[Tensor, "batch latent width"]:
        normed = self.latent_norm(latents)
        # Keys and values are the features and the latents themselves, as in Flamingo's resampler.
        context = torch.cat([self.feature_norm(features), normed], dim=1)
        mixed, _ = self.attention(normed, context, mask, kernels=kernels)
        latents = add_branch(latents, self.dropout(mixed), factors, 0)
        branch = self.feed_forward(*kernels.split_norm(self.feed_forward_norm, latents), kernels)
        return add_branch(latents, self.dropout(branch), factors, 1)

    def step(
        self,
        latents: Float[Tensor, "batch latent width"],
        features: Float[Tensor, "batch feature width"],
        cache: KeyValueCache,
        kernels: Kernels = PLAIN,
    ) -> Float[Tensor, "batch latent width"]:
        """The same for one more chunk, which attends to the features in the cache; nothing later attends to its
        latents."""
        normed = self.latent_norm(latents)
        own = self.attention.keys_values(normed)
        keys_values = cache.append(self.attention.keys_values(self.feature_norm(features)), passing=own)
        mixed, _ = self.attention(normed, kernels=kernels, keys_values=keys_values)
        latents = latents + mixed
        return latents + self.feed_forward(self.feed_forward_norm(latents))


class PerceiverCombiner(AttentionCombiner):
    """The Perceiver Combiner, Figure 1d: m learned latents of chunk t attend to the features of the chunks up to t and
    to each other; the features themselves are the same at every layer."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        stack = config.combiner.stack
        self.latents = nn.Parameter(torch.empty(self.m, stack.width))
        self.blocks = nn.ModuleList(PerceiverBlock(stack) for _ in range(stack.depth))
        self.layer_drop = LayerDrop(stack.layer_drop)
        self.norm = nn.LayerNorm(stack.width, stack.norm_eps)

    def reset(self) -> None:
        """Draws the learned latents."""
        nn.init.normal_(self.latents, std=TOKEN_STD)

    def inputs(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        first: int = 0,
    ) -> tuple[Float[Tensor, "batch chunk token width"], Float[Tensor, "batch chunk m width"]]:
        """Features and latents of each chunk; `first` is the number of the first chunk."""
        batch, chunks = video.shape[:2]
        features = self.join(video, audio) + self.positions(chunks, first)
        return features, (self.latents + self.chunk_code(chunks, first)).to(features).expand(batch, -1, -1, -1)

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        state: StreamState | None = None,
    ) -> Float[Tensor, "batch chunk m width"]:
        """x of every chunk, or of one more chunk of the stream that `state` belongs to."""
        if state is not None:
            return self.step(video, audio, state)
        features, latents = self.inputs(video, audio)
        _, chunks, tokens, _ = features.shape
        alone = self.scope == "chunk"
        mask, axes = (None, (0, 1)) if alone else (ResamplerMask(chunks, self.m, tokens, self.window), (1, 2))
        features, x = features.flatten(*axes), latents.flatten(*axes)
        kernels = choose_kernels(x, self.blocks)
        visible = kernels.prepare_mask(mask, x.device)
        factors = self.layer_drop(x, len(self.blocks), PerceiverBlock.branches)
        for block, block_factors in zip(self.blocks, factors, strict=True):
            x = block(x, features, visible, block_factors, kernels)
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
        kernels = choose_kernels(x, self.blocks)
        for number, block in enumerate(self.blocks):
            if self.scope == "chunk":
                x = block(x, features, None, kernels=kernels)
            else:
                x = block.step(x, features, state.caches[number], kernels)
        return self.norm(x)[:, None]


class ConcatCombiner(nn.Module):
    """No Combiner: the features of chunk t, concatenated. The baseline of the paper's Table 5a: "partitioning [...]
    and concatenation of the features" (supplement, section 4, "Ablation experiments details")."""

    def __init__(self, config: MirasolConfig):
        super().__init__()

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        state: StreamState | None = None,
    ) -> Float[Tensor, "batch chunk m width"]:
        """x of every chunk, or of one more chunk of the stream that `state` belongs to."""
        if state is not None:
            return self.step(video, audio, state)
        return torch.cat([video, audio], dim=2)

    def resize(self, config: MirasolConfig, old: VideoConfig, new: VideoConfig) -> None:
        """There are no weights; m follows the size of frames."""

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
    "late": LateFusionCombiner,
    "concat": ConcatCombiner,
}


def make_combiner(config: MirasolConfig) -> nn.Module:
    """The Combiner of `config.combiner.kind`: (video features, audio features) → x [batch, chunk, m, width].

    For a stream `begin` makes a state, and `step` takes the features of one chunk and the state, which it changes.
    """
    return COMBINERS[config.combiner.kind](config)
