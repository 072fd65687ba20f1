"""One run of a suite from beginning to end: train, evaluate, and leave what the tables need.

A kill at any moment loses at most the steps since the last checkpoint: training resumes, an evaluation resumes from its
journal, and `done.json` is written last.
"""

import json
import resource
from pathlib import Path
from typing import Any

from mirasol.ablation.runs import ANSWERS, DONE, IDENTITY, LOG, STREAM, TRAINED, Run
from mirasol.ablation.streaming import stream_run
from mirasol.ablation.suite import CANDIDATES
from mirasol.ablation.twins import leave_for_twins, take_from_twin
from mirasol.config.recipe import DataRecipe
from mirasol.errors import UserError
from mirasol.files import hold_folder, write_file_atomically
from mirasol.json_values import read_own_object

_BYTES_OF_MAXRSS = 1024  # Linux counts KiB


def run_once(text: str) -> dict[str, Any]:
    """Makes the run that `Run.to_json` described, and before it the pretraining it needs, unless they are finished.
    Returns the content of its done.json.

    Raises UserError as training and evaluation do, and where the folder has another run.
    """
    return _make(Run.from_json(text))


def _make(run: Run) -> dict[str, Any]:
    if run.needs is not None and not run.needs.finished:
        _make(run.needs)
    run.folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(run.folder):
        if not run.finished:
            write_file_atomically(run.folder / IDENTITY, json.dumps(run.identity, indent=1) + "\n")
            take_from_twin(run)
            facts = _train(run)
            if run.asked is not None and not (run.folder / ANSWERS).is_file():
                _evaluate(run)
            if run.asked is not None and "stream" in run.asked and not (run.folder / STREAM).is_file():
                _stream(run)
            write_file_atomically(run.folder / DONE, json.dumps(facts, indent=1) + "\n")
            leave_for_twins(run)
    return read_done(run.folder)


def read_done(folder: Path) -> dict[str, Any]:
    """The content of a finished run's done.json. Raises UserError where it is damaged."""
    file = folder / DONE
    return read_own_object(file, "remove it, and run the suite again", ("training_seconds", "peak_memory", "steps"))


def _train(run: Run) -> dict[str, Any]:
    """Trains, or goes on. Returns seconds of training and peak memory, which the first finished attempt wrote down."""
    file = run.folder / TRAINED
    if file.is_file() and run.checkpoint.is_dir():
        return read_own_object(file, "remove this run's folder")
    from rich.console import Console

    import mirasol.auto  # noqa: F401 - a resumed run loads its processor through the Auto classes
    from mirasol.training.logging import read_metrics
    from mirasol.training.run_folder import find_git_commit
    from mirasol.training.trainer import train

    before = _measure_memory()
    with (run.folder / LOG).open("a", encoding="utf-8") as stream:
        train(run.recipe, resume=True, console=Console(file=stream, width=200))
    log = [row for row in read_metrics(run.folder / "train" / "metrics.jsonl") if row["kind"] == "train"]
    facts = {
        "steps": log[-1]["step"],
        "training_seconds": log[-1]["seconds"],
        "peak_memory": max(_measure_memory() - before, 0),
        "commit": find_git_commit(),
    }
    write_file_atomically(file, json.dumps(facts) + "\n")
    return facts


def _measure_memory() -> int:
    """The most bytes that this process has used so far: of the GPU where one is in use, else of the processor."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return _BYTES_OF_MAXRSS * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _evaluate(run: Run) -> None:
    """Asks the questions of the suite, by the same pipeline as `mirasol evaluate`, and last writes what was right."""
    from mirasol.checkpoint import load_checkpoint
    from mirasol.data.datasets.registry import read_dataset
    from mirasol.evaluation.answer import AnswerSettings
    from mirasol.evaluation.baselines import read_training_examples
    from mirasol.evaluation.evaluate import evaluate_dataset, write_evaluation
    from mirasol.evaluation.journal import NAME, Journal

    asked, data = run.asked, run.recipe.data.data_sets[""]
    assert asked is not None
    folder = run.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    dataset = read_dataset(data.dataset, Path(data.root), asked["split"], data.options)
    controls = () if asked["control"] is None else (asked["control"],)
    settings = AnswerSettings(
        dataset.root,
        controls,
        classes=dataset.classes,
        score_candidates=asked["protocol"] == CANDIDATES,
        threads=max(run.recipe.threads, 1),
        cache=_find_cache(run.recipe.data),
    )
    known = read_training_examples(dataset, data.options)
    loaded = load_checkpoint(run.checkpoint, _find_device(run))
    evaluation = evaluate_dataset(loaded, dataset, settings, folder / NAME, known=known)
    write_evaluation(folder, evaluation)
    answers = _collect_answers(evaluation, asked)
    Journal.end(folder)
    write_file_atomically(run.folder / ANSWERS, json.dumps(answers) + "\n")


def _stream(run: Run) -> None:
    """Shows clips chunk by chunk, where the suite wants it. After a kill it begins again: it takes a minute or two."""
    import torch

    if run.recipe.threads:
        torch.set_num_threads(run.recipe.threads)  # as in training, which a resumed run does not do again
    found = stream_run(run, _find_cache(run.recipe.data), _find_device(run))
    write_file_atomically(run.folder / STREAM, json.dumps(found) + "\n")


def _find_cache(data: DataRecipe) -> Path | None:
    """The folder of decoded clips; None where it must not grow by those that are asked about."""
    return None if data.cache is None or data.cache_limit is not None else Path(data.cache)


def _find_device(run: Run) -> str:
    import torch

    return "cuda" if run.recipe.device != "cpu" and torch.cuda.is_available() else "cpu"


def _collect_answers(evaluation: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What was right, question by question in a fixed order, and what guessing scores on the same questions.

    Raises UserError for a protocol that the data set does not have, and where no question is of the suite's types.
    """
    from mirasol.evaluation.baselines import compute_chance
    from mirasol.evaluation.metrics import CANDIDATES as BY_CANDIDATES
    from mirasol.evaluation.metrics import OPEN

    protocol = BY_CANDIDATES if asked["protocol"] == CANDIDATES else OPEN
    if protocol not in evaluation.protocols:
        raise UserError(f"metric.protocol={asked['protocol']}: the questions have no candidates: use open")
    scores = evaluation.protocols[protocol]
    if asked["control"] is not None:
        scores = evaluation.controls[protocol][asked["control"]]
    kinds = asked["question_types"]
    judged = [one for one in scores.judged if kinds is None or one.example.question_type in kinds]
    if not judged:
        raise UserError(f"metric.question_types={kinds}: no question of {evaluation.dataset.root} is of these types")
    judged.sort(key=lambda one: one.example.id)
    lists = {
        "id": [one.example.id for one in judged],
        "video": [one.example.video_name for one in judged],
        "type": [one.example.type_name for one in judged],
        "value": [one.value for one in judged],
    }
    baselines = {name: found.value for name, found in scores.baselines.items()} if kinds is None else {}
    baselines["chance"] = sum(compute_chance(one.example) for one in judged) / len(judged)
    return {**lists, "baselines": baselines}
