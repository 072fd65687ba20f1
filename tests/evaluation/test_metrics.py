import pytest

from mirasol.data.example import Example
from mirasol.evaluation.metrics import (
    average_by_type,
    normalise,
    score_answers,
    score_chance,
)
from mirasol.evaluation.predictions import Prediction


def question(target, kind="sight", candidates=("red", "blue"), prompt="what colour?", number=0):
    return Example(f"{kind}-{target}-{number}", "a.mp4", None, None, prompt, target, kind, tuple(candidates))


@pytest.mark.parametrize("written", ["The Red Bell.", " red   bell", "a red, bell!", "red\nbell", "“red” bell…"])
def test_case_punctuation_articles_and_space_do_not_matter(written):
    assert is_right(written, "red bell")


@pytest.mark.parametrize("written", ["redbell", "bell red", "red bells", "red", "", "red bell red bell", "theredbell"])
def test_everything_else_matters(written):
    assert not is_right(written, "red bell")


def is_right(answer, target):
    example = question(target)
    return score_answers("folder", [example], {example.id: Prediction(answer)}, "folded").judged[0].right


def test_normalising_twice_is_normalising_once():
    for text in ("A theatre; the THE an anthem", "a", "", "…?!", "The. A!"):
        assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("target", ["A", "the", "an A", "?", "+"])
def test_an_answer_that_is_all_article_or_punctuation_is_not_nothing(target):
    assert is_right(target, target)
    assert is_right(target.lower(), target)
    assert not is_right("", target)
    assert not is_right("red", target)


def test_articles_inside_words_stay():
    assert normalise("the theatre and a banana") == "theatre and banana"


def score(pairs, known=()):
    """Scores (target, answer, type) of a data set in the user's own folder."""
    examples = [question(target, kind, number=place) for place, (target, _, kind) in enumerate(pairs)]
    said = {example.id: Prediction(answer) for example, (_, answer, _) in zip(examples, pairs, strict=True)}
    return score_answers("folder", examples, said, "folded", known=known)


def test_accuracy_is_the_share_of_right_answers_over_all_and_by_type():
    pairs = [("red", text, "sight") for text in ("red", "Red.", "blue", "")] + [("low", "low", "hearing")]
    found = score(pairs)
    assert found.by_type.to_dict() == {"accuracy": 3 / 5, "by_type": {"sight": 0.5, "hearing": 1.0}, "n": 5}
    assert found.metrics["All"].value == found.by_type.accuracy
    assert {name: found.metrics[name].value for name in found.by_type.by_type} == found.by_type.by_type


def test_questions_without_a_type_are_untyped():
    assert score([("red", "red", "")]).by_type.by_type == {"untyped": 1.0}


def test_chance_is_one_over_the_candidates_and_nothing_where_answers_are_open():
    examples = [question("red"), question("low", "hearing", ["low", "high", "none", "both"]), question("x", "open", [])]
    found = score_chance(examples)
    assert found.by_type == {"sight": 0.5, "hearing": 0.25, "open": 0.0}
    assert found.accuracy == pytest.approx(0.25)
    baseline = score_answers("folder", examples, {}, "folded")
    assert baseline.baselines["chance"].value == pytest.approx(found.accuracy)
    assert baseline.baseline_rows["chance"] == {"hearing": 0.25, "open": 0.0, "sight": 0.5, "All": pytest.approx(0.25)}


def test_baselines_by_row_add_up_to_the_baseline():
    pairs = [("red", "", "sight"), ("blue", "", "sight"), ("red", "", "hearing")]
    known = [question("red"), question("blue", prompt="else?"), question("red", prompt="else?")]
    found = score(pairs, known)
    for name, rows in found.baseline_rows.items():
        assert rows["All"] == pytest.approx(found.baselines[name].value), name
        assert rows["All"] == pytest.approx((2 * rows["sight"] + rows["hearing"]) / 3), name
    assert found.baseline_rows["train blind"] == {"hearing": 1.0, "sight": 0.5, "All": pytest.approx(2 / 3)}


def test_an_average_of_nothing_is_one_of_no_questions():
    assert average_by_type([]).to_dict() == {"accuracy": 0.0, "by_type": {}, "n": 0}
