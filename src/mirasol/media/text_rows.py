"""Prompts and targets as rows of token ids, without the processor: loading processes do with the tokenizer alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase

from mirasol.errors import UserError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TextRows:
    """Rows <bos> prompt <sep> target <eos> of at most `max_length` tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def encode(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[str]],
        targets: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> BatchFeature:
        """As `MirasolProcessor.encode_text`."""
        prompts = flat(prompts, "prompts")
        prompt_ids = self.ids(prompts)
        if targets is None:
            rows = [[self.tokenizer.bos_token_id, *ids, self.tokenizer.sep_token_id] for ids in prompt_ids]
            self.check_lengths(rows, prompts)
            return _text_batch(rows, None, self.tokenizer.pad_token_id)
        targets = flat(targets, "targets")
        if len(targets) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(targets)} targets: give one target per prompt")
        rows, labels = [], []
        for prompt, target in zip(prompt_ids, self.ids(targets), strict=True):
            prefix = [self.tokenizer.bos_token_id, *prompt, self.tokenizer.sep_token_id]
            answer = [*target, self.tokenizer.eos_token_id]
            rows.append(prefix + answer)
            labels.append([IGNORED_LABEL] * len(prefix) + answer)
        self.check_lengths(rows, [f"{p} -> {t}" for p, t in zip(prompts, targets, strict=True)])
        return _text_batch(rows, labels, self.tokenizer.pad_token_id)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def check_lengths(self, rows: list[list[int]], texts: list[str]) -> None:
        """Raises UserError, quoting its text, for a row that is too long."""
        for row, text in zip(rows, texts, strict=True):
            if len(row) > self.max_length:
                raise UserError(
                    f"text of {len(row)} tokens exceeds max_text_length={self.max_length}: shorten {text!r}"
                )


def flat(texts: str | Sequence[str] | Sequence[Sequence[str]], name: str) -> list[str]:
    """One text, a list, or a list of equally long lists, as one list in which the texts of a clip stay together."""
    if isinstance(texts, str):
        return [texts]
    texts = list(texts)
    if not texts:
        raise UserError(f"{name} is empty: give at least one text")
    if all(isinstance(text, str) for text in texts):
        return texts
    lengths = sorted({len(group) for group in texts})
    if len(lengths) > 1 or any(isinstance(group, str) for group in texts):
        raise UserError(f"{name}: lists of {lengths} texts per clip, but every clip needs the same number")
    return [text for group in texts for text in group]


def _text_batch(rows: list[list[int]], labels: list[list[int]] | None, pad: int) -> BatchFeature:
    longest = max(map(len, rows))
    if labels is None:
        data = {
            "decoder_input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "decoder_attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
    else:
        data = {
            "decoder_input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "decoder_attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "labels": torch.tensor([row + [IGNORED_LABEL] * (longest - len(row)) for row in labels]),
        }
    return BatchFeature(data)
