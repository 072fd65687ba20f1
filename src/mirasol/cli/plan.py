"""`mirasol plan`: what a run will cost, before it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from mirasol.cli.common import check_positive_options
from mirasol.config.recipe_io import load_recipe
from mirasol.console import format_table
from mirasol.cost.assumptions import Assumptions
from mirasol.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.cli.common import MakeParser
    from mirasol.cost.plan import Plan, StagePlan
    from mirasol.cost.step import StepShape

HELP = "what a recipe will cost: memory, FLOPs, time, disk"
DESCRIPTION = """Prints what training by a recipe takes: parameters and how many train, memory on each device, FLOPs
of a step, time at a given share of the peak, disk. No weights are allocated, and the data need not exist. Keys of the
recipe are options, as with `mirasol train`.

  mirasol plan --config recipes/demo.yaml --chunks 12     clips of 6 s; without data or --chunks, the longest
  mirasol plan --config recipes/demo.yaml --processes 8 --mfu 0.35 --device-memory 80
  mirasol plan --config recipes/demo.yaml --stages.questions.clips_per_step 64 --json"""

# The options that are not keys of the recipe.
OWN = (
    "--config", "--processes", "--mfu", "--peak-tflops", "--device-memory", "--chunks", "--text-length",
    "--target-tokens", "--preset", "--json",
)  # fmt: skip
TO_FIT = (
    "a stage that does not fit takes less memory with more microbatches (accumulation), recompute: block, or "
    "parallel.kind: fsdp over more --processes"
)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--config", type=str, action="append", metavar="FILE", help="the recipe; may be given again")
    parser.add_argument("--processes", type=int, default=1, help="processes, one for each device")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of a device's peak FLOP/s that is reached")
    peak = "peak TFLOP/s of a device; by default of the one here, or of an H100 for a recipe that needs GPUs"
    parser.add_argument("--peak-tflops", type=float, help=peak)
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="show which stages fit into this many GiB")
    parser.add_argument("--chunks", type=int, help="chunks of a clip; by default the longest of some clips")
    parser.add_argument("--text-length", type=int, help="tokens of prompt and target; by default text.max_length")
    parser.add_argument("--target-tokens", type=int, help="how many of them are target; by default all but one")
    parser.add_argument("--preset", type=str, help="preset to count if the checkpoint in model.init does not exist yet")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(options: Namespace) -> None:
    """Counts and prints. Raises UserError for a recipe or options that cannot be planned."""
    if not options.config:
        raise UserError("plan needs a recipe: mirasol plan --config recipes/demo.yaml")
    given = read_assumptions(options)
    recipe = load_recipe(options.config, options.get("overrides") or [])
    given.check_against(recipe)

    from mirasol.cost.plan import plan_run

    plan = plan_run(recipe, given)
    room = None if options.device_memory is None else options.device_memory * 2**30
    fits = {} if room is None else {name: stage.memory.peak <= room for name, stage in plan.stages.items()}
    if not all(fits.values()):
        plan.notes.append(TO_FIT)
    values = plan.to_dict()
    for name, fit in fits.items():
        values["stages"][name]["fits"] = fit
    sys.stdout.write((json.dumps(values) if options.json else format_plan(plan, fits)) + "\n")


def read_assumptions(options: Namespace) -> Assumptions:
    """The assumptions among the options. Raises UserError for one out of range."""
    check_positive_options(options, "processes", "chunks", "text_length", "target_tokens")
    for name in ("peak_tflops", "device_memory"):
        if options[name] is not None and not options[name] > 0:
            raise UserError(f"--{name.replace('_', '-')} {options[name]}: must be above 0")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: must be above 0 and at most 1")
    return Assumptions(
        processes=options.processes,
        mfu=options.mfu,
        peak_tflops=options.peak_tflops,
        chunks=options.chunks,
        text_length=options.text_length,
        target_tokens=options.target_tokens,
        preset=options.preset,
    )


def format_plan(plan: Plan, fits: dict[str, bool]) -> str:
    """The plan as tables; `fits` says for some stages whether they fit into a device's memory."""
    one = "one device" if plan.processes == 1 else f"{plan.processes} devices, parallel.kind {plan.kind}"
    from mirasol.training.weights.initial import format_initial_weights

    initial = format_initial_weights(plan.initial)
    lines = [
        *([initial, ""] if initial else []),
        format_table(_make_component_rows(plan)),
        "",
        format_table(_make_stage_rows(plan.stages, fits)),
        "",
        f"time: {format_duration(plan.seconds)} of computing on {one}, at {plan.mfu:.0%} of "
        f"{plan.peak_tflops:.4g} TFLOP/s each ({plan.peak_is})",
        f"disk: {format_bytes(plan.checkpoint_bytes)} for a checkpoint, {format_bytes(plan.result_bytes)} for the "
        f"result, at most {format_bytes(plan.disk_bytes)} for all that are kept; {format_bytes(plan.clip_bytes)} for a "
        "decoded clip",
        *_describe_features(plan),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _describe_features(plan: Plan) -> list[str]:
    """A line about the feature cache of each stage that uses it."""
    lines = []
    for name, stage in plan.stages.items():
        if stage.features is not None:
            computed, size = stage.features.computed, format_bytes(stage.features.clip_bytes)
            total = "" if plan.feature_bytes is None else f", {format_bytes(plan.feature_bytes)} for all"
            lines.append(
                f"feature cache, {name}: {computed:,} clips computed, {stage.features.clip_flops / 1e12:.4g} TFLOP "
                f"each; {size} on disk for a clip{total}"
            )
    return lines


def _make_component_rows(plan: Plan) -> list[list[str]]:
    rows = [["component", "parameters", *(f"trains in {name}" for name in plan.stages)]]
    for component, row in plan.components.items():
        rows.append([component, f"{row['parameters']:,}", *(f"{row['trained'][name]:,}" for name in plan.stages)])
    return [*rows, ["total", f"{plan.parameters:,}", *(f"{stage.trained:,}" for stage in plan.stages.values())]]


def _make_stage_rows(stages: dict[str, StagePlan], fits: dict[str, bool]) -> list[list[str]]:
    def make_row(title: str, show: Callable[[StagePlan], str]) -> list[str]:
        return [title, *(show(stage) for stage in stages.values())]

    rows = [
        ["", *stages],
        make_row("steps", lambda stage: f"{stage.steps:,}"),
        make_row("microbatch of a device", lambda stage: _format_shape(stage.shape)),
        make_row("microbatches a step", lambda stage: str(stage.microbatches)),
        make_row("TFLOP a step, all devices", lambda stage: f"{stage.step_flops / 1e12:.4g}"),
        make_row("forward : backward", lambda stage: f"1 : {stage.cost.backward_flops / stage.cost.forward_flops:.2f}"),
        make_row("TFLOP recomputed", lambda stage: f"{stage.recomputed_flops / 1e12:.4g}"),
        make_row("weights on a device", lambda stage: format_bytes(stage.memory.weights)),
        make_row("gradients", lambda stage: format_bytes(stage.memory.gradients)),
        make_row("optimizer", lambda stage: format_bytes(stage.memory.optimizer)),
        make_row("gathered layers", lambda stage: format_bytes(stage.memory.gathered)),
        make_row("saved activations", lambda stage: format_bytes(stage.memory.activations)),
        make_row("peak on a device", lambda stage: format_bytes(stage.memory.peak)),
        make_row("seconds a step", lambda stage: f"{stage.step_seconds:.3g}"),
        make_row("epochs", _format_epochs),
        make_row("time of an epoch", lambda stage: format_duration(stage.epoch_seconds)),
        *([make_row("later epochs", _format_later_epochs)] if any(stage.features for stage in stages.values()) else []),
        make_row("time of the stage", lambda stage: format_duration(stage.seconds)),
    ]
    return [*rows, ["fits", *("yes" if fit else "NO" for fit in fits.values())]] if fits else rows


def _format_shape(shape: StepShape) -> str:
    rows = f"{shape.questions} x {shape.text_length} tokens"
    if shape.objective == "image_text":
        return f"{shape.clips} images, {rows}"
    return f"{shape.clips} clips x {shape.chunks} chunks, {rows}"


def _format_epochs(stage: StagePlan) -> str:
    if stage.epochs is None:
        return "?"
    return f"{stage.epochs:.2f}" + ("" if stage.clips is None else f" of {stage.clips:,} clips")


def _format_later_epochs(stage: StagePlan) -> str:
    return format_duration(stage.epoch_seconds if stage.features is None else stage.features.later_epoch_seconds)


def format_bytes(count: float) -> str:
    """Bytes in the largest unit that gives at least 1."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} {UNITS[-1]}"


def format_duration(seconds: float | None) -> str:
    """Seconds in a readable unit; `?` for None."""
    if seconds is None:
        return "?"
    for limit, unit, word in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {word}"
    return f"{seconds / 86_400:.3g} days"
