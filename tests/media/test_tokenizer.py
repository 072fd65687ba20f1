"""The tokenizer that is trained on the data's text."""

import pytest

from mirasol import UserError
from mirasol.media.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = [
    "what comes after the bell?",
    "red circle left , low bell",
    "  two leading spaces and a trailing one ",
    "naïve café, 字, 😀",
    "tab\tand\nnewline",
    "",
    " ",
]


@pytest.mark.parametrize("size", [256, 300, 1000, 256_000])
def test_training_text_comes_back_unchanged_at_every_size(size):
    tokenizer = train_tokenizer(TEXTS, size)
    assert len(tokenizer) <= size
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_any_text_comes_back_where_all_bytes_fit():
    tokenizer = train_tokenizer(["a b c"], 512)
    text = "Ünseen – 漢字 🎬 <not a token>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_have_their_ids_and_text_cannot_forge_them():
    tokenizer = train_tokenizer(TEXTS, 512)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id) == (
        0,
        1,
        2,
        3,
    )
    ids = tokenizer("<eos><sep> <bos>", add_special_tokens=False)["input_ids"]
    assert min(ids) > 4


def test_a_word_is_the_same_piece_first_or_later():
    tokenizer = train_tokenizer(["red blue", "blue red"] * 9, 400)
    red, blue = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("red", "blue"))
    assert len(red) == len(blue) == 1
    assert tokenizer("blue red", add_special_tokens=False)["input_ids"] == blue + red


def test_the_same_text_gives_the_same_tokenizer():
    first, second = (train_tokenizer(iter(TEXTS * 3), 400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_vocabulary_too_small_for_the_text_is_refused():
    with pytest.raises(UserError, match="vocab_size=20 is too small"):
        train_tokenizer(TEXTS, 20)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300)
