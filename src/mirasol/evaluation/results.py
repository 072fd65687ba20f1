"""Result files: results.json (numbers and everything that could make them differ) and predictions.jsonl."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mirasol
from mirasol.data.datasets import DatasetSplit
from mirasol.data.digest import examples_digest
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.evaluation.normalisation import NORMALISATIONS
from mirasol.evaluation.predictions import read_predictions, unmatched
from mirasol.evaluation.scoring import WUPS, Scored, score_answers, score_choices, score_wups
from mirasol.evaluation.wups import Wups
from mirasol.files import file_hash, write_whole


def score_file(
    dataset: DatasetSplit,
    predictions: Path,
    normalisation: str = "none",
    wups: Wups | None = None,
    seed: int = 0,
    known: Sequence[Example] = (),
) -> Scored:
    """The numbers of a file of predictions (`read_predictions`) of a split, over all its annotated examples.

    A file of choices or scores is scored by them, another by exact match of its texts, or by WUPS where `wups` is
    given. `known` are examples of the training split, for baselines. Problems, such as questions without prediction,
    are in the result.

    Raises:
        UserError: unknown normalisation, or one where no texts are compared for equality; unreadable predictions; a
            split without published answers.
    """
    if normalisation not in NORMALISATIONS:
        raise UserError(f"normalisation {normalisation!r} is not known: choose {', '.join(NORMALISATIONS)}")
    found = read_predictions(predictions, dataset.name, dataset.annotated)
    if not any(example.target for example in dataset.annotated):
        raise UserError(f"{dataset.name} {dataset.split}: publishes no answers, so nothing can be scored here")
    chosen = any(prediction.choice is not None or prediction.scores is not None for prediction in found.values())
    _check_fits(dataset, predictions, chosen, normalisation, wups)
    if chosen:
        scored = score_choices(dataset.name, dataset.annotated, found, dataset.classes, seed, known)
    elif wups is not None:
        scored = score_wups(dataset.name, dataset.annotated, found, wups, seed)
    else:
        scored = score_answers(dataset.name, dataset.annotated, found, normalisation, seed, known)
    costly = [
        problem for problem in dataset.problems if problem.kind != "missing media" and problem.severity == "error"
    ]
    problems = [*costly, *unmatched(found, dataset.annotated, str(predictions))]
    ids = {example.id for example in dataset.annotated}
    counts = {
        "n_annotated": len(dataset.annotated),
        "n_evaluated": len(scored.judged),
        "n_predicted": len(ids & found.keys()),
        "n_missing": len(ids - found.keys()),
        "n_unknown": len(found.keys() - ids),
    }
    facts = {
        **scored.facts,
        "predictions": {"file": Path(predictions).name, "sha256": file_hash(Path(predictions))},
        "counts": counts,
        "problems": [problem.to_dict() for problem in problems],
    }
    return dataclasses.replace(scored, problems=tuple(problems), facts=facts)


def _check_fits(dataset: DatasetSplit, predictions: Path, chosen: bool, normalisation: str, wups: Wups | None) -> None:
    """Refuses what has no meaning for predictions that are choices (`chosen`), or for those that are texts."""
    if normalisation != "none" and (chosen or wups is not None):
        what = "choices or scores" if chosen else "WUPS"
        raise UserError(f"normalisation {normalisation!r} has no effect on {what}: leave --normalisation out")
    if chosen and wups is not None:
        raise UserError(f"{predictions}: holds choices or scores; WUPS compares texts: leave --wordnet out")
    if chosen and not dataset.classes and not all(example.candidates for example in dataset.annotated):
        raise UserError(f"{predictions}: holds choices or scores, but {dataset.name} is open: give `answer` texts")


def versions() -> dict[str, str | None]:
    """What a result was computed with; None for a package that is not installed."""
    import numpy
    import torch
    import transformers

    try:
        decoder = importlib.metadata.version("av")
    except importlib.metadata.PackageNotFoundError:
        decoder = None
    return {
        "mirasol": mirasol.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "PyAV": decoder,
    }


def describe_data(dataset: DatasetSplit, media_contents: bool = False) -> dict[str, Any]:
    """What results.json says of the data. Its hash is of all annotated examples and of the media that are there; it
    counts their contents where that is asked for.

    Where all examples have one prompt (data sets without questions), it is stated, be it the user's or the default.
    """
    media = (example.media for example in dataset.examples)
    prompts = {example.prompt for example in dataset.annotated}
    return {
        "source": dataset.name,
        "split": dataset.split,
        "data": {
            "sha256": examples_digest(dataset.root, dataset.annotated, media, media_contents).sha256,
            "sha256_of_media": "contents" if media_contents else "paths and sizes",
            "annotation_files": list(dataset.annotation_files),
            "published_examples": dataset.published.examples,
            **dataset.facts,
            **({"prompt": prompts.pop()} if len(prompts) == 1 else {}),
        },
    }


def write_scored(folder: Path, dataset: DatasetSplit, scored: Scored, train_baselines: str = "none") -> None:
    """Writes results.json and predictions.jsonl of scored predictions into a folder.

    `train_baselines`: where the examples that baselines guess from come from, as `training_examples` says it.
    """
    result = {
        **describe_data(dataset),
        "protocols": {scored.protocol: scored.to_dict()},
        "train_baselines": train_baselines,
        "versions": versions(),
    }
    rows = [item.to_dict() | ({"value": item.value} if scored.protocol == WUPS else {}) for item in scored.judged]
    write_whole(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(folder / "results.json", json.dumps(result, indent=1) + "\n")
