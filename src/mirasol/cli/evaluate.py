"""`mirasol evaluate`: a checkpoint's score on a data set, beside chance and controls."""

import json
import sys
from pathlib import Path
from typing import Any

from mirasol.cli.common import add_dataset_options

SHOWN = 20  # clips that cannot be read and are named on the screen

HELP = "score a checkpoint on a data set, beside chance and controls"
DESCRIPTION = """Asks a checkpoint every question of a data set and scores its answers: open generation by exact match,
and, where questions have candidates, the likeliest of them. Beside the score stand 95 % intervals, baselines (chance,
blind guessing), and controls: the same with no video, no audio, neither, and the audio shifted against the video.
DATA is your own folder with SPLIT.jsonl or SPLIT.csv; DATASET and ROOT are a data set of docs/datasets.md.

  mirasol evaluate tiny data/shapes
  mirasol evaluate runs/demo data/shapes --split validation --output results/demo
  mirasol evaluate runs/mine activitynet_qa data/activitynet_qa --split test --output results/activitynet_qa

--output gets results.json, predictions.jsonl, the official format of predictions where there is one, and report.html;
the same command goes on with an evaluation that was interrupted."""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), a run's folder or a checkpoint folder"
    )
    parser.add_argument("data", metavar="DATA|DATASET", help="your own folder, or a data set's name")
    parser.add_argument("root", metavar="ROOT", nargs="?", help="of a data set: folder of its annotations and media")
    parser.add_argument("--split", type=str, default="test", help="which split, e.g. SPLIT.jsonl of your folder")
    parser.add_argument("--output", type=str, help="new folder for the results")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--skip-controls", action="store_true", help="score only the untouched clips")
    parser.add_argument("--clips-per-batch", type=int, default=16, help="changes speed and memory, not answers")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, in tokens")
    parser.add_argument("--device", type=str, default="cpu", help="where to compute, e.g. cuda")
    parser.add_argument("--wordnet", type=str, metavar="DIR", help="score by WUPS, too: folder of NLTK's data")
    parser.add_argument("--hash-media", action="store_true", help="hash the media's contents, too")
    parser.add_argument("--processes", type=int, default=1, help="processes that answer")
    add_dataset_options(parser)


def run(options: Any) -> None:
    """Evaluates, prints, and writes results where asked to."""
    from mirasol.checkpoint import load_checkpoint
    from mirasol.cli.common import check_device, check_positive, make_folder, read_dataset_options
    from mirasol.console import console, cores, progress
    from mirasol.data.datasets import read_dataset
    from mirasol.evaluation.asking import Asking
    from mirasol.evaluation.baselines import training_examples
    from mirasol.evaluation.controls import CONTROLS
    from mirasol.evaluation.journal import NAME
    from mirasol.evaluation.source_evaluation import evaluate_dataset
    from mirasol.evaluation.wups import Wups

    for name in ("clips_per_batch", "max_new_tokens", "processes"):
        check_positive(f"--{name.replace('_', '-')}", options[name])
    name, root = _named(options)
    output, out = _output_or_unfinished(options.output), console()
    wups = Wups(Path(options.wordnet)) if options.wordnet else None
    dataset = read_dataset(name, root, options.split, read_dataset_options(options))
    loaded = load_checkpoint(options.checkpoint, check_device(options.device))
    known = training_examples(dataset, read_dataset_options(options))
    asking = Asking(
        root=dataset.root, controls=() if options.skip_controls else tuple(CONTROLS), classes=dataset.classes,
        max_new_tokens=options.max_new_tokens, clips_per_batch=options.clips_per_batch, threads=cores(),
    )  # fmt: skip
    if output is not None:
        make_folder(output)
    journal = output / NAME if output is not None else None
    with progress(out, "Answering", "clips") as report:
        evaluated = evaluate_dataset(
            loaded, dataset, asking, journal, options.processes, report, wups, options.hash_media, known
        )
    _tell(out, loaded, evaluated, output)
    sys.stdout.write((json.dumps(evaluated.record) if options.json else evaluated.table()) + "\n")


def _named(options: Any) -> tuple[str, Path]:
    """The data set's name and its folder: `folder` where one's own is given without a name."""
    from mirasol.data.datasets import DATASETS
    from mirasol.errors import UserError

    if options.root is not None:
        return options.data, Path(options.root)
    if options.data in DATASETS and not Path(options.data).is_dir():
        raise UserError(f"{options.data} needs ROOT, the folder of its annotations and media")
    return "folder", Path(options.data)


def _tell(out: Any, loaded: Any, evaluated: Any, output: Path | None) -> None:
    """What was left out and why; writes the results where there is a folder for them."""
    from mirasol.cli.common import problem_lines
    from mirasol.evaluation.journal import Journal
    from mirasol.evaluation.source_evaluation import write_evaluation
    from mirasol.evaluation.source_report import write_report

    for line in problem_lines(evaluated.dataset.problems):
        out.print(line, markup=False)
    unusable = evaluated.record["unusable_clips"]
    for clip in unusable[:SHOWN]:
        out.print(f"left out, {clip['questions']} questions: {clip['media']}: {clip['reason']}", markup=False)
    if len(unusable) > SHOWN:
        out.print(f"left out: {len(unusable) - SHOWN} more clips: see unusable_clips in results.json (--output)")
    if output is not None:
        written = write_evaluation(output, evaluated)
        write_report(output / "report.html", loaded, evaluated)
        Journal.end(output)
        for name in [*written, "report.html"]:
            out.print(f"written: {output / name}")


def _output_or_unfinished(path: str | None) -> Path | None:
    """The folder for the results: a new one, or that of an evaluation that was interrupted."""
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
