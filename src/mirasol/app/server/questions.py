"""A question while it is being answered: how its tokens are chosen, and the text they make so far."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mirasol.evaluation.answer import REPLACEMENT
from mirasol.media.tokenizer import TextCoder
from mirasol.model.outputs import MirasolEncoderOutput


@dataclass(frozen=True)
class Choosing:
    """How an answer's tokens are chosen.

    temperature: 0 takes the most likely one; top_p: draws among the most likely ones that together have this share
    stop: texts at which the answer ends, which are left out. alternatives: how many likely tokens are reported for each
    """

    max_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    alternatives: int = 0


@dataclass(frozen=True)
class ChosenToken:
    """A token of an answer: its log-probability under the model, and the most likely tokens in its place."""

    id: int
    log_probability: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """More of an answer: `text` and the tokens since the last piece. reason: why it ends here, "stop" or "length"."""

    text: str
    tokens: tuple[ChosenToken, ...] = ()
    reason: str | None = None
    error: Exception | None = None


@dataclass
class Question:
    """A question about one encoded clip, for the thread of the model.

    prompt: ids from <bos> to <sep>. on_piece: called in that thread. is_cancelled: nobody waits for the answer.
    """

    encoded: MirasolEncoderOutput
    prompt: list[int]
    choosing: Choosing
    processor: TextCoder
    on_piece: Callable[[Piece], None]
    is_cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    _shown: str = ""
    _pending: list[ChosenToken] = field(default_factory=list)
    _generator: torch.Generator | None = None

    @property
    def probability(self) -> float:
        """Of exactly this answer under the model, its end included."""
        return math.exp(self.log_probability)

    def choose(self, logits: Float[Tensor, " vocabulary"]) -> ChosenToken:
        """The next token."""
        likelihood = logits.float().log_softmax(-1)
        choosing = self.choosing
        number = int(likelihood.argmax()) if choosing.temperature == 0 else self._draw(logits.float())
        top = likelihood.topk(min(choosing.alternatives, len(likelihood))) if choosing.alternatives else None
        others = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return ChosenToken(number, float(likelihood[number]), others)

    def _draw(self, logits: Float[Tensor, " vocabulary"]) -> int:
        """A token at random, from a generator of this question alone, whatever is answered with it."""
        if self._generator is None:
            self._generator = torch.Generator()
            if self.choosing.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.choosing.seed)
        # In float64: a temperature near 0 must not overflow.
        shares = (logits.double().cpu() / self.choosing.temperature).softmax(-1)
        if self.choosing.top_p < 1:
            ordered, places = shares.sort(descending=True)
            ordered[ordered.cumsum(0) - ordered >= self.choosing.top_p] = 0  # the first one always stays
            shares = torch.zeros_like(shares).scatter(0, places, ordered)
        return int(torch.multinomial(shares, 1, generator=self._generator))

    def take(self, token: ChosenToken, end: int) -> bool:
        """Adds the next token and passes on what can be shown of the text. Returns whether the answer is complete."""
        self.log_probability += token.log_probability
        if token.id == end:
            return self._finish("stop")
        self.ids.append(token.id)
        self._pending.append(token)
        text = self.processor.decode(self.ids).lstrip()
        place = find_stop(text, self.choosing.stop)
        if place is not None:
            return self._finish("stop", text[:place])
        if len(self.ids) >= self.choosing.max_tokens:
            return self._finish("length")
        shown = hold_back(text, self.choosing.stop)
        if len(shown) > len(self._shown):
            self._show(shown, None)
        return False

    def fail(self, error: Exception) -> None:
        """Passes on why there is no answer."""
        self.on_piece(Piece("", error=error))

    def _finish(self, reason: str, text: str | None = None) -> bool:
        self._show((self.processor.decode(self.ids) if text is None else text).strip(), reason)
        return True

    def _show(self, text: str, reason: str | None) -> None:
        piece = Piece(text[len(self._shown) :], tuple(self._pending), reason)
        self._shown, self._pending = text, []
        self.on_piece(piece)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops begins in the text."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def hold_back(text: str, stops: Sequence[str]) -> str:
    """As much of the text as no later token can change: without the beginning of a stop, of a character of several
    bytes, or spaces that may turn out to be the last ones."""
    if text.endswith(REPLACEMENT):
        return ""
    cut = len(text)
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                cut = min(cut, len(text) - length)
                break
    return text[:cut].rstrip()
