"""`mirasol score`: the numbers of anyone's predictions on a data set, without a model or media."""

import json
import sys
from pathlib import Path
from typing import Any

from mirasol.cli.common import add_dataset_arguments

HELP = "score a file of predictions on a data set, without model or media"
DESCRIPTION = """Scores predictions against a data set's annotations as its official script does, with 95 % intervals,
per type as its papers print it. PREDICTIONS is the data set's official format, or jsonl with `id` and `answer` (a
text), `prediction` (the place of an option) or `scores` (one for each class), or npy with scores of all examples. Media
need not be there. Questions without prediction are wrong; predictions of unknown questions count nowhere; both are
told.

  mirasol score activitynet_qa data/activitynet_qa pred.json --split validation
  mirasol score nextqa_oe data/nextqa pred.json --split validation --wordnet nltk_data
  mirasol score vggsound data/vggsound scores.npy --split test --json"""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    add_dataset_arguments(parser)
    parser.add_argument("predictions", metavar="PREDICTIONS", help="json, jsonl or npy file")
    parser.add_argument("--split", type=str, default="test", help="which split the predictions are of")
    parser.add_argument("--normalisation", type=str, default="none", help="none (as official scripts), light or folded")
    parser.add_argument("--wordnet", type=str, metavar="DIR", help="score by WUPS: folder of NLTK's data, with WordNet")
    parser.add_argument("--output", type=str, help="new folder for results.json and predictions.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: Any) -> None:
    """Scores, prints, and writes results where asked to."""
    from mirasol.cli.common import check_no_results, make_folder, problem_lines, read_dataset_options
    from mirasol.console import console
    from mirasol.data.datasets import read_dataset
    from mirasol.evaluation.baselines import training_examples
    from mirasol.evaluation.results import score_file, write_scored
    from mirasol.evaluation.scoring import OPEN, as_text
    from mirasol.evaluation.wups import Wups

    output = check_no_results(options.output) if options.output else None
    dataset = read_dataset(options.dataset, Path(options.root), options.split, read_dataset_options(options))
    wups = Wups(Path(options.wordnet)) if options.wordnet else None
    known, from_where = training_examples(dataset, read_dataset_options(options))
    scored = score_file(dataset, Path(options.predictions), options.normalisation, wups, known=known)
    out = console()
    for line in problem_lines(scored.problems):
        out.print(line, markup=False)
    if dataset.name == "nextqa_oe" and scored.protocol == OPEN:
        out.print("exact match; papers report WUPS on NExT-QA's open answers: --wordnet DIR (docs/evaluation.md)")
    if output is not None:
        make_folder(output)
        write_scored(output, dataset, scored, from_where)
        out.print(f"written: {output / 'results.json'}, {output / 'predictions.jsonl'}")
    if options.json:
        sys.stdout.write(json.dumps({"source": dataset.name, "split": dataset.split, **scored.to_dict()}) + "\n")
    else:
        sys.stdout.write(as_text(scored) + "\n")
