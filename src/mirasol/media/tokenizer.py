"""The tokenizer (byte-level BPE trained on the data's own text), and prompts and targets as rows of its token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mirasol.config.parts import IGNORED_LABEL
from mirasol.errors import UserError, quote_text

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
