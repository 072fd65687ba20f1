"""A WordNet of a dozen words in the format of the database files, and a tagger that knows their parts of speech."""

import json
from pathlib import Path

# By part of speech: (words, names of the hypernyms). A sense is named by its first word.
NOUNS = [
    (["entity"], []),
    (["animal", "beast"], ["entity"]),
    (["dog"], ["animal"]),
    (["puppy"], ["dog"]),
    (["cat"], ["animal"]),
    (["object"], ["entity"]),
    (["ball"], ["object"]),
    (["man"], ["entity"]),
]
VERBS = [(["move"], []), (["run"], ["move"]), (["walk"], ["move"]), (["sleep"], [])]
ADJECTIVES = [(["red"], []), (["blue"], [])]
ADVERBS = [(["quickly"], [])]
TAGS = {"dogs": "NNS", "dog": "NN", "puppies": "NNS", "cat": "NN", "ball": "NN", "the": "DT", "men": "NNS",
        "running": "VBG", "ran": "VBD", "walk": "VB", "sleeps": "VBZ", "red": "JJ", "blue": "JJ"}  # fmt: skip


def make_nltk_data(folder: Path) -> Path:
    """Writes `corpora/wordnet` and `taggers/averaged_perceptron_tagger_eng` below the folder, and returns it."""
    place = folder / "corpora" / "wordnet"
    place.mkdir(parents=True)
    for part, letter, senses in (("noun", "n", NOUNS), ("verb", "v", VERBS), ("adj", "a", ADJECTIVES),
                                 ("adv", "r", ADVERBS)):  # fmt: skip
        data, offsets = _data(letter, senses)
        (place / f"data.{part}").write_text(data)
        words = sorted((word, offsets[names[0]]) for names, _ in senses for word in names)
        index = "".join(f"{word} {letter} 1 1 @ 1 0 {offset:08d}  \n" for word, offset in words)
        (place / f"index.{part}").write_text("  1 licence\n" + index)
        (place / f"{part}.exc").write_text({"noun": "men man\n", "verb": "ran run\n"}.get(part, ""))
    tagger = folder / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    for name, content in (("weights", {}), ("tagdict", TAGS), ("classes", sorted({*TAGS.values(), "NN"}))):
        (tagger / f"{tagger.name}.{name}.json").write_text(json.dumps(content))
    return folder


def _data(letter: str, senses: list[tuple[list[str], list[str]]]) -> tuple[str, dict[str, int]]:
    """The data file and the offset of every sense; offsets have eight digits, so they change no line's length."""
    licence = "  1 licence\n"
    offsets: dict[str, int] = {names[0]: 0 for names, _ in senses}
    for _ in range(2):
        text = licence
        for names, above in senses:
            offsets[names[0]] = len(text)
            words = " ".join(f"{word} 0" for word in names)
            pointers = "".join(f" @ {offsets[name]:08d} {letter} 0000" for name in above)
            text += f"{offsets[names[0]]:08d} 03 {letter} {len(names):02x} {words} {len(above):03d}{pointers} | gloss\n"
    return text, offsets
