"""Texts that are longer than a model takes in training: found before the first step, refused, left out or cut."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mirasol.config.recipe import DataRecipe
from mirasol.data.datasets.registry import locate_examples
from mirasol.data.example import Example
from mirasol.errors import UserError, quote_text
from mirasol.files import write_file_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = 3  # <bos> prompt <sep> target <eos>
# Tokens of each of some texts, without special tokens.
CountTokens = Callable[[Sequence[str]], list[int]]
_EXAMPLES_AT_ONCE = 4096


@dataclass(frozen=True)
class LongText:
    """An example whose row of text has more `tokens` than the limit; `place` is its annotation's file and line.

    at_least: the tokens are only the least that there can be, counted before there is a tokenizer
    """

    id: str
    place: str
    tokens: int
    text: str
    at_least: bool = False

    def __str__(self) -> str:
        least = "at least " if self.at_least else ""
        return f"{self.place}: {least}{self.tokens} tokens: {quote_text(self.text)}"


def make_counter(tokenizer: "PreTrainedTokenizerBase | None") -> CountTokens:
    """Counts tokens by a tokenizer; without one, the least that any tokenizer of `train_tokenizer` can give: it merges
    nothing across the words and marks that it splits a text into first."""
    if tokenizer is not None:
        settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return lambda texts: list(map(len, tokenizer(list(texts), **settings)["input_ids"]))
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return lambda texts: [len(split.pre_tokenize_str(text)) for text in texts]


def count_row_tokens(examples: Iterable[Example], count: CountTokens) -> Iterator[tuple[Example, int]]:
    """Each example with the tokens of its row of text, of the longest where its target is drawn at random."""
    block: list[Example] = []
    for example in examples:
        block.append(example)
        if len(block) == _EXAMPLES_AT_ONCE:
            yield from _count_block(block, count)
            block = []
    yield from _count_block(block, count)


def _count_block(examples: Sequence[Example], count: CountTokens) -> Iterator[tuple[Example, int]]:
    texts = list(dict.fromkeys(text for example in examples for text in (example.prompt, *list_targets(example))))
    lengths = dict(zip(texts, count(texts), strict=True)) if texts else {}
    for example in examples:
        target = max(lengths[text] for text in list_targets(example))
        yield example, SPECIAL_TOKENS + lengths[example.prompt] + target


def list_targets(example: Example) -> tuple[str, ...]:
    """All texts that training may take as the example's target."""
    return example.references if example.random_target else (example.target,)


def find_long_texts(examples: Iterable[Example], count: CountTokens, limit: int) -> dict[str, int]:
    """The tokens of the examples that have more than `limit`, by id."""
    return {example.id: tokens for example, tokens in count_row_tokens(examples, count) if tokens > limit}


@dataclass(frozen=True)
class TextLimit:
    """What becomes of texts of more than `tokens` tokens, special ones included, in training and validation.

    policy: `data.on_long_text`
    learned: whether the model has no positions beyond, so that the limit cannot be raised
    """

    data: DataRecipe
    tokens: int
    learned: bool

    def apply(
        self, examples: Mapping[str, list[Example]], part: str, tokenizer: "PreTrainedTokenizerBase | None"
    ) -> tuple[dict[str, list[Example]], list[LongText]]:
        """The examples of each data set with the policy applied, and those that are too long.

        part: "train" or "validation"
        tokenizer: None while there is none: then the texts are found that are too long for any

        Raises UserError, naming the first of them, with `on_long_text: error`.
        """
        count, kept, found = make_counter(tokenizer), {}, []
        for name, own in examples.items():
            tokens = find_long_texts(own, count, self.tokens)
            kept[name] = own
            if not tokens:
                continue
            long = self._describe(name, part, own, tokens, at_least=tokenizer is None)
            if self.data.on_long_text == "error":
                raise UserError(self._explain(long, part, len(own)))
            if self.data.on_long_text == "skip":
                kept[name] = [example for example in own if example.id not in tokens]
            elif tokenizer is not None:
                kept[name] = [self._cut(example, count) if example.id in tokens else example for example in own]
            else:
                continue  # cut once there is a tokenizer, which then counts them
            found += long
        return kept, found

    def _describe(
        self, name: str, part: str, examples: Sequence[Example], tokens: Mapping[str, int], at_least: bool
    ) -> list[LongText]:
        data_set = self.data.data_sets[name]
        split = data_set.train_split if part == "train" else data_set.validation_split
        assert split is not None
        places = locate_examples(data_set.dataset, Path(data_set.root), split, data_set.options, tokens.keys())
        return [
            LongText(e.id, places[e.id], tokens[e.id], f"{e.prompt} -> {max(list_targets(e), key=len)}", at_least)
            for e in examples
            if e.id in tokens
        ]

    def _explain(self, long: Sequence[LongText], part: str, total: int) -> str:
        most = max(text.tokens for text in long)
        fix = f"set data.max_text_length={most} or more, or "
        if self.learned:
            fix = "the model has no positions beyond: "
        elif any(text.at_least for text in long):
            fix = "set data.max_text_length higher, or "
        return (
            f"{len(long)} of {total} {part} examples have texts over max_text_length={self.tokens} tokens, the first: "
            f"{long[0]}: {fix}data.on_long_text to skip or truncate"
        )

    def _cut(self, example: Example, count: CountTokens) -> Example:
        """The example with its prompt or target cut at the end, the longer one first, so that they fit."""
        room = self.tokens - SPECIAL_TOKENS
        [prompt], targets = count([example.prompt]), count(list_targets(example))
        # Each may have half of the room, and what the other leaves.
        for_prompt = max(room // 2, room - max(targets))
        cut = cut_text(example.prompt, for_prompt, count) if prompt > for_prompt else example.prompt
        for_target = room - count([cut])[0]
        texts = tuple(
            cut_text(text, for_target, count) if tokens > for_target else text
            for text, tokens in zip(list_targets(example), targets, strict=True)
        )
        if not example.random_target:
            return replace(example, prompt=cut, target=texts[0])
        return replace(example, prompt=cut, target=texts[0], references=texts)


def cut_text(text: str, most: int, count: CountTokens) -> str:
    """The longest beginning of a text with at most `most` tokens, up to the end of a word if it has one."""
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count([text[:middle]])[0] <= most:
            fits = middle
        else:
            too_long = middle
    cut = text[:fits]
    if not text[fits : fits + 1].isspace() and len(cut.split()) > 1:
        cut = cut[: -len(cut.split()[-1])] if not cut[-1:].isspace() else cut
    return cut.rstrip()


def write_long_texts(file: Path, found: Mapping[str, Collection[LongText]]) -> None:
    """Writes one line per long text, with the part that it is of."""
    rows = ({"part": part, **asdict(text)} for part, own in found.items() for text in own)
    write_file_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
