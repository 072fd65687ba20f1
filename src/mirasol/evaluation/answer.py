"""Answering: questions about clips become text, one encoding per clip whatever the number of its questions."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mirasol.config.parts import IGNORED_LABEL
from mirasol.media.processor import MirasolProcessor
from mirasol.model.mirasol import MirasolForConditionalGeneration
from mirasol.model.outputs import MirasolEncoderOutput

T = TypeVar("T")
MAX_NEW_TOKENS = 16
NO_CHARACTER = "\ufffd"  # what bytes that are no whole character decode to


def answer_clips(
    model: MirasolForConditionalGeneration,
    processor: MirasolProcessor,
    clips: Sequence[Mapping[str, Tensor]],
    prompts: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    streamer: BaseStreamer | None = None,
    encoded: MirasolEncoderOutput | None = None,
) -> list[list[str]]:
    """Answers the `prompts` of each of the `clips` (as `MirasolFeatureExtractor.tensors` gives them), greedily.

    The clips are encoded once, as one batch, unless they are `encoded` already; their prompts then are generated
    together. A clip with fewer prompts than another repeats its last one to fill the batch, and the answers to the
    repeats are dropped.
    """
    assert len(clips) == len(prompts)
    filled, width = _filled(prompts), max(len(questions) for questions in prompts)
    text = processor.encode_text(filled).to(model.device)
    with torch.inference_mode():
        ids = model.generate(
            encoder_outputs=encode_clips(model, processor, clips) if encoded is None else encoded,
            **text,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=streamer,
        )
    answers = [answer.strip() for answer in processor.batch_decode(ids[:, text["decoder_input_ids"].shape[1] :])]
    return [answers[row * width : row * width + len(questions)] for row, questions in enumerate(prompts)]


@torch.inference_mode()
def encode_clips(
    model: MirasolForConditionalGeneration, processor: MirasolProcessor, clips: Sequence[Mapping[str, Tensor]]
) -> MirasolEncoderOutput:
    """The clips through the encoder, as one batch."""
    return model.encode(**processor.feature_extractor.collate(clips).to(model.device))


@torch.inference_mode()
def score_clips(
    model: MirasolForConditionalGeneration,
    processor: MirasolProcessor,
    encoded: MirasolEncoderOutput,
    prompts: Sequence[Sequence[str]],
    candidates: Sequence[Sequence[Sequence[str]]],
) -> list[list[list[float]]]:
    """Of every prompt of every clip how likely each of its candidates is: log-likelihood per token, <eos> included."""
    width = max(len(questions) for questions in prompts)
    lists = [each for one in _filled(candidates) for each in one]
    text = processor.candidates(_filled(prompts), lists).to(model.device)
    found = model.score(encoded, **text).per_token.tolist()
    rows = [row[: len(texts)] for row, texts in zip(found, lists, strict=True)]
    return [rows[place * width : place * width + len(questions)] for place, questions in enumerate(prompts)]


def _filled(questions: Sequence[Sequence[T]]) -> list[list[T]]:
    """As many for every clip as for the one with most: the last is repeated."""
    assert all(questions), "every clip needs a prompt"
    width = max(map(len, questions))
    return [[*each, *[each[-1]] * (width - len(each))] for each in questions]


@torch.inference_mode()
def attention_by_chunk(
    model: MirasolForConditionalGeneration,
    processor: MirasolProcessor,
    clip: Mapping[str, Tensor],
    prompts: Sequence[str],
    answers: Sequence[str],
) -> Float[Tensor, "prompt chunk"]:
    """Where the decoder looked while it wrote the answers: one row per prompt, a share per chunk, summing to 1.

    Cross-attention weights averaged over layers, heads and the positions that predict a token of the answer (its end
    included), summed over the latents of a chunk. Bytes of an answer that are no whole character are left out.
    """
    answers = [answer.replace(NO_CHARACTER, "") for answer in answers]
    media = processor.feature_extractor.collate([clip]).to(model.device)
    text = processor.encode_text(list(prompts), list(answers)).to(model.device)
    predicts = (text.pop("labels")[:, 1:] != IGNORED_LABEL).float()
    output = model(encoder_outputs=model.encode(**media), **text, output_attentions=True)
    weights = torch.stack(output.cross_attentions).mean(dim=(0, 2))[:, :-1]
    looked = (weights * predicts[:, :, None]).sum(1) / predicts.sum(1, keepdim=True)
    return looked.unflatten(1, (len(clip["video_mask"]), -1)).sum(-1).cpu()


class AnswerStreamer(BaseStreamer):
    """Hands on the text of one answer piece by piece while `generate` writes it.

    `on_text` gets each new piece. A piece that ends within a character of several bytes is held back until it is whole.
    """

    def __init__(self, processor: MirasolProcessor, on_text: Callable[[str], None]):
        self.processor, self.on_text = processor, on_text
        self.ids: list[int] | None = None  # None until the prompt, which `generate` hands over first, has passed
        self.text = ""

    def put(self, value: Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids.extend(value.reshape(-1).tolist())
        text = self.processor.decode(self.ids).lstrip()
        if not text.endswith(NO_CHARACTER):
            self._show(text)

    def end(self) -> None:
        self._show(self.processor.decode(self.ids or []).strip())

    def _show(self, text: str) -> None:
        if len(text) > len(self.text):
            self.on_text(text[len(self.text) :])
            self.text = text
