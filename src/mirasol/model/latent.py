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


class CausalLatentModel(nn.Module):
    """x → h under a block-causal mask; h_t predicts x_{t+1}. In training a learned vector replaces a share of x."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width = config.latent.stack.width
        self.mask_ratio, self.window = config.latent.mask_ratio, config.latent.window
        self.noise = RowNoise()
        self.stack = Stack(config.latent.stack)
        self.token_position = nn.Parameter(torch.empty(config.combiner.m, width))
        self.hidden_latent = nn.Parameter(torch.empty(width))
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
        # Single features, not entire chunks: a reading, since the supplement does not mention the masking of x.
        if self.training and self.mask_ratio > 0:
            hidden = self.noise(len(x), chunks * m, x.device).unflatten(1, (chunks, m)) < self.mask_ratio
            x = torch.where(hidden[..., None], self.hidden_latent.to(x), x)
        # The m features of a chunk attend to each other: they have no order in time among themselves.
        mask = BlockCausal(chunks, m, m, self.window)
        return self.stack(self.add_positions(x), mask).unflatten(1, (chunks, m))

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
