"""WUPS of open-ended answers as NExT-QA's script computes it (Xiao et al., CVPR 2021; after Malinowski and Fritz 2014):
words that mean nearly the same count nearly as one.

WordNet and the weights of a part-of-speech tagger are the user's: a folder of NLTK's data, see docs/evaluation.md.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mirasol.errors import UserError
from mirasol.evaluation.wordnet import WordNet

WORDNET = "corpora/wordnet"
TAGGER = "taggers/averaged_perceptron_tagger_eng"
# The script's stop words: the usual English ones of NLTK less those that say where, when and how many. Nothing of an
# answer that consists of them is left.
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


class Wups:
    """Scores answers with the WordNet and the tagger of a folder of NLTK's data (`corpora/wordnet`,
    `taggers/averaged_perceptron_tagger_eng`; zipped, as NLTK loads some of them down, or not).

    Raises:
        UserError: the extra `wups` is not installed, the folder lacks a file, or a file is not what it is called.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--wordnet {folder}: no such folder: {self._how_to_get()}")
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
        weights, known, classes = (self._json(f"{name}.{part}.json") for part in ("weights", "tagdict", "classes"))
        self._tagger.model.weights, self._tagger.tagdict = weights, known
        self._tagger.classes = self._tagger.model.classes = set(classes)
        self._stem = PorterStemmer().stem
        self._tokens = NLTKWordTokenizer().tokenize
        self.clean = cache(self._clean)
        # What a result has to state: other words and weights give other numbers.
        self.facts = {"nltk": nltk.__version__, "wordnet_sha256": self._hashes[WORDNET].hexdigest(),
                      "tagger_sha256": self._hashes[TAGGER].hexdigest()}  # fmt: skip

    def _read(self, place: str, name: str) -> bytes:
        content = self._content(place, name)
        self._hashes[place].update(content)
        return content

    def _content(self, place: str, name: str) -> bytes:
        file, archive = self.folder / place / name, self.folder / f"{place}.zip"
        try:
            if file.is_file():
                return file.read_bytes()
            if archive.is_file():
                with zipfile.ZipFile(archive) as members:
                    return members.read(f"{place.rpartition('/')[2]}/{name}")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{archive if archive.is_file() else file}: cannot be read ({error})") from error
        raise UserError(f"--wordnet {self.folder}: has no {place}/{name}: {self._how_to_get()}")

    def _how_to_get(self) -> str:
        command = f"python -m nltk.downloader -d {self.folder} wordnet averaged_perceptron_tagger_eng"
        return f"get it with `{command}`"

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._read(TAGGER, name))
        except ValueError as error:
            raise UserError(f"{self.folder / TAGGER / name}: is not JSON ({error})") from error

    def _clean(self, text: str) -> tuple[str, ...]:
        """The lemmas of a text less stop words: by the tagger's part of speech; what WordNet does not know is stemmed,
        and stays where it does not know the stem either."""
        tagged = self._tagger.tag(self._tokens(text))
        lemmas = [self._lemma(word.lower(), _PARTS.get(tag[:2])) for word, tag in tagged]
        return tuple(self._tokens(" ".join(lemma for lemma in lemmas if lemma not in STOP_WORDS)))

    def _lemma(self, word: str, part: str | None) -> str:
        if part is None:
            [(_, tag)] = self._tagger.tag([word])
            part = _PARTS.get(tag[:2], "n")
        lemma = min(self.wordnet.lemmas(word, part), key=len, default=word)
        if self.wordnet.first_sense(lemma) is not None:
            return lemma
        stem = self._stem(word)
        return stem if self.wordnet.first_sense(stem) is not None else word

    def word_score(self, first: str, second: str, threshold: float) -> float:
        """Similarity of the first senses of two words; a tenth of it where it lies below the threshold."""
        if first == second:
            return 1.0
        senses = self.wordnet.first_sense(first), self.wordnet.first_sense(second)
        if senses[0] is None or senses[1] is None:
            return 0.0
        similarity = self.wordnet.similarity(senses[0], senses[1])
        return similarity if similarity >= threshold else 0.1 * similarity

    def score(self, answer: str, references: Sequence[str], question_type: str, threshold: float = 0.0) -> float:
        """WUPS of an answer, between 0 and 1; of several references the best counts."""
        said = self.clean(answer)
        wanted = [self.clean(reference) for reference in references]
        if question_type in EXACT_TYPES:
            return float(said in wanted)
        return max(min(self._cover(said, one, threshold), self._cover(one, said, threshold)) for one in wanted)

    def _cover(self, words: Sequence[str], others: Sequence[str], threshold: float) -> float:
        """Product of each word's best score among the others; words without any are skipped, as the script does."""
        product, counted = 1.0, False
        for word in words:
            best = max((self.word_score(word, other, threshold) for other in others), default=0.0)
            if best > 0:
                product, counted = product * best, True
        return product if counted else 0.0
