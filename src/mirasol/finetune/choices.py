"""The recipe of a fine-tuning, by rules from what the clips and the machine are. docs/finetuning.md lists the rules."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mirasol.config.checks import merge_mappings
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import flatten
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError

STAGE = "finetune"
# Keys that the command's own arguments decide.
DECIDED = {
    "output": "--output", "data.root": "FOLDER", "data.dataset": "FOLDER", "data.options": "FOLDER",
    "data.mixture": "FOLDER", "data.train_split": "FOLDER", "data.validation_split": "FOLDER",
    "model.init": "--from", "model.preset": "--from", "tokenizer": "--from",
}  # fmt: skip
STEPS_WANTED, FEWEST_EPOCHS, MOST_EPOCHS = 600, 5, 60
LARGEST_BATCH, SMALLEST_BATCH = 16, 2
MOST_QUESTIONS = 12
LEARNING_RATE, REFERENCE_WIDTH, REFERENCE_BATCH = 1e-3, 96, 16
WARMUP_SHARE, MOST_WARMUP = 0.1, 100
VALIDATIONS, STEPS_OF_VALIDATION, PATIENCE, MOST_VALIDATED = 20, 5, 5, 128
ENOUGH_FOR_ACCURACY = 50
DECODED_BEFORE = 2000  # clips: of more, decoding all of them first would let the user wait
LARGE_MODEL, FEW_CLIPS = 100_000_000, 1000
ENCODERS = ("vit", "tubes", "audio")
LONGEST_TEXT_FACTOR = 4
CHUNK_SECONDS_WANTED, FEWEST_CHUNKS, SHORTEST_CHUNK = 0.5, 4, 0.1


@dataclass(frozen=True)
class ClipFacts:
    """What the rules ask of the clips.

    positions: by number of questions in a batch, how often an epoch shows a clip (`EpochOrder.size`)
    seconds: lengths of clips, ascending; empty where none is known
    longest_text: tokens of the longest row of text, special ones included
    kinds: "clip", "segment" or both
    """

    train: int
    validation: int
    questions: tuple[int, ...]
    seconds: tuple[float, ...]
    longest_text: int
    kinds: tuple[str, ...]
    has_classes: bool

    def count_positions(self, at_once: int) -> int:
        """How often an epoch shows a clip, with `at_once` questions each time."""
        return sum(-(-count // at_once) for count in self.questions)


@dataclass(frozen=True)
class Wishes:
    """What the user asked for: one of epochs and steps at most, and keys of the recipe."""

    epochs: int | None = None
    steps: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A key of the recipe, its value, and why."""

    key: str
    value: Any
    why: str


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises UserError for keys and values that no recipe has, and for keys that the command's own arguments decide."""
    given = flatten(overrides)
    for key in given:
        owner = next((name for name in DECIDED if key == name or key.startswith(f"{name}.")), None)
        if owner is not None:
            raise UserError(f"{key}={given[key]}: give {DECIDED[owner]} instead")
    stages = overrides.get("stages", {})
    for name in stages if isinstance(stages, Mapping) else ():
        if name != STAGE:
            raise UserError(
                f"stages.{name}: a fine-tuning has one stage, {STAGE}: set stages.{STAGE}, or use mirasol train"
            )
    length = {} if f"stages.{STAGE}.steps" in given else {"epochs": 1}
    base = {
        "seed": 0,
        "output": "output",
        "data": {"root": "data"},
        "stages": {STAGE: length},
        "model": {"init": "tiny"},
    }
    if "patience" in given and "keep_best" not in given:
        base["keep_best"] = "clip.accuracy"
    recipe_from_dict(merge_mappings(base, overrides), "KEY=VALUE")


class Choices:
    """Collects choices; a key that the user sets has the user's value, also for the rules after it."""

    def __init__(self, overrides: Mapping[str, Any]):
        self.given = flatten(overrides)
        self.made: list[Choice] = []

    def choose(self, key: str, value: Any, why: str) -> Any:
        """Chooses a value unless the user did; returns what holds."""
        if key in self.given:
            value, why = self.given[key], "as given"
        self.made.append(Choice(key, value, why))
        return value


def choose_recipe(
    clips: ClipFacts, config: MirasolConfig, parameters: Mapping[str, int], cores: int, is_gpu: bool, wishes: Wishes
) -> list[Choice]:
    """The keys of the recipe that depend on clips, model and machine; `make_values` adds the paths.

    parameters: of each component of the model. A pure function: the same facts give the same recipe.
    """
    choices = Choices(wishes.overrides)
    _choose_chunks(choices, clips, config)
    per_clip = _choose_batch(choices, clips)
    steps = _choose_length(choices, clips, wishes, *per_clip)
    _choose_training(choices, clips, config, parameters, steps, per_clip[0])
    _choose_validation(choices, clips, steps)
    _choose_reading(choices, clips, config, cores, is_gpu)
    return choices.made


def _choose_chunks(choices: Choices, clips: ClipFacts, config: MirasolConfig) -> None:
    """Chunks of another length or number than the checkpoint's, only where the clips hardly fit it."""
    grid = config.chunking
    if not clips.seconds:
        return
    median, typical = find_quantile(clips.seconds, 0.5), find_quantile(clips.seconds, 0.95)
    all_but_few = f"95 % of the clips last {typical:.3g} s or less"
    if grid.num_chunks is not None:
        wanted = round(typical / CHUNK_SECONDS_WANTED)
        number = max(min(FEWEST_CHUNKS, grid.num_chunks), min(grid.num_chunks, wanted))
        if number != grid.num_chunks:
            why = f"{all_but_few}: chunks of about {CHUNK_SECONDS_WANTED} s"
            choices.choose("model.num_chunks", number, why)
        return
    key, most = "model.overrides.chunking.chunk_seconds", grid.max_chunks * grid.chunk_seconds
    if median > most:
        length = math.ceil(10 * median / grid.max_chunks) / 10
        choices.choose(key, length, f"half of the clips last more than {grid.max_chunks} chunks of the checkpoint's")
    elif typical < grid.chunk_seconds:
        length = max(SHORTEST_CHUNK, math.ceil(100 * typical) / 100)
        choices.choose(key, length, f"{all_but_few}, a chunk of the checkpoint's {grid.chunk_seconds:g} s")


def _choose_batch(choices: Choices, clips: ClipFacts) -> tuple[int, int]:
    """Clips of a step and questions of a clip."""
    most = 2 ** int(math.log2(max(1, clips.train // 4)))
    size = choices.choose(
        f"stages.{STAGE}.clips_per_step",
        max(SMALLEST_BATCH, min(LARGEST_BATCH, most)),
        f"a quarter of the {clips.train:,} training clips, {SMALLEST_BATCH} to {LARGEST_BATCH}",
    )
    median = sorted(clips.questions)[len(clips.questions) // 2]
    questions = choices.choose(
        f"stages.{STAGE}.questions_per_clip", min(MOST_QUESTIONS, median), "the median of the clips' questions"
    )
    return size, questions


def _choose_length(choices: Choices, clips: ClipFacts, wishes: Wishes, size: int, questions: int) -> int:
    """Chooses steps or epochs; returns the number of steps."""
    name = f"stages.{STAGE}"
    if wishes.steps is not None or choices.given.get(f"{name}.steps") is not None:
        return choices.choose(f"{name}.steps", wishes.steps, "what the time allows (--minutes)")
    positions = clips.count_positions(questions)
    wanted = math.ceil(STEPS_WANTED * size / positions)
    epochs = max(FEWEST_EPOCHS, min(MOST_EPOCHS, wanted))
    why = f"about {STEPS_WANTED} steps, {FEWEST_EPOCHS} to {MOST_EPOCHS} epochs; fewer if validation stops improving"
    if wishes.epochs is not None:
        epochs, why = wishes.epochs, "as given (--epochs)"
    epochs = choices.choose(f"{name}.epochs", epochs, why)
    return -(-epochs * positions // size)


def _choose_training(
    choices: Choices, clips: ClipFacts, config: MirasolConfig, parameters: Mapping[str, int], steps: int, size: int
) -> None:
    kinds = set(clips.kinds)
    choices.choose(f"stages.{STAGE}.span", "any" if len(kinds) > 1 else next(iter(kinds)), "what the labels are about")
    choices.choose(f"stages.{STAGE}.loss_weights.text", 10.0, "the paper's for fine-tuning")
    total = sum(parameters.values())
    if total > LARGE_MODEL and clips.train < FEW_CLIPS:
        trained = [name for name, count in parameters.items() if count and name not in ENCODERS]
        why = f"{total / 1e6:.0f}M parameters and {clips.train} clips: {', '.join(ENCODERS)} stay as they are"
        choices.choose(f"stages.{STAGE}.trains", trained, why)
    width = config.text.stack.width
    rate = LEARNING_RATE * math.sqrt(REFERENCE_WIDTH / width) * math.sqrt(size / REFERENCE_BATCH)
    why = f"{LEARNING_RATE:g} x sqrt({REFERENCE_WIDTH} / width {width}) x sqrt({size} / {REFERENCE_BATCH} clips)"
    choices.choose("optimizer.name", "muon", "needs fewer steps than AdamW (docs/lab-notebook.md)")
    choices.choose("optimizer.learning_rate", float(f"{rate:.2g}"), why)
    warmup = min(MOST_WARMUP, max(1, round(WARMUP_SHARE * steps)))
    choices.choose("optimizer.warmup_steps", warmup, f"a tenth of the steps, at most {MOST_WARMUP}")


def _choose_validation(choices: Choices, clips: ClipFacts, steps: int) -> None:
    times = count_validations(steps)
    every = choices.choose("validate_every", max(1, round(steps / times)), f"{times} times")
    choices.choose("checkpoint_every", every, "with each validation")
    choices.choose("log_every", max(1, round(every / STEPS_OF_VALIDATION)), "some times between two validations")
    count = min(MOST_VALIDATED, clips.validation)
    choices.choose("validation_clips", max(1, count), f"all that there are, at most {MOST_VALIDATED}")
    part = next(choice.value for choice in choices.made if choice.key == f"stages.{STAGE}.span")
    metric, why = "text_loss", "answers are texts: hardly one is exactly right"
    if clips.has_classes:
        is_fine = clips.validation >= ENOUGH_FOR_ACCURACY
        metric = "accuracy" if is_fine else "text_loss"
        why = "answers are classes" + (
            "" if is_fine else f"; of fewer than {ENOUGH_FOR_ACCURACY} clips a share is coarse"
        )
    choices.choose("keep_best", f"{part}.{metric}", why)
    choices.choose("patience", PATIENCE, f"ends after {PATIENCE} validations in a row that were no better")


def _choose_reading(choices: Choices, clips: ClipFacts, config: MirasolConfig, cores: int, is_gpu: bool) -> None:
    choices.choose("data.on_bad_clip", "skip", "clips that cannot be decoded are listed and left out")
    if clips.train > DECODED_BEFORE:
        choices.choose("data.decode", "ahead", f"more than {DECODED_BEFORE:,} clips: they are decoded as they come up")
        choices.choose("workers", max(1, cores - 1), f"{cores} cores")
    limit = config.text.max_length
    if clips.longest_text > limit:
        longest = min(clips.longest_text, limit if config.text.learned_positions else LONGEST_TEXT_FACTOR * limit)
        why = f"the longest text has {clips.longest_text} tokens, the checkpoint was trained with {limit}"
        if longest > limit:
            choices.choose("data.max_text_length", longest, why)
        if clips.longest_text > longest:
            choices.choose("data.on_long_text", "truncate", why)
    if is_gpu:
        choices.choose("precision", "bf16", "on a GPU")


def count_validations(steps: int) -> int:
    """How often a run of so many steps is validated."""
    return max(1, min(VALIDATIONS, steps // STEPS_OF_VALIDATION))


def find_quantile(values: tuple[float, ...], share: float) -> float:
    """The value that this share of the ascending values does not exceed."""
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1 if share * len(values) > 1 else 0)]


def make_values(choices: list[Choice], paths: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as plain data: the choices, the paths of data, checkpoint and output, and the user's keys."""
    values: dict[str, Any] = {"seed": 0, "stages": {STAGE: {}}}
    values = merge_mappings(values, paths)
    for choice in choices:
        nested: Any = choice.value
        for part in reversed(choice.key.split(".")):
            nested = {part: nested}
        values = merge_mappings(values, nested)
    return merge_mappings(values, overrides)


def format_choices(choices: list[Choice]) -> list[str]:
    """A line for each choice."""
    width = max(len(choice.key) for choice in choices)
    return [f"{choice.key.ljust(width)}  {_format_value(choice.value)}  ({choice.why})" for choice in choices]


def _format_value(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
