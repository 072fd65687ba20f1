"""WUPS on a WordNet of a dozen words, against numbers computed by hand."""

import json
import shutil

import pytest
from wordnet_making import make_nltk_data

from mirasol import UserError
from mirasol.cli.main import main
from mirasol.data.datasets.registry import read_dataset
from mirasol.data.example import Example
from mirasol.evaluation.answer import AnswerSettings
from mirasol.evaluation.compare import compare_results
from mirasol.evaluation.evaluate import evaluate_dataset, score_file, write_evaluation
from mirasol.evaluation.metrics import OPEN, WUPS, score_wups
from mirasol.evaluation.predictions import Prediction
from mirasol.evaluation.report import write_report
from mirasol.evaluation.wups import STOP_WORDS, Wups

pytest.importorskip("nltk")
# Depths from 1: entity 1, animal 2, dog 3, puppy 4; twice the depth of what is above both over the sum of both.
DOG_CAT = 2 * 2 / (3 + 3)
PUPPY_CAT = 2 * 2 / (4 + 3)
DOG_BALL = 2 * 1 / (3 + 3)
# Verbs have a root above "move", which the script takes for as deep as "move": two steps up to it from each.
RUN_WALK = 2 * 1 / (3 + 3)


@pytest.fixture(scope="session")
def nltk_data(tmp_path_factory):
    return make_nltk_data(tmp_path_factory.mktemp("nltk_data"))


@pytest.fixture(scope="session")
def wups(nltk_data):
    return Wups(nltk_data)


@pytest.mark.parametrize(
    ("first", "second", "similarity"),
    [
        ("dog", "cat", DOG_CAT),
        ("puppy", "cat", PUPPY_CAT),
        ("puppy", "dog", 2 * 3 / (4 + 3)),
        ("dog", "ball", DOG_BALL),
        ("beast", "animal", 1),
        ("run", "walk", RUN_WALK),
        ("run", "sleep", 2 * 1 / (3 + 2)),
        ("dog", "run", 0),
        ("run", "dog", 2 * 1 / (3 + 4)),  # where the first is a verb the root is above nouns, too
        ("red", "blue", 0),
        ("dog", "unheard", 0),
        ("unheard", "unheard", 1),
    ],
)
def test_words_are_as_similar_as_by_hand(wups, first, second, similarity):
    assert wups.score_word(first, second, 0.0) == pytest.approx(similarity)


def test_below_the_threshold_a_tenth_counts(wups):
    assert wups.score_word("dog", "cat", 0.9) == pytest.approx(0.1 * DOG_CAT)
    assert wups.score_word("beast", "animal", 0.9) == 1


def test_answers_become_lemmas_without_stop_words(wups):
    assert wups.clean("the dogs running") == ("dog", "run")
    assert wups.clean("puppies ran") == ("puppy", "run")
    assert wups.clean("men sleeps") == ("man", "sleep")
    assert wups.clean("zzz it") == ("zzz",)
    assert len(STOP_WORDS) == 156
    assert not {"in", "on", "up", "down", "no", "not"} & STOP_WORDS


def test_a_score_is_the_worse_of_both_directions_and_the_best_of_the_references(wups):
    assert wups.score("the dog", ["cat"], "CW") == pytest.approx(DOG_CAT)
    # "dog ball" covers "cat" by DOG_CAT; "dog" by DOG_CAT times "ball" by its share with "cat" the other way round.
    assert wups.score("dog ball", ["cat"], "CW") == pytest.approx(DOG_CAT * DOG_BALL)
    assert wups.score("cat", ["dog ball"], "CW") == wups.score("dog ball", ["cat"], "CW")
    assert wups.score("dog", ["ball", "cat"], "CW") == pytest.approx(DOG_CAT)
    assert wups.score("dog red", ["dogs"], "CW") == 1, "a word that is like none is skipped"
    assert wups.score("the", ["dog"], "CW") == 0


def test_yes_and_no_and_counts_are_equal_or_wrong(wups):
    assert wups.score("dog", ["cat"], "DC") == 0
    assert wups.score("the dogs", ["dog"], "DB") == 1
    assert wups.score("dog", ["ball", "dog"], "DC") == 1


def question(id, target, kind, references=()):
    return Example(id, "", None, None, "what?", target, kind, video=id[0], references=references)


def test_the_table_is_that_of_the_papers(wups):
    examples = [question("1_0", "dog", "CW"), question("1_1", "cat", "TP"), question("2_0", "ball", "DC")]
    said = {"1_0": Prediction("cat"), "1_1": Prediction("cat")}
    found = score_wups("nextqa_oe", examples, said, wups)
    plain = [name for name in found.metrics if "@" not in name]
    assert plain == ["CW", "CH", "WUPS_C", "TN", "TC", "WUPS_T", "DB", "DC", "DL", "DO", "WUPS_D", "WUPS"]
    assert found.headline == "WUPS"
    assert found.metrics["WUPS"].value == pytest.approx((DOG_CAT + 1 + 0) / 3), "one without a prediction scores 0"
    assert found.metrics["TN"].value == 1
    assert found.metrics["WUPS@0.9"].value == pytest.approx((0.1 * DOG_CAT + 1) / 3)
    assert found.metrics["WUPS"].low <= found.metrics["WUPS"].value <= found.metrics["WUPS"].high


def test_a_zipped_wordnet_is_read_and_what_is_missing_is_named(nltk_data, tmp_path):
    shutil.copytree(nltk_data, tmp_path / "data")
    wordnet = tmp_path / "data" / "corpora" / "wordnet"
    shutil.make_archive(str(wordnet), "zip", wordnet.parent, "wordnet")
    shutil.rmtree(wordnet)
    zipped = Wups(tmp_path / "data")
    assert zipped.score_word("dog", "cat", 0.0) == pytest.approx(DOG_CAT)
    assert zipped.facts == Wups(nltk_data).facts, "the same files, which a result states"
    wordnet.with_suffix(".zip").unlink()
    with pytest.raises(UserError, match=r"has no corpora/wordnet/data.noun: get it with `python -m nltk.downloader"):
        Wups(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpora/wordnet/index.noun", "dog n two\n", "index.noun: is not in WordNet's format"),
        ("taggers/averaged_perceptron_tagger_eng/averaged_perceptron_tagger_eng.tagdict.json", "{", "is not JSON"),
    ],
)
def test_a_damaged_file_is_named(nltk_data, tmp_path, name, content, message):
    shutil.copytree(nltk_data, tmp_path / "data")
    (tmp_path / "data" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Wups(tmp_path / "data")


def test_the_command_scores_by_wups_and_its_results_compare(nltk_data, tmp_path, capsys):
    header = "video,frame_count,width,height,question,answer,qid,type\n"
    (tmp_path / "test.csv").write_text(header + "7,9,9,9,what,dog,0,DL\n8,9,9,9,why,ball,0,CW\n")
    for name, said in (("one", "cat"), ("two", "dog")):
        (tmp_path / f"{name}.json").write_text(f'{{"7": {{"0": "{said}"}}, "8": {{"0": "the ball"}}}}')
        main(["score", "nextqa_oe", str(tmp_path), str(tmp_path / f"{name}.json"), "--wordnet", str(nltk_data),
              "--output", str(tmp_path / name)])  # fmt: skip
    assert "WUPS, headline: WUPS" in capsys.readouterr().out
    row = compare_results(tmp_path / "one", tmp_path / "two").rows["All"]
    assert (row.first, row.second) == (pytest.approx((DOG_CAT + 1) / 2), 1)
    main(["score", "nextqa_oe", str(tmp_path), str(tmp_path / "two.json"), "--output", str(tmp_path / "exact")])
    with pytest.raises(UserError, match="one has WUPS, the other one right or wrong"):
        compare_results(tmp_path / "one", tmp_path / "exact")
    dataset = read_dataset("nextqa_oe", tmp_path, "test")
    with pytest.raises(UserError, match="normalisation 'light' has no effect on WUPS: leave --normalisation out"):
        score_file(dataset, tmp_path / "one.json", "light", Wups(nltk_data))


def test_stop_words_are_those_of_the_script(real_data):
    words = (real_data / "annotations" / "nextqa_oe" / "stopwords.txt").read_text().split()
    assert set(words) == STOP_WORDS


def test_an_evaluation_has_wups_beside_exact_match(loaded, shapes, wups, tmp_path):
    clips = sorted((shapes / "clips" / "test").iterdir())[:2]
    header = "video,frame_count,width,height,question,answer,qid,type\n"
    rows = [f"{place},9,9,9,what is seen,dog,0,DL\n{place},9,9,9,why,ball,1,CW\n" for place in range(2)]
    (tmp_path / "test.csv").write_text(header + "".join(rows))
    for place, clip in enumerate(clips):
        shutil.copy(clip, tmp_path / f"{place}.mp4")
    dataset = read_dataset("nextqa_oe", tmp_path, "test")
    found = evaluate_dataset(loaded, dataset, AnswerSettings(tmp_path, ("no_media",), max_new_tokens=2), wups=wups)
    assert list(found.protocols) == [OPEN, WUPS]
    assert found.controls[WUPS]["no_media"].metrics.keys() == found.protocols[WUPS].metrics.keys()
    (tmp_path / "out").mkdir()
    names = write_evaluation(tmp_path / "out", found)
    assert "predictions.wups.jsonl" in names
    values = [json.loads(line)["value"] for line in (tmp_path / "out" / names[1]).read_text().splitlines()]
    assert sum(values) / 4 == pytest.approx(found.protocols[WUPS].metrics["WUPS"].value)
    write_report(tmp_path / "out", loaded, found)
    assert "WUPS_D" in (tmp_path / "out" / "report.html").read_text()
    again = score_file(dataset, tmp_path / "out" / "predictions.official.json", wups=wups)
    assert again.metrics == found.protocols[WUPS].metrics
