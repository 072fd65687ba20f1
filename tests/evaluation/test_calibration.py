"""Reliability tables and thresholds: against their definition by brute force, and through an evaluation."""

import itertools
import json
import random
import shutil

import pytest

from mirasol.checkpoint import load_checkpoint, read_doubt
from mirasol.cli.main import main
from mirasol.errors import UserError
from mirasol.evaluation.calibration import (
    EDGES,
    REMOVING_CONTROLS,
    JudgedProbability,
    apply_threshold,
    bin_probabilities,
    choose_threshold,
    compute_calibration_error,
    format_calibration,
    measure_calibration,
    write_calibration,
)
from mirasol.evaluation.evaluate import hash_checkpoint


def draw_answers(seed):
    """Answers of many kinds: calibrated or not, all right, all wrong, many of equal probability, on the edges, one."""
    rng = random.Random(seed)
    count = rng.choice([1, 2, 7, 60, 400])
    values = [
        rng.choice([rng.random(), rng.choice(EDGES), 0.5, round(rng.random(), 1), 1 - rng.random() ** 4])
        for _ in range(count)
    ]
    skill = rng.choice([0.0, 0.3, 1.0, None])
    return [JudgedProbability(value, rng.random() < (value if skill is None else skill)) for value in values]


def count_misjudged(answers, threshold):
    return sum(answer.right == (answer.probability < threshold) for answer in answers)


@pytest.mark.parametrize("seed", range(40))
def test_a_threshold_misjudges_as_few_answers_as_any(seed):
    answers = draw_answers(seed)
    found = choose_threshold(answers)
    candidates = [0.0, 1.1, *(answer.probability for answer in answers)]
    # Doubting every answer, 1.1, is not offered: a threshold is the probability of an answer that is believed.
    best = min(count_misjudged(answers, value) for value in candidates if value <= 1)
    assert count_misjudged(answers, found) == best
    assert all(count_misjudged(answers, value) > best for value in candidates if value < found)


@pytest.mark.parametrize("seed", range(40))
def test_a_table_has_every_answer_once_and_its_error_is_the_weighted_distance(seed):
    answers = draw_answers(seed)
    bins = bin_probabilities(answers)
    assert [(one.low, one.high) for one in bins] == list(itertools.pairwise(EDGES))
    assert sum(one.answers for one in bins) == len(answers)
    error = 0.0
    for one in bins:
        own = [a for a in answers if one.low <= a.probability < one.high or a.probability == one.high == 1.0]
        assert one.answers == len(own)
        if own:
            assert one.accuracy == pytest.approx(sum(a.right for a in own) / len(own))
            assert one.probability == pytest.approx(sum(a.probability for a in own) / len(own))
            error += abs(sum(a.right - a.probability for a in own))
        else:
            assert one.accuracy is one.probability is None
    assert compute_calibration_error(bins) == pytest.approx(error / len(answers))


def test_nothing_has_no_threshold_and_no_error():
    assert choose_threshold([]) is None
    assert compute_calibration_error(bin_probabilities([])) is None
    assert "threshold" not in measure_calibration([], {name: [] for name in REMOVING_CONTROLS})


def test_a_threshold_counts_both_sides():
    answers = [JudgedProbability(p, right) for p, right in ((0.1, False), (0.4, True), (0.4, False), (0.9, True))]
    found = apply_threshold(answers, 0.4)
    assert (found.answers_above, found.answers_below) == (3, 1)
    assert (found.accuracy_above, found.accuracy_below) == (pytest.approx(2 / 3), 0.0)


@pytest.mark.parametrize("missing", REMOVING_CONTROLS)
def test_without_one_of_the_controls_there_is_no_threshold(missing, tmp_path):
    removed = {name: draw_answers(2) for name in REMOVING_CONTROLS if name != missing}
    record = {"calibration": measure_calibration(draw_answers(1), removed)}
    assert "threshold" not in record["calibration"] and "not sure" not in format_calibration(record["calibration"])
    with pytest.raises(UserError, match=missing):
        write_calibration(tmp_path, record)


def test_an_evaluation_stores_the_threshold_that_ask_reads(untrained, shapes, tmp_path, capsys):
    checkpoint = shutil.copytree(untrained, tmp_path / "checkpoint")
    before = hash_checkpoint(checkpoint)
    output = tmp_path / "results"
    command = ["evaluate", str(checkpoint), str(shapes), "--max-new-tokens", "2", "--json"]
    main([*command, "--calibrate", "--output", str(output)])
    printed = capsys.readouterr()
    record = json.loads((output / "results.json").read_text())
    stored = json.loads((checkpoint / "calibration.json").read_text())
    doubt = read_doubt(checkpoint)
    assert doubt.threshold == stored["threshold"] == record["calibration"]["threshold"]["value"]
    assert doubt.highest_surprise == record["calibration"]["surprise"]["highest"] > 0
    assert (
        stored["calibration"] == record["calibration"] and stored["measured_on"]["sha256"] == record["data"]["sha256"]
    )
    assert "not sure below" in printed.err
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert sum(one["answers"] for one in record["calibration"]["bins"]) == len(lines)
    assert all(0 <= line["probability"] <= 1 for line in lines)
    assert "How sure it is" in (output / "report.html").read_text()
    # Answers do not depend on it: other results of this checkpoint stay comparable, and evaluations resume.
    assert hash_checkpoint(checkpoint) == before
    load_checkpoint(checkpoint)
