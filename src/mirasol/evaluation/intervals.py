"""95 % confidence intervals by the bootstrap. Videos are drawn, not questions: those of one video stand and fall
together, and an interval over questions would be too narrow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16

REPLICATES = 2_000
_AT_ONCE = 2**23  # drawn numbers of videos held at a time


@dataclass(frozen=True)
class Interval:
    """The 2.5th and 97.5th percentile of a metric over the replicates; None where none of them defines it."""

    low: float | None
    high: float | None


def mean_intervals(
    values: Float[np.ndarray, " question"],
    videos: Sequence[str],
    groups: Bool[np.ndarray, "question group"],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> list[Interval]:
    """The interval of the mean value of each group of questions."""
    parts = list(_means(values, videos, groups, seed, replicates))
    means = np.concatenate(parts, axis=1) if parts else np.empty((groups.shape[1], 0))
    return [interval_of(row) for row in means]


def class_mean_interval(
    values: Float[np.ndarray, " question"],
    videos: Sequence[str],
    groups: Bool[np.ndarray, "question group"],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Interval:
    """The interval of the mean over groups (classes) of their mean values, of those that a replicate holds."""
    parts = [np.nanmean(means, axis=0) for means in _means(values, videos, groups, seed, replicates)]
    return interval_of(np.concatenate(parts)) if parts else Interval(None, None)


def numbered(videos: Sequence[str]) -> tuple[int, Int[np.ndarray, " question"]]:
    """How many videos there are, and the number of each question's.

    Videos are numbered by name, so the order of questions changes nothing.
    """
    names, number = np.unique(np.asarray(videos), return_inverse=True)
    return len(names), number


def draws(count: int, seed: int, replicates: int = REPLICATES) -> Iterator[UInt16[np.ndarray, "video replicate"]]:
    """How often each replicate drew each of `count` videos, some replicates at a time; the same for the same seed."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // max(count, 1))
    for first in range(0, replicates if count else 0, at_once):
        size = min(at_once, replicates - first)
        drawn = generator.integers(count, size=(size, count), dtype=np.int32)
        drawn += np.arange(size, dtype=np.int32)[:, None] * count  # below 2 * _AT_ONCE or count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield np.ascontiguousarray(times.T.astype(np.uint16))


def _means(values, videos, groups, seed: int, replicates: int) -> Iterator[np.ndarray]:
    """Group means of the replicates, [group, replicate], NaN where a replicate has nothing of a group."""
    videos_count, video = numbered(videos)
    values = np.asarray(values, dtype=float)
    parts = []
    for chosen in groups.T:
        counts = np.bincount(video[chosen], minlength=videos_count)
        there = np.flatnonzero(counts)
        sums = np.bincount(video[chosen], values[chosen], minlength=videos_count)
        parts.append((there, np.stack([sums[there], counts[there]]).astype(float)))
    for times in draws(videos_count, seed, replicates):
        sums = np.empty((len(parts), 2, times.shape[1]))
        for place, (there, weights) in enumerate(parts):
            sums[place] = weights @ times[there].astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            yield np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)


def interval_of(replicated: Float[np.ndarray, " replicate"], around: float | None = None) -> Interval:
    """The interval of a metric, of the replicates that define it; shifted, where `around` is given, so that it is the
    replicates' mean."""
    defined = replicated[~np.isnan(replicated)]
    if not len(defined):
        return Interval(None, None)
    if around is not None:
        defined = np.clip(defined + (around - defined.mean()), 0, 1)
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
