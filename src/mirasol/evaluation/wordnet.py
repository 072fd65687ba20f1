"""WordNet as its database files have it: lemmas, first senses, Wu-Palmer similarity. Words are compared as in the
scripts that papers use, which go through NLTK 3.3; its rules, odd ones included, are followed and named here."""

from collections import deque
from collections.abc import Callable
from functools import cache

from mirasol.errors import UserError

PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
# Endings that an inflected form may have, and what its lemma has instead (Princeton's "morphy").
_ENDINGS = {
    "n": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
          ("men", "man"), ("ies", "y")),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}  # fmt: skip
_HYPERNYMS = ("@", "@i")

# A sense: part of speech and offset of its line in that part's data file.
Sense = tuple[str, int]
_ROOT: Sense = ("", 0)  # above all verbs, which have no root of their own


class WordNet:
    """The files index.*, data.* and *.exc of WordNet, which `read` gives by name as bytes.

    Raises UserError for a file that does not have WordNet's format.
    """

    def __init__(self, read: Callable[[str], bytes]):
        self._data = {part: read(f"data.{name}") for part, name in PARTS.items()}
        self._index: dict[str, dict[str, list[int]]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        for part, name in PARTS.items():
            try:
                self._index[part] = dict(map(_index_line, _lines(read(f"index.{name}"))))
            except (ValueError, IndexError) as error:
                raise UserError(f"index.{name}: is not in WordNet's format ({error})") from error
            exceptions = (line.split() for line in _lines(read(f"{name}.exc")))
            self._exceptions[part] = {form: lemmas for form, *lemmas in filter(None, exceptions)}
        self.hypernyms = cache(self._hypernyms)
        self.first_sense = cache(self._first_sense)
        self.similarity = cache(self._similarity)

    def lemmas(self, word: str, part: str) -> list[str]:
        """What a form may be inflected from, itself first, as far as WordNet holds it as this part of speech."""
        if word in self._exceptions[part]:
            forms = self._exceptions[part][word]
        else:
            forms = self._without_endings([word], part)
        known = self._known([word, *forms], part)
        # NLTK took endings off again and again until something is known.
        while forms and not known and word not in self._exceptions[part]:
            forms = self._without_endings(forms, part)
            known = self._known(forms, part)
        return known

    def _without_endings(self, forms: list[str], part: str) -> list[str]:
        return [form[: -len(old)] + new for form in forms for old, new in _ENDINGS[part] if form.endswith(old)]

    def _known(self, forms: list[str], part: str) -> list[str]:
        return [form for form in dict.fromkeys(forms) if form in self._index[part]]

    def _first_sense(self, word: str) -> Sense | None:
        """The first sense of a word, as a noun before a verb, adjective, adverb; None of an unknown word."""
        for part in PARTS:
            for lemma in self.lemmas(word.lower(), part):
                return part, self._index[part][lemma][0]
        return None

    def _fields(self, sense: Sense) -> list[str]:
        part, offset = sense
        data = self._data[part]
        fields = data[offset : data.index(b"\n", offset)].decode("utf-8").split()
        if not fields or int(fields[0]) != offset:
            raise UserError(f"data.{PARTS[part]}: no entry at byte {offset}: index and data are of different versions")
        return fields

    def _hypernyms(self, sense: Sense) -> tuple[Sense, ...]:
        """What a sense is a kind or an instance of."""
        if sense == _ROOT:
            return ()
        fields = self._fields(sense)
        first = 5 + 2 * int(fields[3], 16)  # after the words, each with its number, and the number of pointers
        pointers = (fields[first + 4 * k : first + 4 * k + 3] for k in range(int(fields[first - 1])))
        return tuple((part, int(offset)) for kind, offset, part in pointers if kind in _HYPERNYMS)

    def _name(self, sense: Sense) -> str:
        """NLTK's name of a sense, by which it orders equals: "dog.n.01"."""
        if sense == _ROOT:
            return "*ROOT*"
        fields = self._fields(sense)
        word = fields[4].partition("(")[0].lower()  # adjectives may have a marker: "galore(ip)"
        return f"{word}.{fields[2]}.{self._index[sense[0]][word].index(sense[1]) + 1:02d}"

    def _distances(self, sense: Sense, with_root: bool) -> dict[Sense, int]:
        """Steps to everything above a sense, itself included; the root lies above the farthest of them."""
        found: dict[Sense, int] = {}
        waiting = deque([(sense, 0)])
        while waiting:
            one, steps = waiting.popleft()
            if one not in found:
                found[one] = steps
                waiting.extend((above, steps + 1) for above in self.hypernyms(one))
        if with_root and sense != _ROOT:
            found[_ROOT] = max(found.values()) + 1
        return found

    def _depth(self, sense: Sense, choose: Callable[..., int]) -> int:
        above = self.hypernyms(sense)
        return 1 + choose(self._depth(one, choose) for one in above) if above else 0

    def _similarity(self, first: Sense, second: Sense) -> float:
        """Wu and Palmer (1994): twice the depth of the lowest sense above both over the sum of their depths through it.

        0 where nothing is above both. "Lowest" goes by the shortest way to the root, its depth by the longest. Only
        where `first` is a verb there is a root above all; later releases of NLTK put one above adjectives and adverbs,
        too, which changes WUPS by a whole point.
        """
        with_root = first[0] == "v"
        from_first, from_second = self._distances(first, with_root), self._distances(second, with_root)
        shared = from_first.keys() & from_second.keys()
        if not shared:
            return 0.0
        deepest = max(self._depth(one, min) for one in shared)
        lowest = [one for one in shared if self._depth(one, min) == deepest]
        subsumer = first if first in lowest else min(lowest, key=self._name)
        depth = self._depth(subsumer, max) + 1
        above = self._distances(subsumer, with_root)

        def way(below: dict[Sense, int]) -> int:
            """Steps to the subsumer, be it over something above both."""
            return 0 if below[subsumer] == 0 else min(below[one] + above[one] for one in below.keys() & above.keys())

        return 2 * depth / (way(from_first) + way(from_second) + 2 * depth)


def _lines(content: bytes) -> list[str]:
    """The lines of a file below its licence, which is indented."""
    return [line for line in content.decode("utf-8").split("\n") if line and not line.startswith(" ")]


def _index_line(line: str) -> tuple[str, list[int]]:
    """Lemma, part, number of senses, number of kinds of pointers, they, two numbers, the senses' offsets."""
    fields = line.split()
    senses = int(fields[2])
    offsets = [int(offset) for offset in fields[-senses:]]
    if len(fields) != 6 + int(fields[3]) + senses:
        raise ValueError(f"{line[:60]!r}")
    return fields[0], offsets
