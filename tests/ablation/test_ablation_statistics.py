"""Intervals over seeds and videos against closed forms and simulations, and the rules of the verdicts."""

import math

import numpy as np
import pytest

from mirasol.ablation.statistics import Spread, compute_spread, compute_t_quantile, compute_widening, judge
from mirasol.evaluation.intervals import compute_mean_intervals

VIDEOS = [f"v{number // 4}" for number in range(160)]


def test_t_quantiles_have_their_closed_forms():
    assert compute_t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475))
    assert compute_t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)))
    for freedom, tabled in ((3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)):
        assert compute_t_quantile(freedom) == pytest.approx(tabled, abs=1e-5)


def test_equal_seeds_leave_the_interval_over_videos():
    right = np.random.default_rng(0).integers(0, 2, len(VIDEOS)).astype(float)
    found = compute_spread(np.stack([right] * 5), VIDEOS)
    [plain] = compute_mean_intervals(right, VIDEOS, np.ones((len(VIDEOS), 1), bool))
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    assert found.mean == pytest.approx(right.mean()) and found.seeds == 5
    alone = compute_spread(right[None], VIDEOS)
    assert (alone.low, alone.high) == pytest.approx((plain.low, plain.high))


def test_equal_videos_leave_students_interval_over_seeds():
    means = np.array([0.40, 0.44, 0.47, 0.52, 0.57, 0.38, 0.49, 0.45])
    found = compute_spread(np.repeat(means[:, None], len(VIDEOS), 1), VIDEOS, replicates=20_000)
    half = compute_t_quantile(len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert (found.low + found.high) / 2 == pytest.approx(means.mean(), abs=0.1 * half)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator, times = np.random.default_rng(1), 150
    covered, half = 0, []
    for number in range(times):
        seeds, videos = generator.normal(0, 0.05, (5, 1)), generator.normal(0, 0.15, (1, 40))
        chance = 0.5 + seeds + np.repeat(videos, 4, axis=1)
        found = compute_spread((generator.uniform(size=chance.shape) < chance).astype(float), VIDEOS, 300, number)
        covered += found.low <= 0.5 <= found.high
        half.append((found.high - found.low) / 2)
    assert covered / times >= 0.92
    # Not by being wide: the error of such a mean is 0.04, and 5 seeds cost Student's 2.8 errors instead of 2.
    assert 0.05 < np.mean(half) < 0.12


def test_the_order_of_seeds_and_questions_changes_nothing_but_the_draws():
    generator = np.random.default_rng(2)
    values = generator.integers(0, 2, (4, len(VIDEOS))).astype(float)
    order = generator.permutation(len(VIDEOS))
    one, other = compute_spread(values, VIDEOS), compute_spread(values[:, order], [VIDEOS[place] for place in order])
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))


def test_more_seeds_widen_less():
    factors = [compute_widening(seeds) for seeds in range(2, 12)]
    assert factors == sorted(factors, reverse=True) and factors[-1] > 1
    assert compute_widening(1) == 0


@pytest.mark.parametrize(
    ("low", "high", "better", "worse", "same"),
    [
        (0.01, 0.05, "reproduced", "refuted", "undecided"),
        (-0.05, -0.01, "refuted", "reproduced", "undecided"),
        (-0.01, 0.01, "undecided", "undecided", "reproduced"),
        (-0.03, 0.01, "undecided", "undecided", "undecided"),
        (0.03, 0.05, "reproduced", "refuted", "refuted"),
        (-0.05, -0.03, "refuted", "reproduced", "refuted"),
        (0.0, 0.05, "undecided", "undecided", "undecided"),
    ],
)
def test_verdicts(low, high, better, worse, same):
    several = Spread((low + high) / 2, low, high, (low, high))
    assert [judge(several, claim, 0.02) for claim in ("better", "worse", "same")] == [better, worse, same]
    alone = Spread((low + high) / 2, low, high, (low,))
    assert {judge(alone, claim, 0.02) for claim in ("better", "worse", "same")} == {"undecided"}


def test_intervals_of_shares_end_at_none_and_all():
    values = np.repeat([[0.1], [0.6]], len(VIDEOS), axis=1)
    found = compute_spread(values, VIDEOS)
    assert found.low < 0 < 1 < found.high
    cut = found.cut_to_shares()
    assert (cut.low, cut.high) == (0, 1) and (cut.mean, cut.by_seed) == (found.mean, found.by_seed)
    assert compute_spread(values + 0.001, VIDEOS).cut_to_shares().mean == pytest.approx(0.351)
