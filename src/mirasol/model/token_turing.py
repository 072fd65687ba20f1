"""The Token Turing Machine: a Combiner that sees one chunk and a memory, and whose state never grows."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import StackConfig
from mirasol.model.cache import StreamState
from mirasol.model.transformer import Stack


class TokenLearner(nn.Module):
    """Picks `picked` weighted sums of `tokens` tokens (TokenLearner v1.1). A learned code of each place has a say in
    the weights but not in the sums, so that it does not pile up in a memory that is picked from again and again."""

    def __init__(self, tokens: int, picked: int, width: int, hidden: int):
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.scores = nn.Linear(hidden, picked)

    def forward(self, x: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch picked width"]:
        scores = self.scores(F.gelu(self.hidden(self.norm(x + self.position))))
        return scores.softmax(dim=1).mT @ x


class TokenTuringCombiner(nn.Module):
    """Reads tokens from memory and chunk, processes them, writes the next memory, and mixes the processed tokens into
    the m of x_t (SUPP, section 3). The memory starts at zero; the weights are the same at every chunk."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        ttm, stack = config.combiner.ttm, config.combiner.stack
        features = config.video.tokens + config.audio.tokens
        self.memory_shape = (ttm.memory_tokens, stack.width)
        self.token_position = nn.Parameter(torch.empty(features, stack.width))
        seen = ttm.memory_tokens + features
        self.read = TokenLearner(seen, ttm.read_tokens, stack.width, ttm.learner_hidden)
        self.process = Stack(process_stack(config))
        self.write = TokenLearner(seen + ttm.read_tokens, ttm.memory_tokens, stack.width, ttm.learner_hidden)
        # An MLP over the token axis: places mix, features do not.
        self.output_hidden = nn.Linear(ttm.read_tokens, ttm.hidden)
        self.output = nn.Linear(ttm.hidden, config.combiner.m)
        self.norm = nn.LayerNorm(stack.width)

    def empty_memory(self, batch: int) -> Float[Tensor, "batch memory width"]:
        """The memory before the first chunk."""
        return self.token_position.new_zeros(batch, *self.memory_shape)

    def turn(
        self, features: Float[Tensor, "batch token width"], memory: Float[Tensor, "batch memory width"]
    ) -> tuple[Float[Tensor, "batch m width"], Float[Tensor, "batch memory width"]]:
        """x of one chunk, and the memory after it."""
        seen = torch.cat([memory.to(features), features + self.token_position], dim=1)
        processed = self.process(self.read(seen))
        memory = self.write(torch.cat([seen, processed], dim=1))
        x = self.output(F.gelu(self.output_hidden(processed.mT))).mT
        return self.norm(x), memory

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        memory, outputs = self.empty_memory(len(video)), []
        for features in torch.cat([video, audio], dim=2).unbind(dim=1):
            x, memory = self.turn(features, memory)
            outputs.append(x)
        return torch.stack(outputs, dim=1)

    def begin(self, batch: int, window: int | None = None) -> StreamState:
        """The state before the first chunk of a stream; it never grows, so that a window has nothing to cut off."""
        return StreamState(memory=self.empty_memory(batch))

    def step(
        self,
        video: Float[Tensor, "batch 1 video_token width"],
        audio: Float[Tensor, "batch 1 audio_token width"],
        state: StreamState,
    ) -> Float[Tensor, "batch 1 m width"]:
        """x of one more chunk of a stream."""
        x, state.memory = self.turn(torch.cat([video, audio], dim=2)[:, 0], state.memory)
        state.chunks += 1
        return x[:, None]


def process_stack(config: MirasolConfig) -> StackConfig:
    """The Transformer between reading and writing, at the Combiner's width."""
    ttm, stack = config.combiner.ttm, config.combiner.stack
    return StackConfig(
        ttm.depth, stack.width, ttm.hidden, ttm.heads, ttm.head_width, dropout=stack.dropout,
        layer_drop=stack.layer_drop,
    )  # fmt: skip
