"""95 % confidence intervals by the bootstrap. Videos are drawn, not questions: questions about one video are not
independent, and an interval over questions would be too narrow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16

REPLICATES = 2_000
_AT_ONCE = 2**23  # drawn videos in memory at a time


@dataclass(frozen=True)
class Interval:
    """The 2.5th and 97.5th percentile of a metric over the replicates; None where it is defined for none of them."""

    low: float | None
    high: float | None


def compute_mean_intervals(
    values: Float[np.ndarray, " question"],
    videos: Sequence[str],
    groups: Bool[np.ndarray, "question group"],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> list[Interval]:
    """The interval of the mean value of each group of questions."""
    parts = list(_compute_replicate_means(values, videos, groups, seed, replicates))
    means = np.concatenate(parts, axis=1) if parts else np.empty((groups.shape[1], 0))
    return [compute_interval(row) for row in means]


def compute_class_mean_interval(
    values: Float[np.ndarray, " question"],
    videos: Sequence[str],
    groups: Bool[np.ndarray, "question group"],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Interval:
    """The interval of the mean of the groups' (classes') mean values; a replicate counts the groups it contains."""
    parts = [np.nanmean(means, axis=0) for means in _compute_replicate_means(values, videos, groups, seed, replicates)]
    return compute_interval(np.concatenate(parts)) if parts else Interval(None, None)


def number_videos(videos: Sequence[str]) -> tuple[int, Int[np.ndarray, " question"]]:
    """The count of videos, and the number of each question's video.

    Videos are numbered by name, so the order of questions changes nothing.
    """
    names, number = np.unique(np.asarray(videos), return_inverse=True)
    return len(names), number


def draw_replicates(
    count: int, seed: int, replicates: int = REPLICATES
) -> Iterator[UInt16[np.ndarray, "video replicate"]]:
    """How often each replicate draws each of `count` videos, in batches of replicates; the same for the same seed."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // max(count, 1))
    for first in range(0, replicates if count else 0, at_once):
        size = min(at_once, replicates - first)
        drawn = generator.integers(count, size=(size, count), dtype=np.int32)
        drawn += np.arange(size, dtype=np.int32)[:, None] * count  # below 2 * _AT_ONCE or count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield np.ascontiguousarray(times.T.astype(np.uint16))


def _compute_replicate_means(values, videos, groups, seed: int, replicates: int) -> Iterator[np.ndarray]:
    """Group means of the replicates, [group, replicate], NaN where a replicate has no question of a group."""
    videos_count, video = number_videos(videos)
    values = np.asarray(values, dtype=float)
    parts = []
    for chosen in groups.T:
        counts = np.bincount(video[chosen], minlength=videos_count)
        there = np.flatnonzero(counts)
        sums = np.bincount(video[chosen], values[chosen], minlength=videos_count)
        parts.append((there, np.stack([sums[there], counts[there]]).astype(float)))
    for times in draw_replicates(videos_count, seed, replicates):
        sums = np.empty((len(parts), 2, times.shape[1]))
        for place, (there, weights) in enumerate(parts):
            sums[place] = weights @ times[there].astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            yield np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)


def compute_interval(replicated: Float[np.ndarray, " replicate"], around: float | None = None) -> Interval:
    """The interval of a metric, over the replicates for which it is defined. With `around`, the replicates are shifted
    so that their mean equals it."""
    defined = replicated[~np.isnan(replicated)]
    if not len(defined):
        return Interval(None, None)
    if around is not None:
        defined = np.clip(defined + (around - defined.mean()), 0, 1)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(float(low), float(high))


def compute_sign_test(first_only: int, second_only: int) -> float:
    """Two-sided exact McNemar test: the probability that the questions that only one of two models got right split at
    least as unevenly if both models are equally good. 1 without such questions. Assumes independent questions."""
    total = first_only + second_only
    tail = term = 1  # ways to choose 0 of them
    for k in range(min(first_only, second_only)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)
