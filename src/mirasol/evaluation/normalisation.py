"""The forms in which a generated answer and a target are compared. Every result names the one it used."""

import re
import string
import unicodedata
from collections.abc import Callable

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(answer: str) -> str:
    """Lower case, punctuation and the articles a, an, the taken out, whitespace folded. "The Bell." and "bell" are the
    same answer.

    What would leave nothing is not taken out: "A" is "a" and "?" is "?", so that an empty answer matches neither."""
    lower = " ".join(answer.lower().split())
    words = "".join(" " if _is_punctuation(character) else character for character in lower)
    bare = _ARTICLES.sub(" ", words)
    return " ".join(bare.split() or words.split() or lower.split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def normalise_lightly(answer: str) -> str:
    """Unicode NFC, lower case, whitespace folded, one trailing full stop, question or exclamation mark taken off.

    The public data sets' scripts compare raw strings of lower-case data. This form forgives a generated answer its case
    and closing mark and nothing else: articles stay, as in those scripts."""
    folded = " ".join(unicodedata.normalize("NFC", answer).lower().split())
    return folded[:-1].rstrip() if len(folded) > 1 and folded[-1] in ".?!" else folded


def unchanged(answer: str) -> str:
    """The answer as it stands: the raw comparison of the official scripts."""
    return answer


# By the name that results give them; "light" is how public data sets are scored, "folded" your own folder.
NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "light": normalise_lightly,
    "folded": normalise,
    "none": unchanged,
}
