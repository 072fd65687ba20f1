"""How far the probability of an answer tells whether it is right, and below which one an answer is "not sure"."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirasol.checkpoint import CALIBRATION, read_weights_hash
from mirasol.errors import UserError
from mirasol.files import write_file_atomically

# Finer where answers are: a trained model gives most of them a probability near 1.
EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
# Controls that take away what some questions are about, and nothing else. With shifted audio a clip shows something
# else, and the answer to the unchanged clip may rightly be another one.
REMOVING_CONTROLS = ("no_video", "no_audio", "no_media")
RULE = (
    "fewest misjudged answers, right ones below it and wrong ones at or above it, on the clips as they are and without "
    "video, without audio and without both; among equals the lowest"
)


@dataclass(frozen=True)
class JudgedProbability:
    """The probability of one answer (`mirasol.evaluation.answer.Answer`), and whether it is right."""

    probability: float
    right: bool


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers whose probability is in [low, high), in the last bin high included.

    probability, accuracy: means over its answers; None without any
    """

    low: float
    high: float
    answers: int
    probability: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Threshold:
    """A probability, and what it does to one set of answers: how many are at or above and below it, and how many of
    either are right (None without any)."""

    value: float
    answers_above: int
    accuracy_above: float | None
    answers_below: int
    accuracy_below: float | None


def bin_probabilities(judged: Sequence[JudgedProbability]) -> list[ReliabilityBin]:
    """The reliability table: all `EDGES`, empty bins included."""
    probability, right = _split(judged)
    place = np.clip(np.searchsorted(EDGES, probability, side="right") - 1, 0, len(EDGES) - 2)
    bins = []
    for number, (low, high) in enumerate(itertools.pairwise(EDGES)):
        own = place == number
        bins.append(ReliabilityBin(low, high, int(own.sum()), _mean(probability[own]), _mean(right[own])))
    return bins


def compute_calibration_error(bins: Sequence[ReliabilityBin]) -> float | None:
    """The expected calibration error: the mean distance of accuracy and probability of a bin, weighted by answers."""
    filled = [one for one in bins if one.answers]
    total = sum(one.answers for one in filled)
    return sum(one.answers * abs(one.accuracy - one.probability) for one in filled) / total if total else None


def choose_threshold(judged: Sequence[JudgedProbability]) -> float | None:
    """The probability of `RULE`; 0 where every answer is better believed, None without answers."""
    if not judged:
        return None
    probability, right = _split(judged)
    order = np.argsort(probability, kind="stable")
    probability, right = probability[order], right[order]
    # misjudged[n]: with the n least probable answers doubted. Answers of equal probability go together.
    misjudged = np.append(0, np.cumsum(np.where(right, 1, -1))) + (~right).sum()
    allowed = np.flatnonzero(np.append(True, probability[1:] != probability[:-1]))
    doubted = int(allowed[np.argmin(misjudged[allowed])])
    return float(probability[doubted]) if doubted else 0.0


def apply_threshold(judged: Sequence[JudgedProbability], value: float) -> Threshold:
    """What the threshold does to these answers."""
    probability, right = _split(judged)
    above = probability >= value
    return Threshold(value, int(above.sum()), _mean(right[above]), int((~above).sum()), _mean(right[~above]))


def measure_calibration(
    judged: Sequence[JudgedProbability], removed: Mapping[str, Sequence[JudgedProbability]]
) -> dict[str, Any]:
    """The part of results.json on calibration.

    judged: the answers to the clips as they are; removed: those under each of `REMOVING_CONTROLS` that was asked. Only
    with all of them is there a threshold: on the clips as they are a good model has next to no wrong answers.
    """
    bins, without = bin_probabilities(judged), [one for own in removed.values() for one in own]
    record: dict[str, Any] = {
        "answers": len(judged),
        "calibration_error": compute_calibration_error(bins),
        "bins": [asdict(one) for one in bins],
    }
    if set(removed) == set(REMOVING_CONTROLS) and judged:
        value = choose_threshold([*judged, *without])
        record["bins_removed"] = [asdict(one) for one in bin_probabilities(without)]
        record["threshold"] = {
            "value": value,
            "rule": RULE,
            "unchanged": asdict(apply_threshold(judged, value)),
            "removed": asdict(apply_threshold(without, value)),
        }
    return record


def summarise_surprise(values: Sequence[float]) -> dict[str, Any]:
    """The part of results.json on `mirasol.evaluation.answer.measure_surprise` of the clips; empty without any."""
    if not values:
        return {}
    return {"surprise": {"clips": len(values), "mean": float(np.mean(values)), "highest": max(values)}}


def write_calibration(checkpoint: Path, record: Mapping[str, Any]) -> Path:
    """Stores the threshold of an evaluation (`Evaluation.record`) with the checkpoint, and what it was measured on.

    Raises:
        UserError: the evaluation has no threshold, because it left out controls.
    """
    calibration = record["calibration"]
    if "threshold" not in calibration:
        raise UserError(f"no threshold to store: it needs the answers under {', '.join(REMOVING_CONTROLS)}")
    content = {
        "threshold": calibration["threshold"]["value"],
        "highest_surprise": calibration.get("surprise", {}).get("highest"),
        "weights_sha256": read_weights_hash(checkpoint),
        "measured_on": {"source": record["source"], "split": record["split"], **record["data"]},
        "checkpoint_sha256": record["checkpoint"]["sha256"],
        "settings": record["settings"],
        "versions": record["versions"],
        "calibration": calibration,
    }
    file = checkpoint / CALIBRATION
    write_file_atomically(file, json.dumps(content, indent=1) + "\n")
    return file


def format_calibration(calibration: Mapping[str, Any]) -> str:
    """The reliability table and the threshold as text."""
    from mirasol.console import format_table

    removed = calibration.get("bins_removed")
    header = ["probability", "answers", "mean", "right"]
    rows = [header + (["parts removed: answers", "right"] if removed else [])]
    for place, one in enumerate(calibration["bins"]):
        row = [f"{one['low']:g} to {one['high']:g}", str(one["answers"]), *_format(one)]
        rows.append(row + ([str(removed[place]["answers"]), _format(removed[place])[1]] if removed else []))
    lines = [format_table(rows)]
    if calibration["calibration_error"] is not None:
        lines.append(f"calibration error {calibration['calibration_error']:.3f}")
    if "threshold" in calibration:
        found = calibration["threshold"]
        lines.append(f"not sure below {found['value']:.4g}")
        for name, own in (("clips as they are", found["unchanged"]), ("parts removed", found["removed"])):
            sure, unsure = (
                "none"
                if own[f"accuracy_{side}"] is None
                else f"{own[f'answers_{side}']}, {own[f'accuracy_{side}']:.3f}"
                for side in ("above", "below")
            )
            lines.append(f"  {name}: sure {sure} right; not sure {unsure} right")
    if "surprise" in calibration:
        found = calibration["surprise"]
        lines.append(f"surprise of {found['clips']} clips: mean {found['mean']:.3g}, highest {found['highest']:.3g}")
    return "\n".join(lines)


def _format(one: Mapping[str, Any]) -> tuple[str, str]:
    return tuple("" if one[name] is None else f"{one[name]:.3f}" for name in ("probability", "accuracy"))


def _split(judged: Sequence[JudgedProbability]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and verdicts as arrays."""
    return np.array([one.probability for one in judged]), np.array([one.right for one in judged], dtype=bool)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
