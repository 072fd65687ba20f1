"""The tokenizer (byte-level BPE trained on the data's own text), and prompts and targets as rows of its token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mirasol.config.parts import IGNORED_LABEL, LONGEST_TEXT
from mirasol.errors import UserError, quote_text
from mirasol.media.feature_extractor import MirasolFeatureExtractor

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<sep>", "<unk>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of at most `vocab_size` pieces (fewer when the text has no more to merge).

    Ids 0 to 4 are <pad> <bos> <eos> <sep> <unk>. Encoding and decoding gives the training text back unchanged. With
    room for all 256 bytes (261 pieces and more) that holds for any text; a smaller vocabulary knows only the bytes of
    its training text and gives <unk> for others. The same texts give the same tokenizer.

    Raises:
        UserError: no text, or `vocab_size` is too small for the bytes that occur.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    texts = list(texts)
    if not any(texts):
        raise UserError("no text to train a tokenizer on")
    alphabet = _choose_alphabet(texts, vocab_size)
    # A word is the same piece at the start of an answer as inside a sentence, because every text begins with a space;
    # the decoder takes that one space away again.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        sep_token="<sep>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        # Text that happens to read "<eos>" is text: only the processor places special tokens.
        split_special_tokens=True,
    )


def _choose_alphabet(texts: list[str], vocab_size: int) -> list[str]:
    """The byte symbols of the vocabulary: all 256 where they fit, otherwise those that occur in the texts."""
    from tokenizers import pre_tokenizers

    room = vocab_size - len(SPECIAL_TOKENS)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    if room >= len(symbols):
        return symbols
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    used = sorted({symbol for text in texts for piece, _ in byte_level.pre_tokenize_str(text) for symbol in piece})
    if len(used) > room:
        raise UserError(
            f"vocab_size={vocab_size} is too small: the text uses {len(used)} different bytes and "
            f"{len(SPECIAL_TOKENS)} pieces are special; take at least {len(used) + len(SPECIAL_TOKENS)}"
        )
    return used


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
        prompts = flatten_texts(prompts, "prompts")
        prompt_ids = self.ids(prompts)
        if targets is None:
            rows = [[self.tokenizer.bos_token_id, *ids, self.tokenizer.sep_token_id] for ids in prompt_ids]
            self.check_lengths(rows, prompts)
            return _make_text_batch(rows, None, self.tokenizer.pad_token_id)
        targets = flatten_texts(targets, "targets")
        if len(targets) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(targets)} targets: give one target per prompt")
        rows, labels = [], []
        for prompt, target in zip(prompt_ids, self.ids(targets), strict=True):
            prefix = [self.tokenizer.bos_token_id, *prompt, self.tokenizer.sep_token_id]
            answer = [*target, self.tokenizer.eos_token_id]
            rows.append(prefix + answer)
            labels.append([IGNORED_LABEL] * len(prefix) + answer)
        self.check_lengths(rows, [f"{p} -> {t}" for p, t in zip(prompts, targets, strict=True)])
        return _make_text_batch(rows, labels, self.tokenizer.pad_token_id)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def check_lengths(self, rows: list[list[int]], texts: list[str]) -> None:
        """Raises UserError, quoting the beginning and end of its text, for a row that is too long."""
        for row, text in zip(rows, texts, strict=True):
            if len(row) > self.max_length:
                raise UserError(
                    f"text of {len(row)} tokens exceeds max_text_length={self.max_length}: shorten {quote_text(text)}"
                )


def flatten_texts(texts: str | Sequence[str] | Sequence[Sequence[str]], name: str) -> list[str]:
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


def _make_text_batch(rows: list[list[int]], labels: list[list[int]] | None, pad: int) -> BatchFeature:
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


class TextCoder:
    """Texts to ids and back, for whatever has a `tokenizer` and a `max_text_length`."""

    tokenizer: PreTrainedTokenizerBase
    max_text_length: int

    @property
    def text_rows(self) -> TextRows:
        """What turns texts into rows of ids."""
        return TextRows(self.tokenizer, self.max_text_length)

    def encode_text(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[str]],
        targets: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> BatchFeature:
        """Text rows: decoder_input_ids and decoder_attention_mask [N, L], with targets also labels [N, L].

        Without targets rows end in <sep> and are padded at the left, ready for `generate`. With targets they are
        complete and padded at the right; labels are the ids on target tokens and <eos>, -100 elsewhere.

        Raises:
            UserError: numbers of prompts and targets differ, lists of unequal length, or a text that is too long.
        """
        return self.text_rows.encode(prompts, targets)

    def candidates(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[str]],
        candidates: Sequence[str] | Sequence[Sequence[str]],
    ) -> BatchFeature:
        """Prompts and the answers to choose from, for the model's `score`. `candidates` are one list for all prompts,
        or a list for each prompt, of any lengths.

        decoder_input_ids, decoder_attention_mask [N, L]: as `encode_text` gives prompts. candidate_ids [N, C, K]: each
        candidate and <eos>, padded at the right; candidate_mask bool [N, C, K]: False on padding, all over where a
        prompt has fewer candidates than another.

        Raises:
            UserError: an empty candidate, a prompt without any, numbers that do not match, or a text that is too long.
        """
        prompts = flatten_texts(prompts, "prompts")
        batch = self.encode_text(prompts)
        if not candidates or isinstance(candidates, str):
            raise UserError(f"candidates={candidates!r}: give a list of texts, or one list for each prompt")
        if all(isinstance(candidate, str) for candidate in candidates):
            candidates = [candidates] * len(prompts)
        if len(candidates) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(candidates)} lists of candidates: give one per prompt")
        lengths = batch["decoder_attention_mask"].sum(1).tolist()
        rows = [self._candidate_ids(*each) for each in zip(prompts, lengths, candidates, strict=True)]
        shape = (len(rows), max(map(len, rows)), max(len(ids) for row in rows for ids in row))
        batch["candidate_ids"] = torch.full(shape, self.tokenizer.pad_token_id)
        batch["candidate_mask"] = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            for place, ids in enumerate(row):
                batch["candidate_ids"][number, place, : len(ids)] = torch.tensor(ids)
                batch["candidate_mask"][number, place, : len(ids)] = True
        return batch

    def decode_answers(self, ids: Tensor | np.ndarray | Sequence[Sequence[int]]) -> list[str]:
        """The answer of every row: the text after the <sep> of its prompt, or all of it in a row without one.

        Takes what `generate` returns, and labels: negative ids are ignored, with which trainers pad and mask.
        """
        sep, rows = self.tokenizer.sep_token_id, []
        for row in ids:
            row = [int(token) for token in row]
            start = row.index(sep) + 1 if sep in row else 0
            rows.append([token for token in row[start:] if token >= 0])
        return [self.decode(row) for row in rows]

    def decode(
        self, token_ids: Tensor | np.ndarray | Sequence[int], skip_special_tokens: bool = True, **options: Any
    ) -> str:
        """Ids of one text back to the text. `options` are those of the tokenizer's `decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **options)

    def batch_decode(
        self, sequences: Tensor | np.ndarray | Sequence[Sequence[int]], skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens, **options) for row in sequences]

    def _candidate_ids(self, prompt: str, prompt_length: int, texts: Sequence[str]) -> list[list[int]]:
        if not texts or isinstance(texts, str):
            raise UserError(f"candidates={texts!r} of {prompt!r}: give a list of at least one text")
        rows = [[*ids, self.tokenizer.eos_token_id] for ids in self.text_rows.ids(list(texts))]
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) == 1:
                raise UserError(f"candidate {text!r} of {prompt!r} is empty: there is nothing to score")
            self.text_rows.check_lengths([[0] * prompt_length + ids], [f"{prompt} -> {text}"])
        return rows


@dataclass
class AnsweringProcessor(TextCoder):
    """What is needed of a `MirasolProcessor` to answer questions, without the half of transformers that its base class
    imports."""

    feature_extractor: MirasolFeatureExtractor
    tokenizer: PreTrainedTokenizerBase
    max_text_length: int = LONGEST_TEXT
