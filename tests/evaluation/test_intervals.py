import numpy as np
import pytest

from mirasol.evaluation.intervals import compute_class_mean_interval, compute_mean_intervals, compute_sign_test


def interval(values, videos, **settings):
    return compute_mean_intervals(np.asarray(values, float), videos, np.ones((len(values), 1), bool), **settings)[0]


def test_an_interval_holds_the_mean_and_is_the_same_for_one_seed():
    values, videos = np.sin(np.arange(40)), [f"v{n}" for n in range(40)]
    found = interval(values, videos)
    assert found.low < values.mean() < found.high
    assert found == interval(values, videos)
    assert found != interval(values, videos, seed=1)


def test_the_order_of_questions_changes_nothing():
    values, videos = np.arange(40) % 3 == 0, [f"v{n // 2}" for n in range(40)]
    assert interval(values, videos) == interval(values[::-1], videos[::-1])


def test_videos_are_drawn_and_not_questions():
    # Ten questions of a video that are all right or all wrong tell as much as one.
    per_video = [1, 0, 1, 1, 0, 1, 0, 1]
    single = interval(per_video, [f"v{n}" for n in range(8)])
    repeated = interval(np.repeat(per_video, 10), [f"v{n // 10}" for n in range(80)])
    assert repeated == single
    independent = interval(np.repeat(per_video, 10), [f"v{n}" for n in range(80)])
    assert independent.high - independent.low < 0.5 * (single.high - single.low)


def test_the_width_is_that_of_the_normal_approximation():
    values = np.arange(400) % 4 == 0
    found = interval(values, [f"v{n}" for n in range(400)])
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.1)


def test_a_group_without_questions_has_no_interval():
    groups = np.array([[True, False], [True, False]])
    first, second = compute_mean_intervals(np.array([1.0, 0.0]), ["a", "b"], groups)
    assert (first.low, first.high) == (0, 1)
    assert (second.low, second.high) == (None, None)


def test_the_class_mean_leaves_out_classes_that_a_replicate_lacks():
    values, groups = np.array([1.0, 1.0, 1.0]), np.eye(3, dtype=bool)
    assert compute_class_mean_interval(values, ["a", "b", "c"], groups).low == 1.0


def test_mcnemar_by_hand():
    assert compute_sign_test(0, 0) == 1
    assert compute_sign_test(5, 5) == 1
    assert compute_sign_test(0, 5) == pytest.approx(2 / 32)
    assert compute_sign_test(1, 5) == compute_sign_test(5, 1) == pytest.approx(2 * (1 + 6) / 64)
    assert compute_sign_test(3_000, 3_400) < 1e-6
