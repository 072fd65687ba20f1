"""`mirasol ablate`: the rows of a table, trained, evaluated and compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console

    from mirasol.ablation.plan import SuitePlan
    from mirasol.ablation.suite import Suite
    from mirasol.cli.common import MakeParser

HELP = "the rows of a paper's table by one command: trained, compared, judged"
DESCRIPTION = """Trains every row of a suite (YAML) with several seeds, asks all of them the same questions, and
compares them: means with intervals, differences from the reference row, and whether they support what the paper found.

  mirasol ablate recipes/ablations/table_1b.yaml --output runs/table_1b --dry-run
  mirasol ablate recipes/ablations/table_1b.yaml --output runs/table_1b --jobs 2
  mirasol ablate recipes/ablations/table_1b.yaml --output runs/table_1b --task $SLURM_ARRAY_TASK_ID/8
  mirasol ablate --report runs/table_1b            redraws the tables, without training

It can be killed at any moment: the same command resumes, and finished runs are not repeated. Keys of the base
recipe are options, as with `mirasol train`; so are those of its pretrainings and data (--pretraining.NAME.KEY,
--render.NAME.KEY), of its metric (--metric.KEY) and of what it streams (--stream.KEY)."""

# The options that are not keys of the suite's recipes.
OWN = (
    "--output", "--seeds", "--rows", "--jobs", "--executor", "--task", "--dry-run", "--report", "--shared", "--json",
    "--figures", "--pack", "--mfu", "--peak-tflops",
)  # fmt: skip


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "suite", metavar="SUITE", nargs="?", help="the suite's file, e.g. recipes/ablations/table_1b.yaml"
    )
    parser.add_argument("--output", type=str, help="folder for all runs and the result")
    parser.add_argument("--seeds", type=int, help="seeds per row, from the first; by default the suite's")
    parser.add_argument("--rows", type=str, metavar="A,B", help="only these rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine, each in its own process")
    parser.add_argument("--executor", type=str, default="local", help="local processes, or ray: a Ray cluster")
    parser.add_argument("--task", type=str, metavar="I/N", help="every Nth run, starting at the Ith (I from 0)")
    parser.add_argument("--dry-run", action="store_true", help="print runs, steps, FLOPs, hours and disk, and stop")
    parser.add_argument("--report", type=str, metavar="DIR", help="redraw the result in this folder, and stop")
    parser.add_argument(
        "--shared", type=str, metavar="DIR", help="folder of pretrainings and decoded clips, for suites to share"
    )
    parser.add_argument("--figures", type=str, metavar="pdf|png", help="also write the report's figures as files")
    parser.add_argument(
        "--pack", action="store_true", help="also write runs.tar.xz: all that tables and further seeds need"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="dry run: share of the peak FLOP/s that is reached")
    parser.add_argument("--peak-tflops", type=float, help="dry run: peak TFLOP/s of a device; by default measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(options: Namespace) -> None:
    """Makes what is left of the suite, and writes its result."""
    from mirasol.errors import UserError
    from mirasol.evaluation.figures import check_figure_format

    check_figure_format(options.figures)
    if options.report is not None:
        if options.suite is not None or options.output is not None:
            raise UserError(f"--report {options.report} draws what is there: leave SUITE and --output out")
        _write_result(Path(options.report), options)
        return
    if options.suite is None or options.output is None:
        raise UserError("ablate needs a suite and a folder: mirasol ablate SUITE --output DIR")
    suite = _read_suite(options)
    from mirasol.console import make_console

    _ablate(suite, Path(options.output), options, make_console())


def _read_suite(options: Namespace) -> Suite:
    import dataclasses

    from mirasol.ablation.suite import read_suite
    from mirasol.cli.common import check_positive
    from mirasol.config.recipe_io import parse_overrides

    suite = read_suite(Path(options.suite), parse_overrides(options.get("overrides") or []))
    if options.seeds is None:
        return suite
    check_positive("--seeds", options.seeds)
    more = [seed for seed in range(10 * options.seeds) if seed not in suite.seeds]
    return dataclasses.replace(suite, seeds=(*suite.seeds, *more)[: options.seeds])


def _ablate(suite: Suite, output: Path, options: Namespace, console: Console) -> None:
    """The plan, and unless it is a dry run everything else."""
    from mirasol.ablation.execute import choose_executor, make_runs
    from mirasol.ablation.plan import plan_suite, read_costs, write_suite
    from mirasol.ablation.runs import SuiteRuns, choose_task
    from mirasol.cli.common import check_positive, make_folder
    from mirasol.console import print_line
    from mirasol.cost.assumptions import Assumptions
    from mirasol.errors import UserError

    check_positive("--jobs", options.jobs)
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: give a share of the peak above 0, at most 1")
    if options.peak_tflops is not None and not 0 < options.peak_tflops < float("inf"):
        raise UserError(f"--peak-tflops {options.peak_tflops}: must be above 0")
    execute = choose_executor(options.executor, options.jobs)
    _render(suite, console, options.dry_run)
    runs = SuiteRuns(suite, output, None if options.shared is None else Path(options.shared))
    rows = None if options.rows is None else [name.strip() for name in options.rows.split(",")]
    chosen = choose_task(runs.list_rows(rows), options.task)
    if not chosen:
        print_line(console, f"--task {options.task}: no run is left for this task: the suite has fewer runs than tasks")
        return
    for run in runs.list_rows():
        run.check_same()  # rows that are not chosen stand in the table, too
    assumptions = Assumptions(mfu=options.mfu, peak_tflops=options.peak_tflops)
    if options.dry_run:
        plan = plan_suite(runs, chosen, assumptions)
        sys.stdout.write((json.dumps(plan.to_dict()) if options.json else format_plan(plan)) + "\n")
        return
    costs = read_costs(runs, chosen) or plan_suite(runs, chosen, assumptions).runs
    make_folder(output)
    write_suite(runs, costs)
    left = runs.list_left(chosen)
    print_line(console, f"{len(left)} of {len(costs)} runs are left")

    def report(name: str, facts: dict[str, Any]) -> None:
        print_line(console, f"finished: {name}, {facts['training_seconds']:.0f} s of training")

    make_runs(left, execute, report)
    _write_result(output, options)


def _render(suite: Suite, console: Console, is_dry: bool) -> None:
    """Renders the data sets that are missing. A dry run writes nothing, and needs them, for it counts their clips and
    questions. Raises UserError where it has none."""
    from mirasol.ablation.rendering import list_unrendered, render_data_set
    from mirasol.console import count_cores, show_progress
    from mirasol.errors import UserError

    for one in list_unrendered(suite).values():
        if is_dry:
            raise UserError(
                f"{one.root}: not rendered yet, and a dry run counts its clips: mirasol data synthesize {one.root} "
                f"--kind {one.kind} --seed {one.seed} --train {one.train} --validation {one.validation} "
                f"--test {one.test}"
            )
        with show_progress(console, f"Rendering {one.root}", "clips") as progress:
            render_data_set(one, count_cores(), progress)


def _write_result(output: Path, options: Namespace) -> None:
    """Draws and prints what is finished."""
    from mirasol.ablation.report import write_result
    from mirasol.ablation.result import collect_result
    from mirasol.ablation.tables import format_text
    from mirasol.console import make_console, print_line

    result = collect_result(output)
    for name in write_result(output, result, options.figures, options.pack):
        print_line(make_console(), f"written: {output / name}")
    sys.stdout.write((json.dumps(result.to_dict()) if options.json else format_text(result)) + "\n")


def format_plan(plan: SuitePlan) -> str:
    """The plan as a table: a line for each kind of run, and sums over what is left."""
    from mirasol.cli.plan import format_bytes, format_duration
    from mirasol.console import format_table

    kinds: dict[str, list[str]] = {}
    for name in plan.runs:
        kinds.setdefault(name.partition("/seed-")[0], []).append(name)
    rows = [["", "runs", "left", "parameters", "steps", "TFLOP a run", "time a run", "disk a run"]]
    for kind, names in kinds.items():
        cost = plan.runs[names[0]]
        left = sum(name in plan.left for name in names)
        rows.append([
            kind, str(len(names)), str(left), f"{cost.parameters:,}", f"{cost.steps:,}", f"{cost.flops / 1e12:.4g}",
            format_duration(cost.seconds), format_bytes(cost.disk_bytes),
        ])  # fmt: skip
    disk = sum(cost.disk_bytes for cost in plan.runs.values()) + plan.cache_bytes
    lines = [
        format_table(rows),
        "",
        f"left: {len(plan.left)} of {len(plan.runs)} runs, {plan.sum_left('steps'):,} steps, "
        f"{plan.sum_left('flops') / 1e12:.4g} TFLOP, {format_duration(plan.sum_left('seconds'))} of training on one "
        f"device at {plan.gigaflops:.3g} GFLOP/s",
        f"disk: at most {format_bytes(disk)}, {format_bytes(plan.cache_bytes)} of it decoded clips",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])
