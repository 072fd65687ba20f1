"""`mirasol plan`: what a run costs, before it begins."""

import json
import sys
from typing import Any

from mirasol.errors import UserError

HELP = "what a recipe costs before it runs: memory, FLOPs, time, disk"
DESCRIPTION = """Prints what training by a recipe takes: parameters and how many train, memory on each device, FLOPs
of a step, time at a given share of the peak, disk. Nothing is allocated, and the data need not be there. Keys of the
recipe are options, as with `mirasol train`.

  mirasol plan --config recipes/demo.yaml
  mirasol plan --config recipes/demo.yaml --processes 8 --mfu 0.35 --device-memory 80
  mirasol plan --config recipes/demo.yaml --stages.questions.clips_per_step 64 --json"""

OWN = (
    "--config", "--processes", "--mfu", "--peak-tflops", "--device-memory", "--chunks", "--text-length",
    "--target-tokens", "--preset", "--json",
)  # fmt: skip
TO_FIT = (
    "what does not fit takes less memory with more microbatches (accumulation), recompute: block, or parallel.kind: "
    "fsdp over more --processes"
)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument("--config", type=str, action="append", metavar="FILE", help="the recipe; may be given again")
    parser.add_argument("--processes", type=int, default=1, help="processes, one for each device")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of a device's peak FLOP/s that is reached")
    peak = "peak TFLOP/s of a device; by default of the one here, or of an H100 for a recipe that needs GPUs"
    parser.add_argument("--peak-tflops", type=float, help=peak)
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="say which stages fit into so many GiB")
    parser.add_argument("--chunks", type=int, help="chunks of a clip; by default the longest of some clips")
    parser.add_argument("--text-length", type=int, help="tokens of prompt and target; text.max_length by default")
    parser.add_argument("--target-tokens", type=int, help="those of them that are target; by default all but one")
    parser.add_argument("--preset", type=str, help="preset to count where model.init names no checkpoint yet")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(options: Any) -> None:
    """Counts and prints. Raises UserError for what cannot be planned."""
    from mirasol.cli.common import check_positive
    from mirasol.config.recipe_io import load_recipe
    from mirasol.cost.plan import Assumptions, plan_run

    if not options.config:
        raise UserError("plan needs a recipe: mirasol plan --config recipes/demo.yaml")
    for name in ("processes", "chunks", "text_length", "target_tokens"):
        if options[name] is not None:
            check_positive(f"--{name.replace('_', '-')}", options[name])
    for name in ("peak_tflops", "device_memory"):
        if options[name] is not None and not options[name] > 0:
            raise UserError(f"--{name.replace('_', '-')} {options[name]}: must be above 0")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: must be above 0 and at most 1")
    recipe = load_recipe(options.config, options.get("overrides") or [])
    plan = plan_run(
        recipe,
        Assumptions(
            options.processes, options.mfu, options.peak_tflops, options.chunks, options.text_length,
            options.target_tokens, options.preset,
        ),
    )  # fmt: skip
    values = plan.to_dict()
    if options.device_memory is not None:
        room = options.device_memory * 2**30
        for stage in values["stages"].values():
            stage["fits"] = stage["memory"]["peak"] <= room
        if not all(stage["fits"] for stage in values["stages"].values()):
            values["notes"].append(TO_FIT)
    sys.stdout.write((json.dumps(values) if options.json else text(values)) + "\n")


def text(plan: dict[str, Any]) -> str:
    """The plan as tables."""
    from mirasol.console import format_table

    stages = plan["stages"]
    lines = [format_table(_component_rows(plan)), "", format_table(_stage_rows(stages)), ""]
    one = "one device" if plan["processes"] == 1 else f"{plan['processes']} devices, parallel.kind {plan['kind']}"
    lines += [
        f"time: {duration(plan['seconds'])} of computing on {one}, at {plan['mfu']:.0%} of "
        f"{plan['peak_tflops']:.4g} TFLOP/s each ({plan['peak_is']})",
        f"disk: {size(plan['checkpoint_bytes'])} for a checkpoint, {size(plan['result_bytes'])} for the result, "
        f"{size(plan['disk_bytes'])} at most for all that are kept; {size(plan['clip_bytes'])} for a decoded clip",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan["notes"])])


def _component_rows(plan: dict[str, Any]) -> list[list[str]]:
    names = list(plan["stages"])
    rows = [["component", "parameters", *(f"trains in {name}" for name in names)]]
    for component, row in plan["components"].items():
        rows.append([component, f"{row['parameters']:,}", *(f"{row['trained'][name]:,}" for name in names)])
    total = [f"{plan['stages'][name]['trained']:,}" for name in names]
    return [*rows, ["total", f"{plan['parameters']:,}", *total]]


def _stage_rows(stages: dict[str, dict[str, Any]]) -> list[list[str]]:
    def row(title: str, show: Any) -> list[str]:
        return [title, *(show(stage) for stage in stages.values())]

    def memory(part: str) -> Any:
        return lambda stage: size(stage["memory"][part])

    rows = [
        ["", *stages],
        row("steps", lambda s: f"{s['steps']:,}"),
        row("microbatch of a device", lambda s: _shape(s["shape"])),
        row("microbatches a step", lambda s: str(s["microbatches"])),
        row("TFLOP a step, all devices", lambda s: f"{s['step_flops'] / 1e12:.4g}"),
        row("forward : backward", lambda s: f"1 : {s['cost']['backward_flops'] / s['cost']['forward_flops']:.2f}"),
        row("TFLOP recomputed", lambda s: f"{s['recomputed_flops'] / 1e12:.4g}"),
        row("weights on a device", memory("weights")),
        row("gradients", memory("gradients")),
        row("optimizer", memory("optimizer")),
        row("gathered layers", memory("gathered")),
        row("saved activations", memory("activations")),
        row("peak on a device", memory("peak")),
        row("seconds a step", lambda s: f"{s['step_seconds']:.3g}"),
        row("epochs", lambda s: "?" if s["epochs"] is None else f"{s['epochs']:.2f} of {s['clips']:,} clips"),
        row("time of an epoch", lambda s: "?" if s["epoch_seconds"] is None else duration(s["epoch_seconds"])),
        row("time of the stage", lambda s: duration(s["seconds"])),
    ]
    if any("fits" in stage for stage in stages.values()):
        rows.append(row("fits", lambda s: "yes" if s["fits"] else "NO"))
    return rows


def _shape(shape: dict[str, Any]) -> str:
    rows = f"{shape['questions']} x {shape['text_length']} tokens"
    if shape["objective"] == "image_text":
        return f"{shape['clips']} images, {rows}"
    return f"{shape['clips']} clips x {shape['chunks']} chunks, {rows}"


def size(count: float) -> str:
    """Bytes in the largest unit that fits."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} {UNITS[-1]}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for limit, unit, word in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {word}"
    return f"{seconds / 86_400:.3g} days"
