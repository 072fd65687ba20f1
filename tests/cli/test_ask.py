"""`mirasol ask`: many questions about one clip, candidates, probabilities, doubt, and what is said of a checkpoint."""

import contextlib
import io
import itertools
import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from untrained import only_stream

from mirasol.checkpoint import load_checkpoint
from mirasol.cli.ask import format_probability, move_options_last
from mirasol.cli.main import main
from mirasol.evaluation.answer import Answer

QUESTIONS = ["what colour is the circle?", "what shape is red?", "which sound is heard first?"]


@pytest.fixture
def clip(shapes):
    return sorted((shapes / "clips" / "test").iterdir())[0]


@pytest.fixture
def calibrated(untrained, tmp_path):
    """A copy of a checkpoint with a threshold that is met by nothing; returns it and what sets another threshold."""
    folder = shutil.copytree(untrained, tmp_path / "checkpoint")

    def set_threshold(value, weights=None, **more):
        content = {"threshold": value, "weights_sha256": weights or read_hash(folder), **more}
        (folder / "calibration.json").write_text(json.dumps(content))

    set_threshold(1.0)
    return folder, set_threshold


def read_hash(folder):
    from mirasol.checkpoint import read_weights_hash

    return read_weights_hash(folder)


def run(capsys, *arguments, stdin=None, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    main(["ask", *map(str, arguments)])
    return capsys.readouterr()


def read_records(out):
    return [json.loads(line) for line in out.splitlines()]


def test_each_answer_is_a_line_with_its_probability_and_notes_are_elsewhere(capsys, untrained, clip):
    out, err = run(capsys, untrained, clip, *QUESTIONS, "--max-new-tokens", 4)
    lines = out.splitlines()
    records = read_records(run(capsys, untrained, clip, *QUESTIONS, "--max-new-tokens", 4, "--json").out)
    assert [record["question"] for record in records] == QUESTIONS
    for line, record in zip(lines, records, strict=True):
        assert line == f"{record['answer']}  ({format_probability(record['probability'])})"
        assert record["file"] == str(clip)
        assert record.keys() >= {"chunks", "notes", "remarks", "seconds", "threshold", "not_sure", "start", "end"}
    assert "no measured threshold" in err and str(untrained) in err


def test_questions_share_one_reading_and_one_encoding(capsys, monkeypatch, untrained, clip):
    from mirasol.media.feature_extractor import MirasolFeatureExtractor
    from mirasol.model.mirasol import MirasolNetwork

    calls = []
    for owner, name in ((MirasolFeatureExtractor, "read"), (MirasolNetwork, "encode")):
        method = getattr(owner, name)

        def count(self, *args, _method=method, _name=name, **named):
            calls.append(_name)
            return _method(self, *args, **named)

        monkeypatch.setattr(owner, name, count)
    run(capsys, untrained, clip, *QUESTIONS, "--max-new-tokens", 2)
    assert calls == ["read", "encode"]


def test_an_answer_does_not_depend_on_the_other_questions_or_where_they_come_from(capsys, monkeypatch, untrained, clip):
    together = read_records(run(capsys, untrained, clip, *QUESTIONS, "--json").out)
    piped = "\n" + "\n\n".join(QUESTIONS) + "\n  \n"
    from_lines = read_records(run(capsys, untrained, clip, "--json", stdin=piped, monkeypatch=monkeypatch).out)
    for place, question in enumerate(QUESTIONS):
        [alone] = read_records(run(capsys, untrained, clip, question, "--json").out)
        for other in (together[place], from_lines[place]):
            assert (other["question"], other["answer"], other["probability"]) == (
                question, alone["answer"], alone["probability"],
            )  # fmt: skip


def test_options_may_stand_anywhere(capsys, untrained, clip):
    options = [["--max-new-tokens", "3"], ["--start=1"], ["--json"]]
    words = [str(untrained), str(clip), "what is red?", "- what?"]
    found = []
    for places in itertools.islice(itertools.product(range(5), repeat=3), 0, 125, 31):
        mixed = [[word] for word in words]
        for place, option in sorted(zip(places, options, strict=True), key=lambda pair: -pair[0]):
            mixed.insert(place, option)
        arguments = move_options_last(["ask", *(word for part in mixed for word in part)])
        assert arguments[1:5] == words and sorted(arguments[5:]) == sorted(
            word for option in options for word in option
        )
        found.append(arguments)
    assert move_options_last(["ask", "a", "b", "--json", "--", "--c"]) == ["ask", "a", "b", "--c", "--json"]
    assert move_options_last(["train", "--config", "a", "b"]) == ["train", "--config", "a", "b"]
    assert len(read_records(run(capsys, *found[-1][1:]).out)) == 2


def test_a_window_in_seconds(capsys, untrained, clip):
    [whole] = read_records(run(capsys, untrained, clip, "what?", "--json").out)
    [part] = read_records(run(capsys, untrained, clip, "what?", "--json", "--start", 1, "--end", 2.5).out)
    assert (part["start"], part["end"]) == (1.0, 2.5)
    assert 0 < part["chunks"] < whole["chunks"]


def test_candidates_are_ranked_as_the_model_scores_them(capsys, untrained, clip):
    candidates = ["a long answer of many words", "red", "it"]
    [record] = read_records(
        run(capsys, untrained, clip, QUESTIONS[0], "--candidates", "|".join(candidates), "--json").out
    )
    ranked = record["candidates"]
    assert sorted(one["text"] for one in ranked) == sorted(candidates)
    assert math.isclose(sum(one["share"] for one in ranked), 1, abs_tol=1e-5)
    shares = [one["share"] for one in ranked]
    assert shares == sorted(shares, reverse=True) and record["answer"] == ranked[0]["text"]

    loaded = load_checkpoint(untrained)
    extractor = loaded.processor.feature_extractor
    media = extractor.collate([extractor.tensors(extractor.read(clip))])
    scores = loaded.model.score(loaded.model.encode(**media), **loaded.processor.candidates(QUESTIONS[:1], candidates))
    by_text = dict(zip(candidates, scores.per_token.softmax(-1)[0].tolist(), strict=True))
    totals = dict(zip(candidates, scores.total.exp()[0].tolist(), strict=True))
    for one in ranked:
        assert one["share"] == pytest.approx(by_text[one["text"]], rel=1e-3)
        assert one["probability"] == pytest.approx(totals[one["text"]], rel=1e-3)

    line = run(capsys, untrained, clip, QUESTIONS[0], "--candidates", " | ".join(candidates)).out
    assert (
        line.startswith(f"{ranked[0]['text']}  ({format_probability(ranked[0]['share'])}; ") and line.count("\n") == 1
    )


@pytest.mark.parametrize(("threshold", "is_sure"), [(0.0, True), (1.0, False), (None, None)])
def test_an_answer_below_the_measured_threshold_is_not_sure(capsys, untrained, calibrated, clip, threshold, is_sure):
    folder, set_threshold = calibrated
    if threshold is not None:
        set_threshold(threshold)
    checkpoint = untrained if threshold is None else folder
    out, err = run(capsys, checkpoint, clip, "what?", "--max-new-tokens", 3)
    [record] = read_records(run(capsys, checkpoint, clip, "what?", "--max-new-tokens", 3, "--json").out)
    assert ("not sure" in out) is (is_sure is False)
    assert record["threshold"] == threshold and record["not_sure"] == (None if is_sure is None else not is_sure)
    assert ("no measured threshold" in err) is (threshold is None)


def test_a_threshold_of_other_weights_does_not_count(capsys, calibrated, clip):
    folder, set_threshold = calibrated
    set_threshold(1.0, weights="0" * 64)
    out, err = run(capsys, folder, clip, "what?", "--max-new-tokens", 3)
    assert "not sure" not in out and "no measured threshold" in err


@pytest.mark.parametrize("limit", [0.0, 1e9, None])
@pytest.mark.parametrize("more", [[], ["--candidates", "red|blue"]])
def test_nothing_is_sure_about_a_clip_of_another_kind(capsys, calibrated, clip, limit, more):
    folder, set_threshold = calibrated
    set_threshold(0.0, highest_surprise=limit)
    out, err = run(capsys, folder, clip, "what?", "--max-new-tokens", 3, *more)
    [record] = read_records(run(capsys, folder, clip, "what?", "--max-new-tokens", 3, "--json", *more).out)
    is_strange = limit == 0.0
    assert ("not sure" in out) is ("unlike all that it was measured on" in err) is record["not_sure"] is is_strange
    assert record["surprise"] > 0 and record["highest_surprise"] == limit


def test_sound_alone_surprises_nobody(capsys, calibrated, clip, tmp_path):
    folder, set_threshold = calibrated
    set_threshold(0.0, highest_surprise=0.0)
    sound = only_stream("audio", clip, tmp_path / "sound.mp4")
    [record] = read_records(run(capsys, folder, sound, "what?", "--max-new-tokens", 1, "--json").out)
    assert record["surprise"] is None and record["not_sure"] is False


@pytest.mark.parametrize("value", [1.5, -0.1, "high", None, True])
def test_a_damaged_threshold_is_named(capsys, calibrated, clip, value):
    folder, set_threshold = calibrated
    set_threshold(value)
    with pytest.raises(SystemExit) as stop:
        run(capsys, folder, clip, "what?")
    assert stop.value.code == 2 and "calibration.json" in capsys.readouterr().err


@pytest.mark.parametrize("world", ["shapes and sounds", None])
def test_a_checkpoint_that_knows_rendered_scenes_only_says_so(capsys, calibrated, clip, world):
    folder, _ = calibrated
    (folder / "training.json").write_text(json.dumps({"rendered_world": world, "weights_sha256": read_hash(folder)}))
    err = run(capsys, folder, clip, "what?", "--max-new-tokens", 1).err
    assert ("rendered scenes only (shapes and sounds)" in err) is (world is not None)


def test_an_empty_answer_is_shown_as_such(capsys, monkeypatch, untrained, clip):
    monkeypatch.setattr("mirasol.evaluation.answer.answer_encoded", lambda *arguments: Answer("", 0.5))
    assert run(capsys, untrained, clip, "what is red?").out == "(empty answer)  (0.50)\n"
    assert read_records(run(capsys, untrained, clip, "what is red?", "--json").out)[0]["answer"] == ""


@pytest.mark.parametrize(
    ("stdin", "answered", "words"),
    [
        ("", 0, "no question"),
        (" \n\n", 0, "no question"),
        ("what?\n" + "why? " * 5000 + "\nwho?\n", 1, "max_text_length"),
        ("what?\n\ncaf\udce9?\n", 1, "standard input, line 3: 'caf\\udce9?': not UTF-8 text"),
    ],
)
def test_bad_lines_end_in_one_line_after_the_answers_before_them(
    capsys, monkeypatch, untrained, clip, stdin, answered, words
):
    with pytest.raises(SystemExit) as stop:
        run(capsys, untrained, clip, "--max-new-tokens", 2, stdin=stdin, monkeypatch=monkeypatch)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out.count("\n") == answered
    assert words in err.splitlines()[-1]


def test_one_question_too_long_is_refused_before_any_is_answered(capsys, untrained, clip):
    with pytest.raises(SystemExit):
        run(capsys, untrained, clip, "what?", "why? " * 5000)
    assert capsys.readouterr().out == ""


def interrupt(process: subprocess.Popen) -> None:
    """As somebody who presses Ctrl-C again: Python notices none that comes just before it begins to read a line."""
    for _ in range(12):
        time.sleep(0.5)  # back at the prompt
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


@pytest.mark.parametrize("ending", ["eof", "interrupt"])
def test_a_terminal_is_asked_for_questions_until_it_ends(untrained, clip, ending):
    """The command runs with a terminal as standard input: a question too long is told and the next one answered."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mirasol.cli", "ask", untrained, clip, "--max-new-tokens", "2"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    os.close(theirs)
    try:
        shown = b""
        while b"Ctrl-D" not in shown:
            assert select.select([process.stderr], [], [], 60)[0], "no prompt"
            shown += os.read(process.stderr.fileno(), 65536)
        answered = b""
        os.write(ours, b"what?\n\nwhich?\n")
        while answered.count(b")\n") < 2:
            assert select.select([process.stdout], [], [], 60)[0], "no answer"
            answered += os.read(process.stdout.fileno(), 65536)
        if ending == "eof":
            os.write(ours, b"\x04")
        else:
            interrupt(process)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert b"Traceback" not in errors
    finally:
        process.kill()
        os.close(ours)


# What takes longest to import and is not needed to answer: half of transformers, torch's compiler and distributed
# computing, and what other commands need.
HEAVY = (
    "transformers.modeling_utils", "transformers.generation.utils", "transformers.processing_utils", "accelerate",
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "matplotlib",
    "av", "rich", "tensorboard", "nltk", "scipy", "pandas", "torchvision",
    "mirasol.model.hf", "mirasol.auto", "mirasol.training", "mirasol.pretrained",
)  # fmt: skip


@pytest.mark.parametrize("way", ["answer", "candidates"])
def test_nothing_heavy_is_imported_that_an_answer_does_not_need(untrained, clip, way):
    more = ["--candidates", "red|blue"] if way == "candidates" else ["--json"]
    arguments = ["ask", str(untrained), str(clip), "what?", "--max-new-tokens", "2", *more]
    code = (
        "import json, sys\nfrom mirasol.cli.main import main\n"
        f"main({arguments!r})\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert json.loads(ended.stdout.splitlines()[-1]) == []


def test_an_empty_question_is_refused_by_its_number(capsys, untrained, clip):
    with pytest.raises(SystemExit) as stop:
        run(capsys, untrained, clip, "what is red?", "  ")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert "question 2 is empty" in err
