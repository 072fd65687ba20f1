"""WUPS of open-ended answers as NExT-QA's script computes it (Xiao et al., CVPR 2021; after Malinowski and Fritz 2014):
words of nearly the same meaning count nearly as equal.

WordNet's files and the weights of a part-of-speech tagger come from the user, as a folder of NLTK's data, see
docs/evaluation.md. WordNet's database is read here and not by NLTK: words are compared as in NLTK 3.3, which the script
pins, and later releases find other lemmas. The rules of 3.3, odd ones included, are followed and named below.
"""

import hashlib
import json
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mirasol.errors import UserError

WORDNET = "corpora/wordnet"
TAGGER = "taggers/averaged_perceptron_tagger_eng"
# The script's stop words: NLTK's English ones without those that say where, when and how many. An answer of stop words
# alone becomes empty.
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those here there when where why how
    am is are was were be been being have has had having do does did doing will can just should now
    a an the and but if or because as until while to from of at for with about into through during again further then
    all any each most other some such only own so than too very
    you're you've you'll you'd she's it's that'll don't should've aren't couldn't didn't doesn't hadn't hasn't haven't
    isn't mightn't mustn't needn't shan't shouldn't wasn't weren't won't wouldn't
    s t d m o y ll re ve don ain ma aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan shouldn wasn
    weren won wouldn
    """.split()  # noqa: SIM905
)
EXACT_TYPES = ("DB", "DC")  # yes or no, and counts: equal or wrong
_PARTS = {"NN": "n", "VB": "v", "JJ": "a", "RB": "r"}  # beginnings of Penn Treebank tags
PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
# Endings that an inflected form may have, and what its lemma has instead (Princeton's "morphy").
_ENDINGS = {
    "n": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
_HYPERNYMS = ("@", "@i")

# A sense: part of speech and offset of its line in that part's data file.
Sense = tuple[str, int]
_ROOT: Sense = ("", 0)  # above all verbs, which have no root of their own


class WordNet:
    """WordNet's lemmas, first senses and Wu-Palmer similarity, from its files index.*, data.* and *.exc; `read` returns
    the content of a file by name.

    Raises UserError for a file that does not have WordNet's format.
    """

    def __init__(self, read: Callable[[str], bytes]):
        self._data = {part: read(f"data.{name}") for part, name in PARTS.items()}
        self._index: dict[str, dict[str, list[int]]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        for part, name in PARTS.items():
            try:
                self._index[part] = dict(map(_parse_index_line, _split_lines(read(f"index.{name}"))))
            except (ValueError, IndexError) as error:
                raise UserError(f"index.{name}: is not in WordNet's format ({error})") from error
            exceptions = (line.split() for line in _split_lines(read(f"{name}.exc")))
            self._exceptions[part] = {form: lemmas for form, *lemmas in filter(None, exceptions)}
        self.hypernyms = cache(self._find_hypernyms)
        self.first_sense = cache(self._find_first_sense)
        self.similarity = cache(self._compute_similarity)

    def find_lemmas(self, word: str, part: str) -> list[str]:
        """The forms a word may be inflected from, itself first, that WordNet has as this part of speech."""
        if word in self._exceptions[part]:
            forms = self._exceptions[part][word]
        else:
            forms = self._strip_endings([word], part)
        known = self._select_known([word, *forms], part)
        # NLTK 3.3 strips endings again and again until a form is known.
        while forms and not known and word not in self._exceptions[part]:
            forms = self._strip_endings(forms, part)
            known = self._select_known(forms, part)
        return known

    def _strip_endings(self, forms: list[str], part: str) -> list[str]:
        return [form[: -len(old)] + new for form in forms for old, new in _ENDINGS[part] if form.endswith(old)]

    def _select_known(self, forms: list[str], part: str) -> list[str]:
        return [form for form in dict.fromkeys(forms) if form in self._index[part]]

    def _find_first_sense(self, word: str) -> Sense | None:
        """The first sense of a word, as a noun before a verb, adjective, adverb; None for an unknown word."""
        for part in PARTS:
            for lemma in self.find_lemmas(word.lower(), part):
                return part, self._index[part][lemma][0]
        return None

    def _read_fields(self, sense: Sense) -> list[str]:
        part, offset = sense
        data = self._data[part]
        fields = data[offset : data.index(b"\n", offset)].decode("utf-8").split()
        if not fields or int(fields[0]) != offset:
            raise UserError(
                f"data.{PARTS[part]}: no entry at byte {offset}: index and data come from different versions"
            )
        return fields

    def _find_hypernyms(self, sense: Sense) -> tuple[Sense, ...]:
        """The senses that a sense is a kind or an instance of."""
        if sense == _ROOT:
            return ()
        fields = self._read_fields(sense)
        first = 5 + 2 * int(fields[3], 16)  # after the words, each with its number, and the count of pointers
        pointers = (fields[first + 4 * k : first + 4 * k + 3] for k in range(int(fields[first - 1])))
        return tuple((part, int(offset)) for kind, offset, part in pointers if kind in _HYPERNYMS)

    def _format_name(self, sense: Sense) -> str:
        """NLTK's name of a sense, by which it orders equals: "dog.n.01"."""
        if sense == _ROOT:
            return "*ROOT*"
        fields = self._read_fields(sense)
        word = fields[4].partition("(")[0].lower()  # adjectives may have a marker: "galore(ip)"
        return f"{word}.{fields[2]}.{self._index[sense[0]][word].index(sense[1]) + 1:02d}"

    def _measure_distances(self, sense: Sense, with_root: bool) -> dict[Sense, int]:
        """Steps to every sense above a sense, itself included; the root is one step above the farthest of them."""
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

    def _measure_depth(self, sense: Sense, choose: Callable[..., int]) -> int:
        above = self.hypernyms(sense)
        return 1 + choose(self._measure_depth(one, choose) for one in above) if above else 0

    def _compute_similarity(self, first: Sense, second: Sense) -> float:
        """Wu and Palmer (1994): twice the depth of the lowest sense above both over the sum of their depths through it.

        0 where no sense is above both. "Lowest" goes by the shortest way to the root, its depth by the longest. Only if
        `first` is a verb is there a root above all; later releases of NLTK put one above adjectives and adverbs, too,
        which changes WUPS by about a point.
        """
        with_root = first[0] == "v"
        from_first, from_second = self._measure_distances(first, with_root), self._measure_distances(second, with_root)
        shared = from_first.keys() & from_second.keys()
        if not shared:
            return 0.0
        deepest = max(self._measure_depth(one, min) for one in shared)
        lowest = [one for one in shared if self._measure_depth(one, min) == deepest]
        subsumer = first if first in lowest else min(lowest, key=self._format_name)
        depth = self._measure_depth(subsumer, max) + 1
        above = self._measure_distances(subsumer, with_root)

        def measure_way(below: dict[Sense, int]) -> int:
            """Steps to the subsumer, possibly through another sense above both."""
            return 0 if below[subsumer] == 0 else min(below[one] + above[one] for one in below.keys() & above.keys())

        return 2 * depth / (measure_way(from_first) + measure_way(from_second) + 2 * depth)


def _split_lines(content: bytes) -> list[str]:
    """The lines of a file after its licence, which is indented."""
    return [line for line in content.decode("utf-8").split("\n") if line and not line.startswith(" ")]


def _parse_index_line(line: str) -> tuple[str, list[int]]:
    """Lemma and offsets of its senses. The fields are lemma, part, number of senses, number of pointer kinds, these
    kinds, two numbers, and the senses' offsets."""
    fields = line.split()
    senses = int(fields[2])
    offsets = [int(offset) for offset in fields[-senses:]]
    if len(fields) != 6 + int(fields[3]) + senses:
        raise ValueError(f"{line[:60]!r}")
    return fields[0], offsets


class Wups:
    """Scores answers with the WordNet and the tagger of a folder of NLTK's data (`corpora/wordnet`,
    `taggers/averaged_perceptron_tagger_eng`; zipped, as NLTK downloads some of them, or not).

    Raises:
        UserError: the extra `wups` is not installed, a file is missing or has another format.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--wordnet {folder}: no such folder: {self._suggest_download()}")
        try:
            import nltk
            from nltk.stem import PorterStemmer
            from nltk.tag.perceptron import PerceptronTagger
            from nltk.tokenize import NLTKWordTokenizer
        except ImportError as error:
            raise UserError("WUPS needs NLTK: pip install 'mirasol[wups]'") from error
        self._hashes = {WORDNET: hashlib.sha256(), TAGGER: hashlib.sha256()}
        self.wordnet = WordNet(lambda name: self._read(WORDNET, name))
        self._tagger = PerceptronTagger(load=False)
        name = TAGGER.rpartition("/")[2]
        weights, known, classes = (self._read_json(f"{name}.{part}.json") for part in ("weights", "tagdict", "classes"))
        self._tagger.model.weights, self._tagger.tagdict = weights, known
        self._tagger.classes = self._tagger.model.classes = set(classes)
        self._stem = PorterStemmer().stem
        self._tokens = NLTKWordTokenizer().tokenize
        self.clean = cache(self._clean)
        # Stated by every result: other words and weights give other numbers.
        self.facts = {
            "nltk": nltk.__version__,
            "wordnet_sha256": self._hashes[WORDNET].hexdigest(),
            "tagger_sha256": self._hashes[TAGGER].hexdigest(),
        }

    def _read(self, place: str, name: str) -> bytes:
        content = self._find_content(place, name)
        self._hashes[place].update(content)
        return content

    def _find_content(self, place: str, name: str) -> bytes:
        file, archive = self.folder / place / name, self.folder / f"{place}.zip"
        try:
            if file.is_file():
                return file.read_bytes()
            if archive.is_file():
                with zipfile.ZipFile(archive) as members:
                    return members.read(f"{place.rpartition('/')[2]}/{name}")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{archive if archive.is_file() else file}: cannot be read ({error})") from error
        raise UserError(f"--wordnet {self.folder}: has no {place}/{name}: {self._suggest_download()}")

    def _suggest_download(self) -> str:
        command = f"python -m nltk.downloader -d {self.folder} wordnet averaged_perceptron_tagger_eng"
        return f"get it with `{command}`"

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads(self._read(TAGGER, name))
        except ValueError as error:
            raise UserError(f"{self.folder / TAGGER / name}: is not JSON ({error})") from error

    def _clean(self, text: str) -> tuple[str, ...]:
        """The lemmas of a text without stop words, by the tagger's part of speech; words that WordNet does not know are
        stemmed, and kept where it does not know the stem either."""
        tagged = self._tagger.tag(self._tokens(text))
        lemmas = [self._lemmatize(word.lower(), _PARTS.get(tag[:2])) for word, tag in tagged]
        return tuple(self._tokens(" ".join(lemma for lemma in lemmas if lemma not in STOP_WORDS)))

    def _lemmatize(self, word: str, part: str | None) -> str:
        if part is None:
            [(_, tag)] = self._tagger.tag([word])
            part = _PARTS.get(tag[:2], "n")
        lemma = min(self.wordnet.find_lemmas(word, part), key=len, default=word)
        if self.wordnet.first_sense(lemma) is not None:
            return lemma
        stem = self._stem(word)
        return stem if self.wordnet.first_sense(stem) is not None else word

    def score_word(self, first: str, second: str, threshold: float) -> float:
        """Similarity of the first senses of two words; a tenth of it below the threshold."""
        if first == second:
            return 1.0
        senses = self.wordnet.first_sense(first), self.wordnet.first_sense(second)
        if senses[0] is None or senses[1] is None:
            return 0.0
        similarity = self.wordnet.similarity(senses[0], senses[1])
        return similarity if similarity >= threshold else 0.1 * similarity

    def score(self, answer: str, references: Sequence[str], question_type: str, threshold: float = 0.0) -> float:
        """WUPS of an answer, between 0 and 1; of several references the best counts."""
        words = self.clean(answer)
        wanted = [self.clean(reference) for reference in references]
        if question_type in EXACT_TYPES:
            return float(words in wanted)
        return max(
            min(self._score_cover(words, one, threshold), self._score_cover(one, words, threshold)) for one in wanted
        )

    def _score_cover(self, words: Sequence[str], others: Sequence[str], threshold: float) -> float:
        """Product of each word's best score among the others; words without one are skipped, as in the script."""
        product, counted = 1.0, False
        for word in words:
            best = max((self.score_word(word, other, threshold) for other in others), default=0.0)
            if best > 0:
                product, counted = product * best, True
        return product if counted else 0.0
