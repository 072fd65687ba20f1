"""Means over seeds with intervals for which seeds and videos are drawn together, paired differences, and verdicts.

The formula, and why it is this one, is in docs/ablations.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from mirasol.evaluation.intervals import REPLICATES, compute_interval, draw_replicates, number_videos

Verdict = Literal["reproduced", "refuted", "undecided"]
_NORMAL = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and questions with its 95 % interval, and the mean of each seed.

    low, high: with a single seed the interval is over videos alone (`seeds` says so)
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def seeds(self) -> int:
        """How many seeds the mean is over."""
        return len(self.by_seed)

    def cut_to_shares(self) -> "Spread":
        """The spread of shares, whose interval has no part below 0 or above 1: few seeds give wide ones."""
        return replace(self, low=max(self.low, 0.0), high=min(self.high, 1.0))


def compute_spread(
    values: Float[np.ndarray, "seed question"], videos: Sequence[str], replicates: int = REPLICATES, number: int = 0
) -> Spread:
    """The mean of values (right 1, wrong 0, or a difference of two) with its 95 % interval.

    Every replicate draws videos, with all of their questions, and seeds, both with replacement. `number` is the seed of
    these draws.
    """
    values = np.asarray(values, dtype=float)
    seeds = len(values)
    count, video = number_videos(videos)
    sums = np.stack([np.bincount(video, row, minlength=count) for row in values])
    questions = np.bincount(video, minlength=count).astype(float)
    by_seed = sums.sum(axis=1) / questions.sum()
    generator = np.random.default_rng((number, seeds))
    widening, parts = compute_widening(seeds), []
    for times in draw_replicates(count, number, replicates):
        of_videos = (sums.mean(axis=0) @ times) / (questions @ times)
        drawn = generator.integers(seeds, size=(seeds, times.shape[1]))
        # Seeds move the mean of all videos, not that of the replicate's: the noise of single answers, which is in both
        # parts, would otherwise count three times instead of twice.
        parts.append(of_videos + widening * (by_seed[drawn].mean(axis=0) - by_seed.mean()))
    interval = compute_interval(np.concatenate(parts))
    assert interval.low is not None and interval.high is not None
    return Spread(float(by_seed.mean()), interval.low, interval.high, tuple(by_seed.tolist()))


def compute_widening(seeds: int) -> float:
    """The factor on what drawing seeds moves: sqrt(S / (S - 1)), for the variance of S draws from S seeds is too small
    by (S - 1) / S, times Student's t quantile over the normal one, for it is estimated from S seeds. 0 for one seed,
    which tells nothing about others."""
    if seeds < 2:
        return 0.0
    return math.sqrt(seeds / (seeds - 1)) * compute_t_quantile(seeds - 1) / _NORMAL


def compute_t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution, by bisection of its distribution function."""
    low, high = 0.0, 13.0  # 12.7 with one degree of freedom
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _compute_within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _compute_within(t: float, freedom: int) -> float:
    """The probability that |T| < t: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total, terms = 0.0, (freedom - 1) // 2 if odd else freedom // 2
    for place in range(terms):
        total += term
        step = 2 * place + (2 if odd else 1)
        term *= square * step / (step + 1)
    return (2 / math.pi) * (angle + sine * total) if odd else sine * total


def judge(difference: Spread, expected: str, margin: float) -> Verdict:
    """Whether a difference bears out what the paper found.

    better, worse: decided where the interval excludes 0. same: reproduced where the interval is within `margin` of 0,
    refuted where it is entirely beyond. One seed decides nothing.
    """
    low, high = difference.low, difference.high
    if difference.seeds < 2:
        return "undecided"
    if expected == "same":
        if -margin <= low and high <= margin:
            return "reproduced"
        return "refuted" if low > margin or high < -margin else "undecided"
    if expected == "worse":
        low, high = -high, -low
    if low > 0:
        return "reproduced"
    return "refuted" if high < 0 else "undecided"
