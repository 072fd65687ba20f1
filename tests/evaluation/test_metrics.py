import pytest

from mirasol.data.example import Example
from mirasol.evaluation.metrics import Answered, blind, chance, is_right, normalise, score


def question(target, kind="sight", candidates=("red", "blue"), prompt="what colour?"):
    return Example(f"{kind}-{target}", "a.mp4", None, None, prompt, target, kind, tuple(candidates))


@pytest.mark.parametrize("written", ["The Red Bell.", " red   bell", "a red, bell!", "red\nbell", "“red” bell…"])
def test_case_punctuation_articles_and_space_do_not_matter(written):
    assert is_right(written, "red bell")


@pytest.mark.parametrize("written", ["redbell", "bell red", "red bells", "red", "", "red bell red bell", "theredbell"])
def test_everything_else_matters(written):
    assert not is_right(written, "red bell")


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


def test_score_is_the_share_of_right_answers_over_all_and_by_type():
    answers = [Answered(question("red"), text) for text in ("red", "Red.", "blue", "")]
    answers += [Answered(question("low", "hearing"), "low")]
    result = score(answers)
    assert result.to_dict() == {"accuracy": 3 / 5, "by_type": {"sight": 0.5, "hearing": 1.0}, "n": 5}


def test_questions_without_a_type_are_untyped():
    assert score([Answered(question("red", kind=""), "red")]).by_type == {"untyped": 1.0}


def test_chance_is_one_over_the_candidates_and_nothing_where_answers_are_open():
    examples = [question("red"), question("low", "hearing", ["low", "high", "none", "both"]), question("x", "open", [])]
    result = chance(examples)
    assert result.by_type == {"sight": 0.5, "hearing": 0.25, "open": 0.0}
    assert result.accuracy == pytest.approx(0.25)


def test_blind_guesses_the_most_frequent_answer_to_the_same_prompt():
    known = [question(t) for t in ("red", "blue", "Blue")] + [question("low", "hearing", prompt="is it low?")]
    asked = [
        question("blue"),
        question("red"),
        question("low", "hearing", prompt="is it low?"),
        question("red", prompt="new?"),
    ]
    result = blind(known, asked)
    assert [answer.answer for answer in result.answers] == ["blue", "blue", "low", ""]
    assert result.accuracy == 0.5


def test_blind_ties_do_not_depend_on_the_order_of_the_data():
    known = [question("red"), question("blue")]
    first, second = (blind(order, [question("red")]) for order in (known, known[::-1]))
    assert first.answers[0].answer == second.answers[0].answer


def test_nothing_asked_is_a_score_of_no_questions():
    assert score([]).to_dict() == {"accuracy": 0.0, "by_type": {}, "n": 0}
