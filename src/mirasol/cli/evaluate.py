"""`mirasol evaluate`: a checkpoint's score on a data set, compared with chance and controls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirasol.cli.common import add_dataset_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console

    from mirasol.checkpoint import Loaded
    from mirasol.cli.common import MakeParser
    from mirasol.evaluation.evaluate import Evaluation

MOST_UNREADABLE = 20  # clips that are named on the screen
HELP = "score a checkpoint on a data set, compared with chance and controls"
DESCRIPTION = """Asks a checkpoint every question of a data set and scores its answers: open generation by exact match,
and, where questions have candidates, the most likely of them. Every score comes with its 95 % interval, baselines
(chance, blind guessing), and controls: the same clips without video, without audio, without both, and with the audio
shifted against the video. DATA is your own folder with SPLIT.jsonl or SPLIT.csv; DATASET and ROOT are a data set of
docs/datasets.md.

  mirasol evaluate tiny data/shapes
  mirasol evaluate runs/demo data/shapes --split validation --output results/demo --figures pdf
  mirasol evaluate runs/mine activitynet_qa data/activitynet_qa --split test --output results/activitynet_qa

--output receives results.json, predictions.jsonl, the official format of predictions where there is one, and
report.html; the same command resumes an interrupted evaluation."""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), a run's folder or a checkpoint folder"
    )
    parser.add_argument("data", metavar="DATA|DATASET", help="your own folder, or a data set's name")
    parser.add_argument("root", metavar="ROOT", nargs="?", help="of a data set: folder of its annotations and media")
    parser.add_argument("--split", type=str, default="test", help="which split, e.g. SPLIT.jsonl of your folder")
    parser.add_argument("--output", type=str, help="new folder for the results")
    parser.add_argument("--figures", type=str, metavar="pdf|png", help="also write the report's figures as files")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--skip-controls", action="store_true", help="score only the unchanged clips")
    parser.add_argument(
        "--calibrate", action="store_true", help="store with the checkpoint below which probability it is not sure"
    )
    parser.add_argument("--clips-per-batch", type=int, default=16, help="changes speed and memory, not answers")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, in tokens")
    parser.add_argument("--device", type=str, default="cpu", help="where to compute: auto, cpu, cuda or mps")
    parser.add_argument("--wordnet", type=str, metavar="DIR", help="also score by WUPS: folder of NLTK's data")
    parser.add_argument("--hash-media", action="store_true", help="include the media's contents in the data's hash")
    parser.add_argument("--processes", type=int, default=1, help="number of processes that answer")
    add_dataset_options(parser)


def run(options: Namespace) -> None:
    """Evaluates, prints, and writes results where asked to."""
    from mirasol.checkpoint import find_checkpoint, load_checkpoint
    from mirasol.cli.common import check_device, check_positive_options, make_folder, read_dataset_options
    from mirasol.errors import UserError

    check_positive_options(options, "clips_per_batch", "max_new_tokens", "processes")
    _check_figures(options.figures, options.output)
    if options.calibrate and options.skip_controls:
        raise UserError("--calibrate needs the controls: leave --skip-controls out")
    find_checkpoint(options.checkpoint)

    from mirasol.console import count_cores, make_console, print_line, show_progress
    from mirasol.data.datasets.registry import read_dataset
    from mirasol.evaluation.answer import AnswerSettings
    from mirasol.evaluation.baselines import read_training_examples
    from mirasol.evaluation.calibration import format_calibration, write_calibration
    from mirasol.evaluation.controls import CONTROLS
    from mirasol.evaluation.evaluate import evaluate_dataset
    from mirasol.evaluation.journal import NAME
    from mirasol.evaluation.wups import Wups

    name, root = _find_dataset(options)
    output, out = _find_output(options.output), make_console()
    wups = Wups(Path(options.wordnet)) if options.wordnet else None
    dataset = read_dataset(name, root, options.split, read_dataset_options(options))
    loaded = load_checkpoint(options.checkpoint, check_device(options.device))
    known = read_training_examples(dataset, read_dataset_options(options))
    settings = AnswerSettings(
        root=dataset.root,
        controls=() if options.skip_controls else tuple(CONTROLS),
        classes=dataset.classes,
        max_new_tokens=options.max_new_tokens,
        clips_per_batch=options.clips_per_batch,
        threads=count_cores(),
    )
    if output is not None:
        make_folder(output)
    journal = output / NAME if output is not None else None
    with show_progress(out, "Answering", "clips") as report:
        evaluation = evaluate_dataset(
            loaded, dataset, settings, journal, options.processes, report, wups, options.hash_media, known
        )
    _print_problems(out, evaluation)
    if output is not None:
        _write_results(out, loaded, evaluation, output, options.figures)
    if options.calibrate:
        print_line(out, format_calibration(evaluation.record["calibration"]))
        print_line(out, f"written: {write_calibration(loaded.folder, evaluation.record)}")
    sys.stdout.write((json.dumps(evaluation.record) if options.json else evaluation.format_table()) + "\n")


def _check_figures(figures: str | None, output: str | None) -> None:
    """Raises UserError for an unknown format of figures, and where there is no folder for them."""
    from mirasol.errors import UserError

    if figures is None:
        return
    from mirasol.evaluation.figures import check_figure_format

    check_figure_format(figures)
    if output is None:
        raise UserError(f"--figures {figures} has no effect without --output, the folder they are written to")


def _find_dataset(options: Namespace) -> tuple[str, Path]:
    """The data set's name and its folder; the name is `folder` where only a folder is given."""
    from mirasol.data.datasets.registry import DATASETS
    from mirasol.errors import UserError

    if options.root is not None:
        return options.data, Path(options.root)
    if options.data in DATASETS and not Path(options.data).is_dir():
        raise UserError(f"{options.data} needs ROOT, the folder of its annotations and media")
    return "folder", Path(options.data)


def _print_problems(out: Console, evaluation: Evaluation) -> None:
    """Problems of the data, and clips that were left out with the reason."""
    from mirasol.cli.common import format_problems

    for line in format_problems(evaluation.dataset.problems):
        out.print(line, markup=False)
    unusable = evaluation.record["unusable_clips"]
    for clip in unusable[:MOST_UNREADABLE]:
        out.print(f"left out, {clip['questions']} questions: {clip['media']}: {clip['reason']}", markup=False)
    if len(unusable) > MOST_UNREADABLE:
        more = len(unusable) - MOST_UNREADABLE
        out.print(f"left out: {more} more clips: see unusable_clips in results.json (--output)")


def _write_results(out: Console, loaded: Loaded, evaluation: Evaluation, output: Path, figures: str | None) -> None:
    """Writes results and report, and ends the journal."""
    from mirasol.evaluation.evaluate import write_evaluation
    from mirasol.evaluation.journal import Journal
    from mirasol.evaluation.one_clip import examine_evaluated_clip
    from mirasol.evaluation.report import ReportExtras, write_report

    written = write_evaluation(output, evaluation)
    extras = ReportExtras(
        log=_read_training_log(out, loaded.folder), one_clip=examine_evaluated_clip(loaded, evaluation)
    )
    written += write_report(output, loaded, evaluation, extras, figures)
    Journal.end(output)
    for name in written:
        out.print(f"written: {output / name}")


def _read_training_log(out: Console, checkpoint: Path) -> list[dict[str, Any]]:
    """The log of the run that the checkpoint belongs to; empty where there is none, or it is damaged."""
    from mirasol.errors import UserError
    from mirasol.training.logging import read_metrics

    try:
        return read_metrics(checkpoint.parent / "metrics.jsonl")
    except UserError as error:
        out.print(f"no curves in the report: {error}", markup=False)
        return []


def _find_output(path: str | None) -> Path | None:
    """The folder for the results: a new one, or that of an interrupted evaluation."""
    from mirasol.cli.common import check_no_results
    from mirasol.errors import UserError
    from mirasol.evaluation.journal import NAME

    if path is not None and (Path(path) / NAME).is_file():
        return Path(path)
    if path is not None and (Path(path) / "results.json").is_file():
        raise UserError(
            f"{path}: already exists and is complete: its results are in {Path(path) / 'results.json'}; "
            "to evaluate again, give another folder"
        )
    return check_no_results(path) if path else None
