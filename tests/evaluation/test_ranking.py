import math

import numpy as np
import pytest

from mirasol.evaluation.ranking import (
    Thresholds,
    area_under_curve,
    average_over_classes,
    average_precision,
    compute_ranking_intervals,
    d_prime,
    is_right_in_top,
)

RIGHT = np.array([True, False, True, False])


def test_average_precision_by_hand():
    # Right ones at places 1 and 3: precision 1 and 2/3, each gains half of the recall.
    assert average_precision(np.array([0.9, 0.8, 0.7, 0.6]), RIGHT) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([0.9, 0.1, 0.8, 0.2]), RIGHT) == 1
    assert math.isnan(average_precision(np.array([0.9]), np.array([False])))


def test_area_is_the_share_of_pairs_in_order():
    assert area_under_curve(np.array([0.9, 0.8, 0.7, 0.6]), RIGHT) == pytest.approx(3 / 4)
    assert area_under_curve(np.array([0.5, 0.5, 0.9, 0.1]), RIGHT) == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert math.isnan(area_under_curve(np.array([0.5]), np.array([True])))


def test_area_counts_pairs_whatever_the_scores():
    generator = np.random.default_rng(0)
    scores, right = generator.integers(0, 5, 60).astype(float), generator.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert area_under_curve(scores, right) == pytest.approx(np.mean(pairs))


def test_the_order_of_examples_does_not_matter_even_where_scores_are_equal():
    generator = np.random.default_rng(1)
    scores, right = generator.integers(0, 4, 50).astype(float), generator.random(50) < 0.5
    shuffled = generator.permutation(50)
    for metric in (average_precision, area_under_curve):
        assert metric(scores, right) == pytest.approx(metric(scores[shuffled], right[shuffled]))


def test_equal_scores_are_worth_the_share_of_right_examples():
    assert average_precision(np.zeros(4), RIGHT) == 0.5
    assert area_under_curve(np.zeros(4), RIGHT) == 0.5


def test_top_k_takes_the_first_of_equal_classes_and_nothing_where_nothing_was_predicted():
    labels = np.eye(3, dtype=bool)
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-np.inf] * 3])
    assert is_right_in_top(scores, labels, 1).tolist() == [True, False, False]
    assert is_right_in_top(scores, labels, 2).tolist() == [True, True, False]


def test_the_average_over_classes_leaves_out_classes_without_examples():
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]])
    labels = np.array([[True, False, False], [False, True, False]])
    assert average_over_classes(average_precision, scores, labels) == 1
    assert math.isnan(average_over_classes(average_precision, scores[:, 2:], labels[:, 2:]))


def test_d_prime_is_nothing_at_chance_and_symmetric():
    assert d_prime(0.5) == pytest.approx(0)
    assert d_prime(0.9) == pytest.approx(1.8124, abs=1e-4)  # sqrt(2) * 1.28155
    assert d_prime(0.1) == pytest.approx(-d_prime(0.9))
    assert d_prime(1.0) == math.inf


def test_weights_count_as_copies_of_examples():
    generator = np.random.default_rng(2)
    scores, right = generator.integers(0, 9, 40).astype(float), generator.random(40) < 0.3
    weights = generator.integers(0, 4, (40, 3)).astype(np.uint16)
    precision, area = Thresholds(scores, right).compute_weighted(weights, weights.sum(axis=0).astype(float))
    for place in range(3):
        copies = np.repeat(np.arange(40), weights[:, place])
        assert precision[place] == pytest.approx(average_precision(scores[copies], right[copies]))
        assert area[place] == pytest.approx(area_under_curve(scores[copies], right[copies]))


def test_intervals_of_map_and_area_hold_the_values_and_draw_videos():
    generator = np.random.default_rng(3)
    labels = np.eye(4, dtype=bool)[generator.integers(0, 4, 160)]
    scores = generator.normal(size=labels.shape) + 1.2 * labels
    videos = [f"v{n}" for n in range(160)]
    found = compute_ranking_intervals(scores, labels, videos)
    for one, metric in zip(found, (average_precision, area_under_curve), strict=True):
        assert one.low < average_over_classes(metric, scores, labels) < one.high
    assert found == compute_ranking_intervals(scores[::-1], labels[::-1], videos[::-1]), "the order changes nothing"
    repeated = compute_ranking_intervals(
        scores.repeat(5, axis=0), labels.repeat(5, axis=0), np.repeat(videos, 5).tolist()
    )
    assert [(one.low, one.high) for one in repeated] == [pytest.approx((one.low, one.high)) for one in found]
    assert compute_ranking_intervals(scores, np.zeros_like(labels), videos)[0].low is None


def test_the_width_of_the_area_is_that_of_its_normal_approximation():
    generator = np.random.default_rng(4)
    right = np.arange(400) < 200
    scores = generator.normal(size=400) + right
    area = area_under_curve(scores, right)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)  # Hanley and McNeil 1982
    error = np.sqrt((area * (1 - area) + 199 * (q1 - area**2) + 199 * (q2 - area**2)) / 200**2)
    found = compute_ranking_intervals(scores[:, None], right[:, None], [f"v{n}" for n in range(400)])[1]
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
