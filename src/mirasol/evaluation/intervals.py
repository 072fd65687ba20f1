"""95 % confidence intervals by the bootstrap. Videos are drawn, not questions: those of one video stand and fall
together, and an interval over questions would be too narrow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

REPLICATES = 2_000
_AT_ONCE = 2**22  # drawn numbers of videos held at a time


@dataclass(frozen=True)
class Interval:
    """The 2.5th and 97.5th percentile of a metric over the replicates; None where none of them defines it."""

    low: float | None
    high: float | None


def mean_intervals(
    values: Float[np.ndarray, "question"],
    videos: Sequence[str],
    groups: Bool[np.ndarray, "question group"],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> list[Interval]:
    """The interval of the mean value of each group of questions."""
    parts = list(_means(values, videos, groups, seed, replicates))
    means = np.concatenate(parts) if parts else np.empty((0, groups.shape[1]))
    return [_interval(column) for column in means.T]


def class_mean_interval(
    values: Float[np.ndarray, "question"],
    videos: Sequence[str],
    groups: Bool[np.ndarray, "question group"],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Interval:
    """The interval of the mean over groups (classes) of their mean values, of those that a replicate holds."""
    parts = [np.nanmean(means, axis=1) for means in _means(values, videos, groups, seed, replicates)]
    return _interval(np.concatenate(parts)) if parts else Interval(None, None)


def _means(values, videos, groups, seed: int, replicates: int) -> Iterator[np.ndarray]:
    """Group means of the replicates, [replicate, group], NaN where a replicate has nothing of a group.

    Videos are numbered by name, so the order of questions changes nothing.
    """
    if not len(values):
        return
    names, video = np.unique(np.asarray(videos), return_inverse=True)
    weighted = groups.astype(float)
    sums, counts = np.zeros((len(names), groups.shape[1])), np.zeros((len(names), groups.shape[1]))
    np.add.at(sums, video, weighted * np.asarray(values, dtype=float)[:, None])
    np.add.at(counts, video, weighted)
    generator = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // len(names))
    for first in range(0, replicates, at_once):
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), min(at_once, replicates - first))
        total = drawn @ counts
        with np.errstate(invalid="ignore", divide="ignore"):
            yield np.where(total > 0, (drawn @ sums) / total, np.nan)


def _interval(replicated: np.ndarray) -> Interval:
    defined = replicated[~np.isnan(replicated)]
    if not len(defined):
        return Interval(None, None)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(float(low), float(high))


def sign_test(first_only: int, second_only: int) -> float:
    """Two-sided exact McNemar test: how likely a split of the questions that only one of two models got right is at
    least as uneven, were both equally good. 1 where there are none. It takes questions for independent."""
    total = first_only + second_only
    tail = term = 1  # ways to choose 0 of them
    for k in range(min(first_only, second_only)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)
