"""Scoring predictions of anyone: numbers by hand, official formats, and what does not fit."""

import hashlib
import json
import re

import numpy as np
import pytest

from mirasol import UserError
from mirasol.cli.main import main
from mirasol.data.datasets.registry import read_dataset
from mirasol.data.example import Example
from mirasol.evaluation.compare import compare_results
from mirasol.evaluation.evaluate import describe_data, score_file, write_scores
from mirasol.evaluation.metrics import format_scores, normalise, normalise_lightly, score_answers, score_choices
from mirasol.evaluation.predictions import Prediction, format_official_predictions, read_predictions

CLASSES = ("bark", "meow", "rain")


def clip(id, target, **more):
    return Example(id, "a.mp4", None, None, "what?", target, candidates=CLASSES, video=id, **more)


@pytest.fixture
def activitynet(tmp_path):
    """Two videos; kinds of answers appear in the order 3, 0, 4, 8, 5."""
    rows = [("a", 1, 3, "yes"), ("a", 2, 0, "run"), ("a", 3, 4, "red"), ("b", 1, 8, "man"), ("b", 2, 5, "cup")]
    questions = [{"video_name": v, "question": f"q{n}", "question_id": f"v_{v}_{n}"} for v, n, _, _ in rows]
    answers = [{"answer": answer, "type": kind, "question_id": f"v_{v}_{n}"} for v, n, kind, answer in rows]
    (tmp_path / "test_q.json").write_text(json.dumps(questions))
    (tmp_path / "test_a.json").write_text(json.dumps(answers))
    return read_dataset("activitynet_qa", tmp_path, "test")


@pytest.fixture
def choices(tmp_path):
    header = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    rows = "7,9,9,9,why,1,0,CW,a,b,c,d,e\n7,9,9,9,what next,2,1,TN,a,b,c,d,e\n8,9,9,9,before,0,0,TP,a,a,c,d,e\n"
    (tmp_path / "test.csv").write_text(header + rows)
    return read_dataset("nextqa_mc", tmp_path, "test")


def predicted(path, content, name="pred.json"):
    text = content if isinstance(content, str) else json.dumps(content)
    (path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return path / name


def answers_of(*pairs):
    return [{"question_id": id, "answer": answer} for id, answer in pairs]


def test_free_is_computed_rightly_and_the_script_s_number_stands_beside_it(activitynet, tmp_path):
    wanted = answers_of(("v_a_1", "yes"), ("v_a_2", "walk"), ("v_a_3", "red"), ("v_b_1", "dog"), ("v_b_2", "cup"))
    found = score_file(activitynet, predicted(tmp_path, wanted)).metrics
    assert found["Free"].value == 3 / 4
    assert found["Free"].n == 4
    assert found["All"].value == 3 / 5
    assert found["Motion"].value == 0
    assert found["Location"].value is None
    assert found["free_official_script"].value == 3 / 2  # divides by the fourth and fifth type alone


def test_missing_questions_are_wrong_and_unknown_ones_count_nowhere(activitynet, tmp_path):
    found = score_file(activitynet, predicted(tmp_path, answers_of(("v_a_1", "yes"), ("v_z_1", "no"))))
    assert found.metrics["All"].value == 1 / 5
    kinds = {problem.kind: problem for problem in found.problems}
    assert kinds["missing prediction"].examples == 4
    assert "v_z_1" in kinds["unknown question"].message
    assert found.to_dict()["counts"] == {
        "n_annotated": 5, "n_evaluated": 5, "n_predicted": 1, "n_missing": 4, "n_unknown": 1,
    }  # fmt: skip


def test_only_a_normalisation_forgives_case(activitynet, tmp_path):
    file = predicted(tmp_path, answers_of(("v_a_1", " Yes. ")))
    assert score_file(activitynet, file).metrics["All"].value == 0
    assert score_file(activitynet, file, "light").metrics["All"].value == 1 / 5
    with pytest.raises(UserError, match="stemmed"):
        score_file(activitynet, file, "stemmed")


def test_choices_go_by_the_place_and_not_by_the_text(choices, tmp_path):
    wanted = {"7_0": {"prediction": 1, "answer": 1}, "7_1": {"prediction": 0}, "8_0": {"prediction": 1}}
    found = score_file(choices, predicted(tmp_path, wanted))
    assert found.metrics["Acc"].value == 1 / 3, "option 1 of 8_0 has the right text but is not the right one"
    assert found.metrics["Bef&Aft"].n == 2
    assert found.metrics["Acc_T"].value == 0
    assert found.baselines["chance"].value == pytest.approx(0.2)


def test_a_choice_that_is_not_there_is_refused(choices, tmp_path):
    with pytest.raises(UserError, match=r"7_0.*prediction 5 is out of range: 0 to 4"):
        score_file(choices, predicted(tmp_path, {"7_0": {"prediction": 5}}))
    with pytest.raises(UserError, match="normalisation 'light' has no effect on choices or scores"):
        score_file(choices, predicted(tmp_path, {"7_0": {"prediction": 1}}), "light")


def test_either_reference_is_right():
    two = Example("1", "a.mp4", None, None, "why?", "to play", references=("to play", "for fun"))
    labels = Example("2", "a.mp4", None, None, "what?", "bark; rain", references=("bark", "rain"))
    said = {"1": Prediction("for fun"), "2": Prediction("bark")}
    assert [item.right for item in score_answers("folder", [two, labels], said, "none").judged] == [True, False]


def test_class_scores_by_hand():
    examples = [clip("1", "bark"), clip("2", "meow"), clip("3", "meow")]
    rows = ([3, 2, 1], [3, 2, 1], [0, 9, 1])
    said = {str(n): Prediction(scores=tuple(map(float, row))) for n, row in enumerate(rows, start=1)}
    found = score_choices("vggsound", examples, said, CLASSES)
    assert found.metrics["top-1"].value == pytest.approx(2 / 3)
    assert found.metrics["top-5"].value == 1
    assert found.metrics["mean class accuracy"].value == pytest.approx((1 + 1 / 2) / 2)
    assert found.metrics["mAP"].value == pytest.approx((1 / 2 + (1 + 2 / 3) / 2) / 2)
    assert found.headline == "top-1"
    assert found.facts == {"classes": 3}
    assert found.baselines["majority"].value == pytest.approx(2 / 3)


def test_a_clip_of_several_labels_has_map_and_no_top_1():
    examples = [
        Example("1", "a.mp4", None, None, "what?", "bark; rain", references=("bark", "rain")),
        Example("2", "b.mp4", None, None, "what?", "meow", references=("meow",)),
    ]
    said = {"1": Prediction(scores=(1.0, 0.0, 1.0)), "2": Prediction(scores=(0.0, 1.0, 0.0))}
    found = score_choices("audioset", examples, said, CLASSES)
    assert found.metrics.keys() == {"mAP", "AUC", "d-prime"}
    assert found.metrics["mAP"].value == found.metrics["AUC"].value == 1
    assert found.metrics["d-prime"].value is None, "infinite, which JSON has no word for"


def test_a_wrong_number_of_scores_is_refused():
    with pytest.raises(UserError, match="2 scores for 3 candidates"):
        score_choices("vggsound", [clip("1", "bark")], {"1": Prediction(scores=(1.0, 2.0))}, CLASSES)


def test_a_matrix_is_the_same_as_its_rows(tmp_path):
    examples = [clip("1", "bark"), clip("2", "meow")]
    np.save(tmp_path / "s.npy", np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    lines = predicted(tmp_path, '{"id": "1", "scores": [1, 2, 3]}\n{"id": "2", "scores": [4, 5, 6]}\n', "s.jsonl")
    matrix = read_predictions(tmp_path / "s.npy", "vggsound", examples)
    assert matrix == read_predictions(lines, "vggsound", examples)
    for name, content in (("text", np.array([["a", "b"], ["c", "d"]])), ("complex", np.ones((2, 3), complex))):
        np.save(tmp_path / f"{name}.npy", content)
        with pytest.raises(UserError, match="expected real numbers"):
            read_predictions(tmp_path / f"{name}.npy", "vggsound", examples)
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "several.npz", np.ones((2, 3)))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    whole = (tmp_path / "s.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-8])
    small, large = b"(2, 3), }", b"(99999999999, 99999), }"
    (tmp_path / "huge.npy").write_bytes(whole.replace(small.ljust(len(large)), large))
    for name in ("empty", "several", "cut", "huge"):
        with pytest.raises(UserError, match="not an array of numbers"):
            read_predictions(tmp_path / f"{name}.npy", "vggsound", examples)
    np.save(tmp_path / "short.npy", np.ones((1, 3)))
    with pytest.raises(UserError, match=r"\[2, classes\].*\[1, 3\]"):
        read_predictions(tmp_path / "short.npy", "vggsound", examples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question_id": "1", "answer": "a"}, {"question_id": "1", "answer": "b"}]', "'1' is predicted twice"),
        ('[{"answer": "a"}]', "entry 1: expected an object with `id` or `question_id`"),
        ('[{"id": "1", "answer": 3}]', "expected a text"),
        ('[{"id": "1", "prediction": "3"}]', "index of an option"),
        ('[{"id": "1", "scores": [1, NaN]}]', "finite"),
        ('[{"id": "1", "scores": [1, 1' + "0" * 400 + "]}]", "finite"),
        ('[{"id": 1' + "0" * 5_000 + "}]", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('[{"id": "1", "answer": "\\ud800"}]', "entry 1: expected a text"),
        ('[{"id": "1", "answer": "\udcff"}]', "line 1, column 25: is not UTF-8"),
        ("", "line 1, column 1: is not JSON"),
        ("<!doctype html>", "line 1, column 1: is not JSON"),
        ('{"results": {"P01_1": {"verb": {"0": 1}}}}', "annotation P01_1: expected `interaction`"),
        ('[{"id": "1", "answer": "a"', "line 1"),
        ("7", "list or an object"),
        ('{"7_0": {"prediction": 1}, "7_0": {"prediction": 2}}', "'7_0' appears twice in one object"),
    ],
)
def test_malformed_predictions_are_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as refused:
        read_predictions(predicted(tmp_path, content), "activitynet_qa", [])
    assert "\n" not in str(refused.value)


def test_choices_are_refused_where_answers_are_open(activitynet, tmp_path):
    mixed = [{"id": "v_a_1", "answer": "yes"}, {"id": "v_a_2", "prediction": 1}]
    with pytest.raises(UserError, match="has choices or scores, but activitynet_qa is open"):
        score_file(activitynet, predicted(tmp_path, mixed))


def test_a_malformed_line_is_named(tmp_path):
    file = predicted(tmp_path, '{"id": "1", "answer": "a"}\n{"id"\n', "p.jsonl")
    with pytest.raises(UserError, match="line 2, column 6"):
        read_predictions(file, "folder", [])
    with pytest.raises(UserError, match="line 1: is not JSON"):
        read_predictions(predicted(tmp_path, "[" * 100_000, "p.jsonl"), "folder", [])


def test_official_formats_are_read_back_to_what_was_written(activitynet, choices, tmp_path):
    said = {"v_a_1": Prediction("yes"), "v_b_2": Prediction("cup")}
    name, content = format_official_predictions("activitynet_qa", activitynet.annotated, said)
    assert read_predictions(predicted(tmp_path, content, name), "activitynet_qa", []) == said
    chosen = {"7_0": Prediction(choice=3), "8_0": Prediction(choice=0)}
    name, content = format_official_predictions("nextqa_mc", choices.annotated, chosen)
    assert content["7_0"] == {"prediction": 3, "answer": 1}
    assert read_predictions(predicted(tmp_path, content, name), "nextqa_mc", []) == chosen
    open_ended = [Example("7_0", "", None, None, "why", "a", video="7")]
    name, content = format_official_predictions("nextqa_oe", open_ended, {"7_0": Prediction("b c")})
    assert content == {"7": {"0": "b c"}}
    assert read_predictions(predicted(tmp_path, content, name), "nextqa_oe", []) == {"7_0": Prediction("b c")}


def test_the_challenge_s_format_of_epic_sounds_is_read_back(tmp_path):
    said = {"P01_11_0": Prediction(scores=(0.5, -1.0, 2.0)), "P01_11_1": Prediction(scores=(0.0, 1.0, 2.0))}
    examples = [clip(id, "bark") for id in said]
    name, content = format_official_predictions("epic_sounds", examples, said)
    assert content["results"]["P01_11_0"] == {"interaction": {"0": 0.5, "1": -1.0, "2": 2.0}}
    assert content["challenge"] == "audio_based_interaction_recognition"
    assert read_predictions(predicted(tmp_path, content, name), "epic_sounds", []) == said
    del content["results"]["P01_11_1"]["interaction"]["1"]
    with pytest.raises(UserError, match="annotation P01_11_1: expected `interaction` with a score for every class_id"):
        read_predictions(predicted(tmp_path, content, name), "epic_sounds", [])


def test_a_comparison_is_paired(activitynet, tmp_path):
    for name, said in (("one", "yes"), ("two", "no")):
        (tmp_path / name).mkdir()
        wanted = answers_of(("v_a_1", said), ("v_a_3", "red"))
        write_scores(tmp_path / name, activitynet, score_file(activitynet, predicted(tmp_path, wanted)))
    found = compare_results(tmp_path / "one", tmp_path / "two")
    row = found.rows["All"]
    assert (row.first, row.second, row.n) == (2 / 5, 1 / 5, 5)
    assert row.difference == pytest.approx(-1 / 5)
    assert (row.first_only, row.second_only, row.p_mcnemar) == (1, 0, 1.0)
    assert compare_results(tmp_path / "one", tmp_path / "one").rows["All"].low == 0
    assert "left out" not in found.format_table()
    lines = (tmp_path / "two" / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "two" / "predictions.jsonl").write_text("\n".join(lines[:2]))
    assert compare_results(tmp_path / "one", tmp_path / "two").only_first == 3
    (tmp_path / "two" / "predictions.jsonl").write_text(lines[0].replace('"target": "yes"', '"target": "no"'))
    with pytest.raises(UserError, match="not the same data"):
        compare_results(tmp_path / "one", tmp_path / "two")


LINE = {"id": "1", "video": "a", "question_type": "", "target": "yes", "right": True}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"right": False}, "line 2: question '1' appears twice"),
        ({"id": []}, "line 2: has no id, video"),
        ({"id": "2", "video": None}, "line 2: has no id, video"),
        ({"id": "2", "question_type": None}, "line 2: has no id, video"),
        ({"id": "2", "right": "yes"}, "line 2: has no id, video"),
        ({"id": "2", "value": "1"}, "line 2: has no id, video"),
    ],
)
def test_lines_that_cannot_be_compared_are_refused(tmp_path, changed, message):
    file = predicted(tmp_path, f"{json.dumps(LINE)}\n{json.dumps(LINE | changed)}\n", "predictions.jsonl")
    with pytest.raises(UserError, match=message):
        compare_results(file, file)


def test_a_comparison_says_where_two_results_were_not_judged_alike(activitynet, tmp_path):
    file = predicted(tmp_path, answers_of(("v_a_1", "Yes.")))
    for name in ("none", "light"):
        (tmp_path / name).mkdir()
        write_scores(tmp_path / name, activitynet, score_file(activitynet, file, name))
    found = compare_results(tmp_path / "none", tmp_path / "light")
    assert found.judged == ("open generation, normalisation none", "open generation, normalisation light")
    assert "judged differently: the first by open generation, normalisation none; the second by" in found.format_table()
    assert "judged differently" not in compare_results(tmp_path / "none", tmp_path / "none").format_table()
    (tmp_path / "light" / "results.json").unlink()
    assert "the second by unknown" in compare_results(tmp_path / "none", tmp_path / "light").format_table()


def test_texts_of_the_web_are_read_back_as_they_were_written(tmp_path):
    """Some of their characters end a line for Python, and none of them does in a jsonl file."""
    text = "a\u2028b\u2029c\x85d\x0be"
    row = {"file": "a.mp4", "prompt": text, "target": text, "id": text}
    (tmp_path / "test.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    dataset = read_dataset("folder", tmp_path, "test")
    said = predicted(tmp_path, json.dumps({"id": text, "answer": text}, ensure_ascii=False) + "\n", "said.jsonl")
    scored = score_file(dataset, said)
    assert scored.metrics["All"].value == 1
    write_scores(tmp_path, dataset, scored)
    assert compare_results(tmp_path, tmp_path).rows["All"].n == 1
    assert score_file(dataset, tmp_path / "predictions.jsonl").metrics == scored.metrics


def test_a_result_names_the_predictions_that_were_scored(activitynet, tmp_path):
    file = predicted(tmp_path, answers_of(("v_a_1", "yes")))
    scored = score_file(activitynet, file).to_dict()
    assert scored["predictions"] == {"file": "pred.json", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_a_result_names_its_data_and_changes_with_it(activitynet, tmp_path):
    before = describe_data(activitynet)["data"]["sha256"]
    text = (tmp_path / "test_a.json").read_text()
    assert describe_data(read_dataset("activitynet_qa", tmp_path, "test"))["data"]["sha256"] == before
    (tmp_path / "test_a.json").write_text(text.replace("cup", "mug"))
    assert describe_data(read_dataset("activitynet_qa", tmp_path, "test"))["data"]["sha256"] != before


def test_a_hash_of_contents_changes_with_a_media_file_of_the_same_size(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"file": "a.mp4", "prompt": "what?", "target": "a bell"}))
    found = []
    for content in (b"one", b"two"):
        (tmp_path / "a.mp4").write_bytes(content)
        dataset = read_dataset("folder", tmp_path, "test")
        found.append([describe_data(dataset, contents)["data"]["sha256"] for contents in (False, True)])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_light_normalisation_keeps_articles_and_folded_does_not():
    assert normalise_lightly(" The  BELL. ") == "the bell"
    assert normalise(" The  BELL. ") == "bell"
    assert normalise_lightly(".") == "."
    assert normalise_lightly("e\u0301") == "\u00e9"


def test_the_table_on_screen_has_every_number(choices, tmp_path):
    found = score_file(choices, predicted(tmp_path, {"7_0": {"prediction": 1}}))
    text = format_scores(found)
    assert all(name in text for name in [*found.metrics, "chance", "majority"])
    assert re.search(r"^Acc +33\.33 +\[[\d.]+, [\d.]+\] +3 ", text, re.MULTILINE)


# Computed with the rules of the official scripts, apart from this package, on the excerpts' own example predictions.
OFFICIAL = {
    "activitynet_qa": ("pred_val_example.json", {"All": 1 / 3, "Yes/No": 2 / 3, "Free": 19 / 42,
                                                 "free_official_script": 19 / 36}),
    "nextqa_mc": ("pred_HGA_val.json", {"Why": 2 / 3, "How": 4 / 7, "Bef&Aft": 9 / 16, "When": 3 / 4, "Cnt": 1 / 2,
                                        "Loc": 3 / 5, "Other": 4 / 5, "Acc": 38 / 60}),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_example_predictions_score_as_their_scripts_say(real_data, name):
    root = real_data / "annotations" / name
    file, numbers = OFFICIAL[name]
    found = score_file(read_dataset(name, root, "validation"), root / file)
    assert found.problems == ()
    assert {key: found.metrics[key].value for key in numbers} == pytest.approx(numbers)


def test_open_answers_without_wordnet_are_told_how_papers_score_them(tmp_path, capsys):
    header = "video,frame_count,width,height,question,answer,qid,type\n"
    (tmp_path / "test.csv").write_text(header + "7,9,9,9,what,dog,0,DL\n")
    (tmp_path / "said.json").write_text('{"7": {"0": "dog"}}')
    score = ["score", "nextqa_oe", str(tmp_path), str(tmp_path / "said.json")]
    main(score)
    told = " ".join(capsys.readouterr().err.split())
    assert "papers report WUPS on NExT-QA's open answers: --wordnet DIR" in told
    with pytest.raises(SystemExit):
        main([*score, "--wordnet", str(tmp_path / "nowhere")])
    assert "nowhere: no such folder: get it with `python -m nltk.downloader" in capsys.readouterr().err
