"""Metrics of a score for every class: top-k, mean class accuracy, average precision, area under the curve, d-prime.

`scores` are [example, class], larger is likelier; `labels` [example, class] say which classes are right, one or more a
row. Equal scores are treated alike: AP and AUC do not depend on the order of examples; among equal classes the first
counts as chosen.
"""

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float


def in_top(
    scores: Float[np.ndarray, "example category"], labels: Bool[np.ndarray, "example category"], k: int
) -> Bool[np.ndarray, "example"]:
    """Whether one of the k best classes is right. A row without any finite score has chosen nothing."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    answered = np.isfinite(scores).any(axis=1)
    return np.take_along_axis(labels, best, axis=1).any(axis=1) & answered


def average_precision(scores: Float[np.ndarray, "example"], right: Bool[np.ndarray, "example"]) -> float:
    """Sum over the thresholds of precision times the recall gained there; NaN without a right example."""
    if not right.any():
        return math.nan
    hits, taken = _at_thresholds(scores, right)
    gained = np.diff(hits, prepend=0) / hits[-1]
    return float((hits / taken * gained).sum())


def area_under_curve(scores: Float[np.ndarray, "example"], right: Bool[np.ndarray, "example"]) -> float:
    """Share of pairs of a right and a wrong example in which the right one scores higher, equal ones by half; NaN where
    there is no such pair."""
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return math.nan
    hits, taken = _at_thresholds(scores, right)
    gained, false = np.diff(hits, prepend=0), taken - hits
    below = negative - false + np.diff(false, prepend=0) / 2
    return float((gained * below).sum() / (positive * negative))


def _at_thresholds(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of right examples and of all examples at or above every distinct score, falling."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(falling) - 1)
    return np.cumsum(right[order])[last].astype(float), last + 1.0


def mean_over_classes(metric, scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `average_precision` or `area_under_curve` over the classes for which it is defined; NaN without any."""
    values = [metric(scores[:, place], labels[:, place]) for place in range(scores.shape[1])]
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def d_prime(area: float) -> float:
    """How far apart right and wrong lie, in deviations, when the area under the curve is `area`: sqrt(2) * probit.

    Infinite for 1 and 0, NaN for NaN."""
    if math.isnan(area):
        return math.nan
    if area in (0.0, 1.0):
        return math.copysign(math.inf, area - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(area)
