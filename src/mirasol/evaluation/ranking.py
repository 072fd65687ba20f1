"""Metrics of a score for every class: top-k, mean class accuracy, average precision, area under the curve, d-prime.

`scores` are [example, class], larger is more likely; `labels` [example, class] mark the right classes, one or more in
a row. Equal scores are treated alike: AP and AUC do not depend on the order of examples; among classes of equal score
the first counts as chosen.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, UInt16

from mirasol.evaluation.intervals import REPLICATES, Interval, compute_interval, draw_replicates, number_videos


def is_right_in_top(
    scores: Float[np.ndarray, "example category"], labels: Bool[np.ndarray, "example category"], k: int
) -> Bool[np.ndarray, " example"]:
    """Whether one of the k best classes is right. A row without any finite score chooses nothing."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    answered = np.isfinite(scores).any(axis=1)
    return np.take_along_axis(labels, best, axis=1).any(axis=1) & answered


def average_precision(scores: Float[np.ndarray, " example"], right: Bool[np.ndarray, " example"]) -> float:
    """Sum over the thresholds of precision times the recall gained; NaN without a right example."""
    return float(_measure_once(scores, right)[0][0])


def area_under_curve(scores: Float[np.ndarray, " example"], right: Bool[np.ndarray, " example"]) -> float:
    """Share of pairs of a right and a wrong example in which the right one scores higher, ties counting half; NaN
    without such a pair."""
    return float(_measure_once(scores, right)[1][0])


def _measure_once(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.ones((len(right), 1), dtype=np.uint16)
    return Thresholds(scores, right).compute_weighted(weights, np.array([float(len(right))]))


class Thresholds:
    """The examples of one class in descending order of score, cut at the distinct scores of right examples, between
    which nothing changes. Sorted once for any weights."""

    def __init__(self, scores: Float[np.ndarray, " example"], right: Bool[np.ndarray, " example"]):
        order = np.argsort(-scores, kind="stable")
        falling, is_right = scores[order], right[order]
        hits = falling[is_right]
        levels = hits[np.append(True, hits[1:] != hits[:-1])] if len(hits) else hits
        first = np.searchsorted(-falling, -levels, side="left")  # of the examples that score a level
        end = np.searchsorted(-falling, -levels, side="right")
        self.order = order[: end[-1] if len(end) else 0].astype(np.int32)
        self.starts = np.append(0, end[:-1])[: len(end)]
        self.right = order[is_right]
        self.right_starts = np.searchsorted(-hits, -levels, side="left")
        tied = [np.arange(low, high) for low, high in zip(first, end, strict=True)]
        self.tied = order[np.concatenate(tied)] if tied else order[:0]
        self.tied_starts = np.cumsum(end - first) - (end - first)

    def compute_weighted(
        self, weights: UInt16[np.ndarray, "example replicate"], totals: Float[np.ndarray, " replicate"]
    ) -> tuple[Float[np.ndarray, " replicate"], Float[np.ndarray, " replicate"]]:
        """Average precision and area under the curve with each example counted as often as its weight says.

        totals: the sums of the weights over all examples
        """
        if not len(self.right):
            nothing = np.full(weights.shape[1], np.nan)
            return nothing, nothing
        integer = np.uint16 if totals.max() < 2**16 else np.uint32  # the smaller, the faster
        between = np.split(self.order, self.starts[1:])
        taken = np.array([weights[rows].sum(axis=0, dtype=integer) for rows in between], dtype=float).cumsum(axis=0)
        gained = _sum_runs(weights, self.right, self.right_starts)
        equal = _sum_runs(weights, self.tied, self.tied_starts)
        hits = gained.cumsum(axis=0)
        positive = hits[-1]
        below = totals - positive - (taken - hits) + (equal - gained) / 2  # the wrong examples, tied ones by half
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(gained > 0, hits / taken, 0.0)
            area = (gained * below).sum(axis=0) / (positive * (totals - positive))
            return (precision * gained).sum(axis=0) / positive, area


def _sum_runs(weights: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of the weights of runs of `rows`, [run, replicate]; no run is empty."""
    return np.add.reduceat(weights[rows], starts, axis=0, dtype=np.uint32).astype(float)


def compute_ranking_intervals(
    scores: Float[np.ndarray, "example category"],
    labels: Bool[np.ndarray, "example category"],
    videos: Sequence[str],
    seed: int = 0,
    replicates: int = REPLICATES // 2,
) -> tuple[Interval, Interval]:
    """The 95 % intervals of mAP and mean AUC, over the classes that are defined in a replicate; videos are drawn.

    A right example that is drawn twice ranks next to itself, which raises average precision: replicates lie above the
    metric on average, so their spread is centred on the metric's value. Uses half the replicates of a mean's interval,
    because each costs a pass over all scores.
    """
    count, video = number_videos(videos)
    classes = [Thresholds(scores[:, place], labels[:, place]) for place in np.flatnonzero(labels.any(axis=0))]
    if not classes:
        return Interval(None, None), Interval(None, None)

    def means(weights: np.ndarray) -> list[np.ndarray]:
        totals = weights.sum(axis=0, dtype=float)
        by_class = np.array([one.compute_weighted(weights, totals) for one in classes])
        return [np.nanmean(one[:, ~np.isnan(one).all(axis=0)], axis=0) for one in by_class.transpose(1, 0, 2)]

    values = means(np.ones((len(video), 1), dtype=np.uint16))
    replicated = zip(*(means(times[video]) for times in draw_replicates(count, seed, replicates)), strict=True)
    precision, area = (
        compute_interval(np.concatenate(parts), around=float(value[0]) if len(value) else None)
        for parts, value in zip(replicated, values, strict=True)
    )
    return precision, area


def average_over_classes(metric, scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `average_precision` or `area_under_curve` over the classes for which it is defined; NaN without any."""
    values = [metric(scores[:, place], labels[:, place]) for place in range(scores.shape[1])]
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def d_prime(area: float) -> float:
    """Distance between right and wrong in standard deviations for an area under the curve: sqrt(2) * probit(area).

    Infinite for 1 and 0, NaN for NaN."""
    if math.isnan(area):
        return math.nan
    if area in (0.0, 1.0):
        return math.copysign(math.inf, area - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(area)
