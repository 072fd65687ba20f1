"""Which step of a run was the best by a number of its validation."""

from collections.abc import Mapping
from typing import Any

from mirasol.errors import UserError


class BestStep:
    """The step with the best value of `metric` so far; of equal ones the first.

    metric: dotted path of a number in the validation lines of `metrics.jsonl`, e.g. `clip.accuracy`,
        `segment.text_loss` or `clip.by_type.hearing.accuracy`; the lowest is best of a loss, the highest of all else
    lines: what the run has logged already
    """

    def __init__(self, metric: str, lines: list[dict[str, Any]]):
        self.metric, self.step, self.value = metric, 0, 0.0
        for line in lines:
            if line["kind"] == "validation":
                self.add(line["step"], line)

    def add(self, step: int, validation: Mapping[str, Any]) -> bool:
        """Takes note of a validation; whether it is the best so far. Raises UserError where it lacks the metric."""
        value = _number(validation, self.metric)
        is_best = not self.step or (value < self.value if self.metric.endswith("loss") else value > self.value)
        if is_best:
            self.step, self.value = step, value
        return is_best


def _number(validation: Mapping[str, Any], metric: str) -> float:
    value: Any = validation
    for name in metric.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        raise UserError(f"keep_best={metric} is no number of the validation, which has {', '.join(_names(validation))}")
    return value


def _names(validation: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All numbers of a validation, as `keep_best` names them."""
    names = []
    for name, value in validation.items():
        if isinstance(value, Mapping):
            names += _names(value, f"{prefix}{name}.")
        elif prefix and isinstance(value, int | float):
            names.append(prefix + name)
    return names


def check_metric(metric: str, parts: Mapping[str, Any]) -> None:
    """Raises UserError for a metric of a part that the validation does not have, before the run begins."""
    part, _, name = metric.partition(".")
    if part not in parts or not name:
        raise UserError(
            f"keep_best={metric} names no part of the validation: write {' or '.join(parts)} and one of its numbers, "
            f"e.g. {next(iter(parts), 'clip')}.accuracy"
        )
