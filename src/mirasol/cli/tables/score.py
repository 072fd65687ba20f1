"""`mirasol score`: scores of any predictions on a data set, without a model or media."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mirasol.cli.common import add_dataset_arguments

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.cli.common import MakeParser

HELP = "score a file of predictions on a data set, without model or media"
DESCRIPTION = """Scores predictions against a data set's annotations as its official script does, with 95 % intervals,
per type as its papers print it. PREDICTIONS is the data set's official format, or jsonl with `id` and `answer` (a
text), `prediction` (the index of an option) or `scores` (one for each class), or npy with scores of all examples. Media
need not be present. Questions without a prediction count as wrong, predictions of unknown questions are ignored; both
are reported.

  mirasol score activitynet_qa data/activitynet_qa pred.json --split validation
  mirasol score nextqa_oe data/nextqa pred.json --split validation --wordnet nltk_data
  mirasol score vggsound data/vggsound scores.npy --split test --json"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    add_dataset_arguments(parser)
    parser.add_argument("predictions", metavar="PREDICTIONS", help="json, jsonl or npy file")
    parser.add_argument("--split", type=str, default="test", help="which split the predictions are of")
    parser.add_argument("--normalisation", type=str, default="none", help="none (as official scripts), light or folded")
    parser.add_argument("--wordnet", type=str, metavar="DIR", help="score by WUPS: folder of NLTK's data, with WordNet")
    parser.add_argument("--output", type=str, help="new folder for results.json and predictions.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: Namespace) -> None:
    """Scores, prints, and writes results where asked to."""
    from mirasol.cli.common import check_no_results, format_problems, make_folder, read_dataset_options
    from mirasol.console import make_console
    from mirasol.data.datasets.registry import read_dataset
    from mirasol.evaluation.baselines import read_training_examples
    from mirasol.evaluation.evaluate import score_file, write_scores
    from mirasol.evaluation.metrics import OPEN, format_scores
    from mirasol.evaluation.wups import Wups

    output = check_no_results(options.output) if options.output else None
    dataset = read_dataset(options.dataset, Path(options.root), options.split, read_dataset_options(options))
    wups = Wups(Path(options.wordnet)) if options.wordnet else None
    known, origin = read_training_examples(dataset, read_dataset_options(options))
    scores = score_file(dataset, Path(options.predictions), options.normalisation, wups, known=known)
    out = make_console()
    for line in format_problems(scores.problems):
        out.print(line, markup=False)
    if dataset.name == "nextqa_oe" and scores.protocol == OPEN:
        out.print("exact match; papers report WUPS on NExT-QA's open answers: --wordnet DIR (docs/evaluation.md)")
    if output is not None:
        make_folder(output)
        write_scores(output, dataset, scores, origin)
        out.print(f"written: {output / 'results.json'}, {output / 'predictions.jsonl'}")
    if options.json:
        sys.stdout.write(json.dumps({"source": dataset.name, "split": dataset.split, **scores.to_dict()}) + "\n")
    else:
        sys.stdout.write(format_scores(scores) + "\n")
