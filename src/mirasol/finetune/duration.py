"""How long a fine-tuning will take, and how many steps a time allows."""

from dataclasses import dataclass

from mirasol.config.recipe import Recipe
from mirasol.console import count_cores
from mirasol.finetune.choices import STAGE, STEPS_OF_VALIDATION, VALIDATIONS, ClipFacts
from mirasol.finetune.outcome import list_controls

FORWARD_SHARE = 1 / 3  # of a training step's time


@dataclass(frozen=True)
class Pace:
    """Seconds that were measured.

    step: of a training step; 0 where none could be measured
    encoding: of one clip in the frozen encoders, once, where their features are kept; 0 where each step computes them
    """

    step: float
    encoding: float = 0.0


def count_steps_within(budget: float, recipe: Recipe, facts: ClipFacts, pace: Pace) -> int:
    """Steps that a budget of seconds allows, with their validations and what encodes a clip the first time."""
    clips = recipe.stages[STAGE].clips_per_step
    first = budget / max(pace.step + pace.encoding * clips, 1e-3)  # while all clips are new
    if pace.encoding and first < facts.train / clips:
        return max(1, int(first))
    budget -= pace.encoding * (facts.train + _count_validated(recipe, facts))
    validation = _estimate_validation(recipe, facts, pace)
    few = int(budget / max(pace.step + validation / STEPS_OF_VALIDATION, 1e-3))
    many = int((budget - VALIDATIONS * validation) / max(pace.step, 1e-3))
    return max(1, many if few > VALIDATIONS * STEPS_OF_VALIDATION else few)


def describe_time(recipe: Recipe, facts: ClipFacts, tested: int, pace: Pace, decoding: float) -> str:
    """How long everything will take where a clip is decoded in `decoding` seconds."""
    stage = recipe.stages[STAGE]
    steps = stage.steps or -(-stage.epochs * facts.count_positions(stage.questions_per_clip) // stage.clips_per_step)
    training = steps * pace.step + steps // recipe.validate_every * _estimate_validation(recipe, facts, pace)
    encoding = pace.encoding * (min(facts.train, steps * stage.clips_per_step) + _count_validated(recipe, facts))
    decode = decoding * (facts.train + facts.validation) / count_cores()
    passes = 2 * (2 + len(list_controls()))  # generation and candidates, of both checkpoints and under the controls
    answers = passes * tested * (FORWARD_SHARE * pace.step / stage.clips_per_step + pace.encoding)
    when = "to decode" if recipe.data.decode == "before" else "to decode meanwhile"
    encode = f", {_format_minutes(encoding)} in the frozen encoders, once" if pace.encoding else ""
    return (
        f"time:     {_format_minutes(decode)} {when}{encode}, {_format_minutes(training)} for {steps:,} steps of "
        f"{pace.step:.2g} s (fewer if validation stops improving), about {_format_minutes(answers)} to evaluate"
    )


def _count_validated(recipe: Recipe, facts: ClipFacts) -> int:
    return min(recipe.validation_clips, facts.validation)


def _estimate_validation(recipe: Recipe, facts: ClipFacts, pace: Pace) -> float:
    """Seconds of a validation."""
    return FORWARD_SHARE * pace.step * _count_validated(recipe, facts) / recipe.stages[STAGE].clips_per_step


def _format_minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
