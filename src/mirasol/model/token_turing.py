"""The Token Turing Machine: a Combiner whose input is one chunk and a memory of constant size.

The paper's TTM Combiner (supplement, section 3, Figure 1b) "takes only the current timestep features as input and uses
a memory mechanism with read and write operations". Section 4 gives its numbers: 512 for Read, 256 for Write, K = 32
outputs, and a Process of 2 layers, hidden dimension 128 and 12 heads. They are read as counts of tokens here. 12 heads
do not divide the width 1024, so that the heads are 12 of 64 features.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import StackConfig, VideoConfig
from mirasol.model.cache import StreamState
from mirasol.model.transformer import Stack
from mirasol.model.tubes import replace_parameter, resize_chunk_table, resize_token_table


class TokenLearner(nn.Module):
    """`picked` weighted sums of `tokens` tokens (TokenLearner v1.1, the supplement's reference 11).

    The learned position code enters the weights but not the sums, so that it does not accumulate in a memory that is
    read and written again and again.
    """

    def __init__(self, tokens: int, picked: int, width: int, hidden: int):
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.scores = nn.Linear(hidden, picked)

    def forward(self, x: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch picked width"]:
        # A softmax over the tokens: each picked token is a weighted mean of all.
        scores = self.scores(F.gelu(self.hidden(self.norm(x + self.position))))
        return scores.softmax(dim=1).mT @ x


class TokenTuringCombiner(nn.Module):
    """Reads tokens from memory and chunk, processes them, writes the next memory, and mixes the processed tokens into
    the m of x_t. The memory starts at zero and the weights are shared by all chunks, as in Token Turing Machines
    (arXiv 2211.09119)."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        ttm, stack = config.combiner.ttm, config.combiner.stack
        features = config.video.tokens + config.audio.tokens
        self.memory_shape = (ttm.memory_tokens, stack.width)
        self.token_position = nn.Parameter(torch.empty(features, stack.width))
        inputs = ttm.memory_tokens + features
        self.read = TokenLearner(inputs, ttm.read_tokens, stack.width, ttm.learner_hidden)
        self.process = Stack(process_stack(config))
        self.write = TokenLearner(inputs + ttm.read_tokens, ttm.memory_tokens, stack.width, ttm.learner_hidden)
        # "It then uses a MLP to produce the m combined output features" (section 3): over the token axis, so that
        # tokens mix and features do not.
        self.output_hidden = nn.Linear(ttm.read_tokens, ttm.hidden)
        self.output = nn.Linear(ttm.hidden, config.combiner.m)
        self.norm = nn.LayerNorm(stack.width)

    def resize(self, config: MirasolConfig, old: VideoConfig, new: VideoConfig) -> None:
        """Adapts to frames of another size: the learned positions of the video tokens are interpolated."""
        replace_parameter(self, "token_position", resize_chunk_table(self.token_position, old, new))
        memory = self.memory_shape[0]
        for learner in (self.read, self.write):
            head, video, tail = learner.position.tensor_split([memory, memory + old.tokens])
            table = torch.cat([head, resize_token_table(video, old, new), tail])
            replace_parameter(learner, "position", table)

    def empty_memory(self, batch: int) -> Float[Tensor, "batch memory width"]:
        """The memory before the first chunk."""
        return self.token_position.new_zeros(batch, *self.memory_shape)

    def process_chunk(
        self, features: Float[Tensor, "batch token width"], memory: Float[Tensor, "batch memory width"]
    ) -> tuple[Float[Tensor, "batch m width"], Float[Tensor, "batch memory width"]]:
        """x of one chunk, and the memory after it."""
        # Read → process → write, each on what the step before gave (Figure 1b).
        inputs = torch.cat([memory.to(features), features + self.token_position], dim=1)
        processed = self.process(self.read(inputs))
        memory = self.write(torch.cat([inputs, processed], dim=1))
        x = self.output(F.gelu(self.output_hidden(processed.mT))).mT
        return self.norm(x), memory

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
        state: StreamState | None = None,
    ) -> Float[Tensor, "batch chunk m width"]:
        """x of every chunk, or of one more chunk of the stream that `state` belongs to."""
        if state is not None:
            return self.step(video, audio, state)
        # A loop, not a mask: the memory after chunk t depends on everything before it.
        memory, outputs = self.empty_memory(len(video)), []
        for features in torch.cat([video, audio], dim=2).unbind(dim=1):
            x, memory = self.process_chunk(features, memory)
            outputs.append(x)
        return torch.stack(outputs, dim=1)

    def begin(self, batch: int, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream; it never grows, so that a window changes nothing."""
        return StreamState()

    def step(
        self,
        video: Float[Tensor, "batch 1 video_token width"],
        audio: Float[Tensor, "batch 1 audio_token width"],
        state: StreamState,
    ) -> Float[Tensor, "batch 1 m width"]:
        """x of one more chunk of a stream."""
        memory = self.empty_memory(len(video)) if state.memory is None else state.memory
        x, state.memory = self.process_chunk(torch.cat([video, audio], dim=2)[:, 0], memory)
        state.chunks += 1
        return x[:, None]


def process_stack(config: MirasolConfig) -> StackConfig:
    """The Transformer between reading and writing, at the Combiner's width."""
    ttm, stack = config.combiner.ttm, config.combiner.stack
    return StackConfig(
        ttm.depth, stack.width, ttm.hidden, ttm.heads, ttm.head_width, dropout=stack.dropout,
        layer_drop=stack.layer_drop,
    )  # fmt: skip
