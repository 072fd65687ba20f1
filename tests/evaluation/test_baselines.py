"""Guessing from the training split's questions and answers, without any clip."""

import json

import pytest

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.registry import read_dataset
from mirasol.data.example import Example
from mirasol.evaluation.baselines import AnswerPrior, read_training_examples
from mirasol.evaluation.metrics import normalise_lightly, score_answers, score_choices
from mirasol.evaluation.predictions import Prediction


def example(id, prompt, target, candidates=()):
    return Example(id, "a.mp4", None, None, prompt, target, candidates=candidates, video=id)


KNOWN = [example("1", "who?", "man"), example("2", "who?", "Man."), example("3", "what?", "dog"),
         example("4", "what?", "dog"), example("5", "what?", "cat"), example("6", "where?", "dog")]  # fmt: skip


def test_the_most_frequent_answer_to_the_prompt_is_guessed_else_to_any():
    prior = AnswerPrior(KNOWN, normalise_lightly)
    assert prior.constant == "dog"
    assert [prior.guess(prompt) for prompt in ("who?", "what?", "why?")] == ["man", "dog", "dog"]
    assert prior.choose("what?", ("man", "cat", "bird")) == 1, "cat was right to this prompt"
    assert prior.choose("why?", ("bird", "cat", "man")) == 2
    assert prior.choose("why?", ("bird", "tree")) == 0
    assert not AnswerPrior([], normalise_lightly)


def test_ties_do_not_depend_on_the_order_of_the_data():
    known = [example("1", "who?", "man"), example("2", "who?", "cat"), example("3", "who?", "dog")]
    priors = [AnswerPrior(order, normalise_lightly) for order in (known, known[::-1])]
    assert [(prior.constant, prior.guess("who?")) for prior in priors] == [("cat", "cat")] * 2


def test_baselines_by_hand():
    asked = [example("1", "who?", "man"), example("2", "what?", "dog"), example("3", "why?", "fun")]
    found = score_answers("msrvtt_qa", asked, {}, "light", known=KNOWN).baselines
    assert found["train majority"].value == pytest.approx(1 / 3)
    assert found["train blind"].value == pytest.approx(2 / 3)
    assert "train blind" not in score_answers("msrvtt_qa", asked, {}, "light").baselines
    options = [example("1", "who?", "man", ("dog", "man")), example("2", "what?", "bird", ("dog", "bird"))]
    chosen = score_choices("nextqa_mc", options, {"1": Prediction(choice=0)}, known=KNOWN)
    assert chosen.baselines["train blind"].value == 1 / 2


def test_the_training_split_is_found_beside_the_one_asked_for(tmp_path):
    line = {"file": "a.mp4", "prompt": "what?", "target": "a bell"}
    (tmp_path / "test.jsonl").write_text(json.dumps(line))
    test = read_dataset("folder", tmp_path, "test")
    assert read_training_examples(test, DatasetOptions()) == ((), "none: there is no training split")
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"target": "a drum"}))
    known, told = read_training_examples(test, DatasetOptions())
    assert [one.target for one in known] == ["a bell", "a drum"], "whether their media are there or not"
    assert told == "2 examples of train.jsonl"
    assert read_training_examples(read_dataset("folder", tmp_path, "train"), DatasetOptions()) == ((), "none")
    (tmp_path / "train.jsonl").write_text("{")
    known, told = read_training_examples(test, DatasetOptions())
    assert known == () and "train.jsonl" in told
