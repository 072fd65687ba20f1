"""Continuous batching: the questions being answered take each step together, and join and leave between steps."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache

from mirasol.app.server.questions import Question
from mirasol.model.mirasol import MirasolNetwork

Layers = dict[int, tuple[Tensor, Tensor]]  # keys and values, each [row, head, token, head width], by layer


class DecodingBatch:
    """The questions that are being answered, one row each, over clips of any lengths.

    Rows are padded to the longest: texts at the left, latents at the right, both masked, so that a row's answer does
    not depend on the others (but for rounding). Keys and values are copied when a row joins or leaves, not in a step.
    """

    def __init__(self, model: MirasolNetwork):
        self.model, self._zero = model, torch.zeros((), device=model.device)
        self._forget()

    def _forget(self) -> None:
        self.questions: list[Question] = []
        self._cache: EncoderDecoderCache | None = None
        self._mask: Int[Tensor, "row token"] | None = None
        self._latent_mask: Bool[Tensor, "row latent"] | None = None
        self._next: Int[Tensor, "row 1"] | None = None

    def __len__(self) -> int:
        return len(self.questions)

    @torch.inference_mode()
    def join(self, questions: Sequence[Question]) -> None:
        """Reads the prompts of new questions, chooses their first tokens, and adds those that are not complete yet."""
        device, pad = self.model.device, self.model.config.pad_token_id
        longest = max(len(question.prompt) for question in questions)
        missing = [longest - len(question.prompt) for question in questions]
        rows = zip(missing, questions, strict=True)
        ids = torch.tensor([[pad] * count + question.prompt for count, question in rows], device=device)
        mask = torch.tensor([[0] * count + [1] * (longest - count) for count in missing], device=device)
        most = max(question.encoded.last_hidden_state.shape[1] for question in questions)
        latents = torch.cat([_pad_right(q.encoded.last_hidden_state, most, 1) for q in questions])
        latent_mask = torch.cat([_pad_right(q.encoded.latent_mask, most, 1) for q in questions])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden, _ = self.model.text(ids, mask, latents, latent_mask, cache)
        chosen, is_open = self._choose(questions, hidden[:, -1])
        kept = [place for place, open_ in enumerate(is_open) if open_]
        if kept:
            added = [questions[place] for place in kept]
            self._merge(added, _select(cache, kept), mask[kept], latent_mask[kept], chosen[kept])

    @torch.inference_mode()
    def step(self) -> None:
        """One more token of every question; complete ones leave."""
        self._leave([not question.is_cancelled for question in self.questions])
        if not self.questions:
            return
        self._mask = F.pad(self._mask, (0, 1), value=1)
        # The latents' keys and values are in the cache: only the shape of what stands for the latents is read.
        latents = self._zero.expand(*self._latent_mask.shape, self.model.config.latent.stack.width)
        hidden, _ = self.model.text(self._next, self._mask, latents, self._latent_mask, self._cache)
        self._next, is_open = self._choose(self.questions, hidden[:, -1])
        self._leave(is_open)

    def fail(self, error: Exception) -> None:
        """Ends all questions with an error."""
        questions = self.questions
        self._forget()
        for question in questions:
            question.fail(error)

    def _choose(self, questions: Sequence[Question], hidden: Tensor) -> tuple[Int[Tensor, "row 1"], list[bool]]:
        """The next token of each question, and which questions are still open after it."""
        logits, end = self.model.text.logits(hidden).float(), self.model.config.eos_token_id
        tokens = [question.choose(row) for question, row in zip(questions, logits, strict=True)]
        is_open = [not question.take(token, end) for question, token in zip(questions, tokens, strict=True)]
        return torch.tensor([[token.id] for token in tokens], device=hidden.device), is_open

    def _merge(
        self,
        questions: Sequence[Question],
        cache: EncoderDecoderCache,
        mask: Int[Tensor, "row token"],
        latent_mask: Bool[Tensor, "row latent"],
        chosen: Int[Tensor, "row 1"],
    ) -> None:
        """Adds rows to the batch."""
        if self.questions:
            past = max(mask.shape[1], self._mask.shape[1])
            latents = max(latent_mask.shape[1], self._latent_mask.shape[1])
            cache = _join_caches([self._cache, cache], past, latents)
            mask = torch.cat([_pad_left(each, past, 1) for each in (self._mask, mask)])
            latent_mask = torch.cat([_pad_right(each, latents, 1) for each in (self._latent_mask, latent_mask)])
            chosen = torch.cat([self._next, chosen])
        self.questions = [*self.questions, *questions]
        self._cache, self._mask, self._latent_mask, self._next = cache, mask, latent_mask, chosen

    def _leave(self, stays: Sequence[bool]) -> None:
        """Takes rows out, and the padding that no other row needs."""
        if all(stays):
            return
        kept = [place for place, stay in enumerate(stays) if stay]
        if not kept:
            self._forget()
            return
        mask, latent_mask = self._mask[kept], self._latent_mask[kept]
        first = int(mask.any(0).int().argmax())
        latents = int(latent_mask.any(0).nonzero()[-1]) + 1
        self.questions = [self.questions[place] for place in kept]
        self._cache = _select(self._cache, kept, first, latents)
        self._mask, self._latent_mask, self._next = mask[:, first:], latent_mask[:, :latents], self._next[kept]


def _pad_left(tensor: Tensor, length: int, axis: int) -> Tensor:
    """Zeros before an axis, up to a length."""
    return F.pad(tensor, (*(0, 0) * (tensor.ndim - 1 - axis), length - tensor.shape[axis], 0))


def _pad_right(tensor: Tensor, length: int, axis: int) -> Tensor:
    """Zeros after an axis, up to a length."""
    return F.pad(tensor, (*(0, 0) * (tensor.ndim - 1 - axis), 0, length - tensor.shape[axis]))


def _make_cache(own: Layers, crossed: Layers) -> EncoderDecoderCache:
    """A cache of keys and values by layer: those of self-attention and those of the latents."""
    made, latents = DynamicCache(), DynamicCache()
    for index, keys_values in own.items():
        made.update(*keys_values, index)
    for index, keys_values in crossed.items():
        latents.update(*keys_values, index)
    cache = EncoderDecoderCache(made, latents)
    cache.is_updated = dict.fromkeys(crossed, True)
    return cache


def _list_layers(cache: EncoderDecoderCache) -> tuple[Layers, Layers]:
    """Keys and values by layer: those of self-attention, and those of the latents."""
    made, latents = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
    crossed = [index for index, is_there in sorted(cache.is_updated.items()) if is_there]
    return (
        {index: (layer.keys, layer.values) for index, layer in enumerate(made)},
        {index: (latents[index].keys, latents[index].values) for index in crossed},
    )


def _select(
    cache: EncoderDecoderCache, rows: list[int], first: int = 0, latents: int | None = None
) -> EncoderDecoderCache:
    """Some rows of a cache, from one of their tokens on and up to a number of latents."""
    own, crossed = _list_layers(cache)
    return _make_cache(
        {index: tuple(part[rows, :, first:] for part in layer) for index, layer in own.items()},
        {index: tuple(part[rows, :, :latents] for part in layer) for index, layer in crossed.items()},
    )


def _join_caches(caches: Sequence[EncoderDecoderCache], past: int, latents: int) -> EncoderDecoderCache:
    """The rows of several caches in one, padded to `past` tokens and `latents`."""
    layers = [_list_layers(cache) for cache in caches]

    def join(place: int, length: int, pad: Callable[[Tensor, int, int], Tensor]) -> Layers:
        return {
            index: tuple(torch.cat([pad(each[place][index][part], length, 2) for each in layers]) for part in (0, 1))
            for index in layers[0][place]
        }

    return _make_cache(join(0, past, _pad_left), join(1, latents, _pad_right))
