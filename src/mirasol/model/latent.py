"""The causal latent model: an autoregressive Transformer over the chunks' combined features.

The paper's "causal latent model" (supplement, section 4, "Model Details") has the Combiner's size. That it attends to
its own and earlier chunks (block-causal), and hides a share of x in training, are readings: `latent` in docs/model.md.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import VideoConfig
from mirasol.model.cache import KeyValueCache, StreamState, find_narrowest
from mirasol.model.masks import BlockCausal
from mirasol.model.transformer import RowNoise, Stack, sinusoid
from mirasol.model.tubes import replace_parameter, resize_chunk_table


class LatentInput(nn.Module):
    """What is done to x, whatever follows: position codes are added, and in training a learned vector replaces a share
    of x."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width = config.latent.stack.width
        self.mask_ratio = config.latent.mask_ratio
        self.noise = RowNoise()
        self.token_position = nn.Parameter(torch.empty(config.combiner.m, width))
        self.hidden_latent = nn.Parameter(torch.empty(width))

    def hide(self, x: Float[Tensor, "batch chunk m width"]) -> Float[Tensor, "batch chunk m width"]:
        """x with the learned vector in the place of a share of it, in training."""
        if not self.training or self.mask_ratio == 0:
            return x
        # Single features, not entire chunks: a reading, since the supplement does not mention the masking of x.
        chunks, m = x.shape[1:3]
        hidden = self.noise(len(x), chunks * m, x.device).unflatten(1, (chunks, m)) < self.mask_ratio
        return torch.where(hidden[..., None], self.hidden_latent.to(x), x)

    def add_positions(
        self, x: Float[Tensor, "batch chunk m width"], first: int = 0
    ) -> Float[Tensor, "batch token width"]:
        """x plus its position codes, as one sequence; `first` is the number of its first chunk."""
        # A learned code of the feature within its chunk plus a fixed code of the chunk, as in the Combiner: a clip may
        # have more chunks than any in training.
        chunk = sinusoid(torch.arange(first, first + x.shape[1], device=x.device), x.shape[-1])
        return (x + self.token_position + chunk[:, None].to(x)).flatten(1, 2)

    def resize(self, config: MirasolConfig, old: VideoConfig, new: VideoConfig) -> None:
        """Adapts to frames of another size: with `concat`, where x_t is every token, its positions are interpolated."""
        if config.combiner.kind == "concat":
            replace_parameter(self, "token_position", resize_chunk_table(self.token_position, old, new))


class CausalLatentModel(LatentInput):
    """x → h under a block-causal mask; h_t predicts x_{t+1}."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        width = config.latent.stack.width
        self.window = config.latent.window
        self.stack = Stack(config.latent.stack)
        # The text decoder and the reconstruction use h too: with this linear h itself need not equal the
        # next chunk's features.
        self.next_latent = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch chunk m width"], state: StreamState | None = None
    ) -> Float[Tensor, "batch chunk m width"]:
        """h of every chunk, or of one more chunk of the stream that `state` belongs to."""
        if state is not None:
            return self.step(x, state)
        _, chunks, m, _ = x.shape
        # The m features of a chunk attend to each other: they have no order in time among themselves.
        mask = BlockCausal(chunks, m, m, self.window)
        return self.stack(self.add_positions(self.hide(x)), mask).unflatten(1, (chunks, m))

    def begin(self, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream."""
        window = find_narrowest(self.window, window)
        return StreamState(caches=[KeyValueCache(window) for _ in self.stack.blocks])

    def step(self, x: Float[Tensor, "batch 1 m width"], state: StreamState) -> Float[Tensor, "batch 1 m width"]:
        """h of one more chunk of a stream; nothing is hidden."""
        h = self.stack.step(self.add_positions(x, first=state.chunks), state.caches, last=x.shape[2])
        state.chunks += 1
        return h[:, None]

    def predict_next(self, h: Float[Tensor, "batch chunk m width"]) -> Float[Tensor, "batch chunk m width"]:
        """The prediction of x_{t+1} from h_t."""
        return self.next_latent(h)


class NoLatentModel(LatentInput):
    """`latent.kind: none`: h_t is x_t alone, normed as the latent model's output is, and nothing predicts x_{t+1}.

    The position codes stay: the text decoder has none for what it attends to, and could not tell one chunk from the
    other.
    """

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.latent.stack.width, config.latent.stack.norm_eps)

    def forward(
        self, x: Float[Tensor, "batch chunk m width"], state: StreamState | None = None
    ) -> Float[Tensor, "batch chunk m width"]:
        """h of every chunk, or of one more chunk of the stream that `state` belongs to."""
        first = 0 if state is None else state.chunks
        if state is not None:
            state.chunks += 1
        return self.norm(self.add_positions(self.hide(x), first)).unflatten(1, x.shape[1:3])

    def begin(self, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream: the number of chunks, nothing else."""
        return StreamState()

    def predict_next(self, h: Float[Tensor, "batch chunk m width"]) -> None:
        """Nothing predicts x_{t+1}."""


def make_latent_model(config: MirasolConfig) -> CausalLatentModel | NoLatentModel:
    """The latent model of `config.latent.kind`: x → h, both [batch, chunk, m, width]."""
    return (NoLatentModel if config.latent.kind == "none" else CausalLatentModel)(config)
