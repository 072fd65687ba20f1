"""What the m features of every chunk read: which tubes and spectrogram patches, of which chunks.

Attention says how the outputs of one layer are mixed of its inputs. Followed through all layers of a Combiner
(attention rollout, Abnar & Zuidema, arXiv 2005.00928: half of each output is the residual stream, half is what
attention mixed in) it says how the features x are mixed of the chunk encoder's. Feed-forwards work on every token alone
and change nothing in that account. It is an account of attention, not of causes: what mattered is measured by
`mirasol.explain.occlusion`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.errors import UserError
from mirasol.explain.recording import list_attention, record_attention
from mirasol.model.combiner import (
    AttentionCombiner,
    ConcatCombiner,
    LateFusionCombiner,
    PerceiverCombiner,
    StackCombiner,
)
from mirasol.model.token_turing import TokenLearner, TokenTuringCombiner


@dataclass(frozen=True)
class MemoryReading:
    """What a Token Turing Machine did with its memory, chunk by chunk. All are shares; rows sum to 1.

    read: of every token read for a chunk, over the memory's tokens and then the chunk's own
    write: of every token of the memory after a chunk, over the memory before, the chunk's tokens and the processed ones
    content: how much of every token of the memory after a chunk comes of which chunk
    empty: how much of it is still the empty memory of the beginning
    """

    read: Float[np.ndarray, "chunk read input"]
    write: Float[np.ndarray, "chunk memory written"]
    content: Float[np.ndarray, "chunk memory source"]
    empty: Float[np.ndarray, "chunk memory"]


@dataclass(frozen=True)
class CombinerReading:
    """What the m features of each chunk are made of, as shares of the features of `source` chunks. A source's tokens
    are its tubes, then its spectrogram patches, in the order of `Explanation.tubes` and `Explanation.patches`.

    kind, scope: of the Combiner, as in its config
    rollout: attention followed through all layers; with `own` a row sums to 1
    own: the share that is none of the features: of learned tokens (cls), learned latents (perceiver) or the empty
        memory (ttm); 0 for the others
    last_layer: attention of the last layer alone, over the places where the features came in; with `last_own` a row
        sums to 1. None for ttm and concat, which have no such layer
    memory: of a Token Turing Machine
    """

    kind: str
    scope: str
    rollout: Float[np.ndarray, "chunk m source token"]
    own: Float[np.ndarray, "chunk m"]
    last_layer: Float[np.ndarray, "chunk m source token"] | None = None
    last_own: Float[np.ndarray, "chunk m"] | None = None
    memory: MemoryReading | None = None


def read_combiner(
    combiner: nn.Module,
    kind: str,
    video: Float[Tensor, "1 chunk video_token width"],
    audio: Float[Tensor, "1 chunk audio_token width"],
) -> tuple[CombinerReading, Float[Tensor, "1 chunk m width"]]:
    """What the Combiner reads of the features of one clip, and its x.

    Raises:
        UserError: a Combiner of a kind that cannot be explained.
    """
    if isinstance(combiner, TokenTuringCombiner):
        return _read_token_turing(combiner, kind, video, audio)
    if isinstance(combiner, ConcatCombiner):
        x = combiner(video, audio)
        chunks, tokens = x.shape[1:3]
        rollout = np.einsum("tu,ij->tiuj", np.eye(chunks), np.eye(tokens)).astype(np.float32)
        return CombinerReading(kind, "chunk", rollout, np.zeros((chunks, tokens), np.float32)), x
    if isinstance(combiner, LateFusionCombiner):
        return _read_late_fusion(combiner, kind, video, audio)
    if not isinstance(combiner, StackCombiner | PerceiverCombiner):
        raise UserError(f"combiner.kind={kind!r}: what it reads cannot be shown: only of transformer, cls, perceiver, "
                        "ttm, late and concat")  # fmt: skip
    with record_attention(list_attention(combiner)) as layers:
        x = combiner(video, audio)
    sizes = Sizes(video.shape[1], video.shape[2] + audio.shape[2], combiner.m)
    follow = _follow_perceiver if isinstance(combiner, PerceiverCombiner) else _follow_stack
    rollout, own, last, last_own = follow(layers, sizes, combiner.scope == "chunk")
    order = _find_order(combiner, video.shape[2], audio.shape[2])
    reading = CombinerReading(
        kind, combiner.scope, _sort_tokens(rollout, order), _to_numpy(own), _sort_tokens(last, order),
        _to_numpy(last_own),
    )  # fmt: skip
    return reading, x


def _read_late_fusion(
    combiner: LateFusionCombiner, kind: str, video: Tensor, audio: Tensor
) -> tuple[CombinerReading, Tensor]:
    """Each modality through the stack by itself: the first half of m reads tubes alone, the other patches alone."""
    alone = combiner.scope == "chunk"
    sizes = video.shape[2], audio.shape[2]
    features, rollouts, lasts = [], [], []
    for tokens, padding in zip(combiner.tokens(video, audio), ((0, sizes[1]), (sizes[0], 0)), strict=True):
        with record_attention(list_attention(combiner)) as layers:
            features.append(combiner.compress(tokens))
        rollout, _, last, _ = _follow_stack(layers, Sizes(*tokens.shape[1:3], features[-1].shape[2]), alone)
        rollouts.append(F.pad(rollout, padding))
        lasts.append(F.pad(last, padding))
    rollout, last = (_to_numpy(torch.cat(parts, dim=1)) for parts in (rollouts, lasts))
    none = np.zeros(rollout.shape[:2], np.float32)
    return CombinerReading(kind, combiner.scope, rollout, none, last, none), torch.cat(features, dim=2)


@dataclass(frozen=True)
class Sizes:
    """Numbers of chunks, of features of a chunk that the Combiner reads, and of features that it makes."""

    chunks: int
    tokens: int
    m: int


def follow_back(
    last: Float[Tensor, "row place"], layers: list[Float[Tensor, "place place"]]
) -> Float[Tensor, "row place"]:
    """The rows of a mixture of the last layer's inputs as one of the first layer's: through every layer in between,
    half residual and half attention."""
    for weights in reversed(layers):
        last = 0.5 * last + 0.5 * last @ weights
    return last


def _follow_stack(
    layers: list[Float[Tensor, "batch query key"]], sizes: Sizes, alone: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rollout and last layer of a block-causal stack (`alone`: every chunk is a sequence of its own, the batch's), and
    the shares of the learned tokens that may follow the features of a chunk."""
    *first, final = layers
    length = final.shape[2] if alone else final.shape[2] // sizes.chunks  # of a chunk, learned tokens included
    places = torch.arange(length, device=final.device)
    places = places if alone else torch.arange(length * sizes.chunks, device=final.device)
    last = places.unflatten(0, (-1, length))[:, -sizes.m :].flatten()  # the outputs that become x
    residual = F.one_hot(last, len(places)).to(final)
    found = []
    for row, weights in enumerate(final):
        found.append(follow_back(0.5 * residual + 0.5 * weights, [layer[row] for layer in first]))
    rollout, raw = (_split_places(each, sizes, alone, length) for each in (torch.stack(found), final))
    return *rollout, *raw


def _split_places(
    weights: Float[Tensor, "batch row place"], sizes: Sizes, alone: bool, length: int
) -> tuple[Float[Tensor, "chunk m source token"], Float[Tensor, "chunk m"]]:
    """Weights over places as those over the features of source chunks, and the sum of the learned tokens'."""
    if alone:
        spread = weights.new_zeros(sizes.chunks, sizes.m, sizes.chunks, length)
        own = torch.arange(sizes.chunks, device=weights.device)
        spread[own, :, own] = weights
    else:
        spread = weights[0].unflatten(1, (sizes.chunks, length)).unflatten(0, (sizes.chunks, sizes.m))
    return spread[..., : sizes.tokens], spread[..., sizes.tokens :].sum(dim=(2, 3))


def _follow_perceiver(
    layers: list[Float[Tensor, "batch latent key"]], sizes: Sizes, alone: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of latents that attend to features, which are equal at all layers, and to the latents of their chunk."""
    latents = layers[0].shape[1]
    features = layers[0].shape[2] - latents
    of_features = torch.zeros_like(layers[0][..., :features])
    of_latents = torch.eye(latents, device=layers[0].device).expand(len(layers[0]), -1, -1)
    for weights in layers:
        to_features, to_latents = weights.split([features, latents], dim=2)
        of_features = 0.5 * of_features + 0.5 * (to_features + to_latents @ of_features)
        of_latents = 0.5 * of_latents + 0.5 * to_latents @ of_latents
    length = sizes.tokens
    rollout, _ = _split_places(of_features, sizes, alone, length)
    last, _ = _split_places(layers[-1][..., :features], sizes, alone, length)
    shape = (sizes.chunks, sizes.m)
    last_own = layers[-1][..., features:].sum(dim=2).reshape(shape)
    return rollout, of_latents.sum(dim=2).reshape(shape), last, last_own


def _read_token_turing(
    combiner: TokenTuringCombiner, kind: str, video: Tensor, audio: Tensor
) -> tuple[CombinerReading, Tensor]:
    scores: dict[nn.Module, list[Tensor]] = {combiner.read: [], combiner.write: [], combiner.output_hidden: []}

    def keep(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scores[module].append(output[0].float())

    def keep_scores(learner: TokenLearner) -> torch.utils.hooks.RemovableHandle:
        return learner.scores.register_forward_hook(lambda _module, given, output: keep(learner, given, output))

    hooks = [
        keep_scores(combiner.read),
        keep_scores(combiner.write),
        combiner.output_hidden.register_forward_hook(keep),
    ]
    try:
        with record_attention(list_attention(combiner.process)) as layers:
            x = combiner(video, audio)
    finally:
        for hook in hooks:
            hook.remove()
    chunks, tokens = video.shape[1], video.shape[2] + audio.shape[2]
    read, write = ([each.softmax(dim=0).T for each in scores[part]] for part in (combiner.read, combiner.write))
    depth = len(layers) // chunks
    account = MemoryAccount(chunks, tokens, combiner.memory_shape[0])
    rollout = []
    for chunk in range(chunks):
        through = [layer[0] for layer in layers[chunk * depth : (chunk + 1) * depth]]
        process = follow_back(torch.eye(len(through[0]), device=x.device), through)
        output = weigh_outputs(combiner, scores[combiner.output_hidden][chunk])
        rollout.append(account.process_chunk(chunk, read[chunk], process, write[chunk], output))
    shares = torch.stack(rollout)
    content = torch.stack(account.memories)
    memory = MemoryReading(
        _to_numpy(torch.stack(read)), _to_numpy(torch.stack(write)),
        _to_numpy(content[..., 1:].unflatten(2, (chunks, tokens)).sum(dim=3)), _to_numpy(content[..., 0]),
    )  # fmt: skip
    rolled = _to_numpy(shares[..., 1:].unflatten(2, (chunks, tokens)))
    return CombinerReading(kind, "past", rolled, _to_numpy(shares[..., 0]), memory=memory), x


def weigh_outputs(combiner: TokenTuringCombiner, hidden: Float[Tensor, "width hidden"]) -> Float[Tensor, "m read"]:
    """How much each of the m outputs depends on each processed token, as shares that sum to 1: the absolute derivative
    of the output MLP, which works over tokens and has no attention, averaged over the width."""
    # The derivative of the GELU: Φ(u) + u φ(u).
    slope = 0.5 * (1 + torch.erf(hidden / 2**0.5)) + hidden * torch.exp(-0.5 * hidden**2) / (2 * torch.pi) ** 0.5
    first, second = combiner.output_hidden.weight.float(), combiner.output.weight.float()
    total = torch.stack([((row * slope) @ first).abs().mean(dim=0) for row in second])
    return total / total.sum(dim=1, keepdim=True)


class MemoryAccount:
    """Where the tokens of a Token Turing Machine come from: shares over the empty memory (place 0) and the tokens of
    all chunks. The memory begins as the empty one; reading and writing are convex mixtures, and so are the shares.

    memories: of the memory after each chunk so far, [memory, 1 + chunk * token] each
    """

    def __init__(self, chunks: int, tokens: int, memory: int):
        self.tokens, self.memory = tokens, memory
        self.size = 1 + chunks * tokens
        self.memories: list[Tensor] = []

    def process_chunk(
        self,
        chunk: int,
        read: Float[Tensor, "read input"],
        process: Float[Tensor, "read read"],
        write: Float[Tensor, "memory written"],
        output: Float[Tensor, "m read"],
    ) -> Float[Tensor, "m source"]:
        """Adds the memory after the chunk; returns the shares of its m outputs."""
        before = self.memories[-1] if self.memories else F.one_hot(torch.zeros(self.memory).long(), self.size)
        first = 1 + chunk * self.tokens
        features = F.one_hot(torch.arange(first, first + self.tokens), self.size)
        inputs = torch.cat([before.to(read), features.to(read)])
        processed = process @ (read @ inputs)
        self.memories.append(write @ torch.cat([inputs, processed]))
        return output @ processed


def _find_order(combiner: AttentionCombiner, video_tokens: int, audio_tokens: int) -> list[int]:
    """For each token, tubes first and then patches, its place in the sequence of a chunk."""
    numbers = torch.arange(video_tokens + audio_tokens, dtype=torch.float32)[None, None, :, None]
    joined = combiner.join(*numbers.split([video_tokens, audio_tokens], dim=2)).flatten().long()
    return joined.argsort().tolist()


def _sort_tokens(weights: Float[Tensor, "chunk m source place"], order: list[int]) -> np.ndarray:
    return _to_numpy(weights[..., order])


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
