"""The tokenizer: byte-level BPE trained on the data's own text."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from mirasol.errors import UserError

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
    alphabet = _alphabet(texts, vocab_size)
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


def _alphabet(texts: list[str], vocab_size: int) -> list[str]:
    """The byte symbols of the vocabulary: all 256 where they fit, otherwise those that occur in the texts."""
    from tokenizers import pre_tokenizers

    room = vocab_size - len(SPECIAL_TOKENS)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    if room >= len(symbols):
        return symbols
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    seen = sorted({symbol for text in texts for piece, _ in byte_level.pre_tokenize_str(text) for symbol in piece})
    if len(seen) > room:
        raise UserError(
            f"vocab_size={vocab_size} is too small: the text uses {len(seen)} different bytes and "
            f"{len(SPECIAL_TOKENS)} pieces are special; take at least {len(seen) + len(SPECIAL_TOKENS)}"
        )
    return seen
