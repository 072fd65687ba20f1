"""Evaluation of a checkpoint, or of a file of predictions, on a data set: numbers under every protocol, and the files
that state them with everything that could make them differ."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mirasol
from mirasol.checkpoint import CALIBRATION, Loaded
from mirasol.data.datasets.contract import DatasetSplit
from mirasol.data.digest import digest_examples
from mirasol.data.example import ClipExamples, Example, group_by_clip
from mirasol.data.media_files import is_image
from mirasol.errors import UserError
from mirasol.evaluation.answer import UNTOUCHED, AnswerSettings, ClipRow, answer_in_batches, make_clip_key
from mirasol.evaluation.calibration import (
    REMOVING_CONTROLS,
    JudgedProbability,
    measure_calibration,
    summarise_surprise,
)
from mirasol.evaluation.journal import Journal
from mirasol.evaluation.metrics import (
    CANDIDATES,
    NORMALISATIONS,
    OPEN,
    PREDICTION_FILES,
    WUPS,
    JudgedAnswer,
    ProtocolScores,
    format_scores,
    score_answers,
    score_choices,
    score_wups,
    select_answered,
)
from mirasol.evaluation.predictions import Prediction, find_unmatched, format_official_predictions, read_predictions
from mirasol.evaluation.tables import find_normalisation
from mirasol.evaluation.wups import Wups
from mirasol.files import hash_file, write_file_atomically
from mirasol.media.processor import MirasolProcessor

RESULTS = "results.json"
HOW = {
    OPEN: "greedy decoding over the whole vocabulary; right where it equals a reference after the normalisation",
    CANDIDATES: "the candidate of highest log-likelihood per token, <eos> included; for mAP, AUC and d-prime its "
    "log-softmax over the candidates",
    WUPS: "greedy decoding over the whole vocabulary; a word counts by its WordNet similarity to the reference's, as "
    "in NExT-QA's script, without a threshold and with 0.9",
}
# Media settings that every published number names; the checkpoint's hash covers the rest.
STATED_SETTINGS = ("frames_per_chunk", "num_chunks", "chunk_seconds", "max_chunks", "image_size")


@dataclass(frozen=True)
class Evaluation:
    """The results of one checkpoint on one split.

    protocols: scores by protocol, open generation (the headline) first
    controls: scores by protocol, then by control
    examples: the questions that were asked; predictions: their answers and candidate scores, by question id
    chunks: length of the clip in chunks, by question id
    record: the content of results.json
    """

    dataset: DatasetSplit
    protocols: dict[str, ProtocolScores]
    controls: dict[str, dict[str, ProtocolScores]]
    examples: tuple[Example, ...]
    predictions: Mapping[str, Prediction]
    chunks: Mapping[str, int]
    record: dict[str, Any]

    def format_table(self) -> str:
        """All protocols with their controls, and the counts, as text."""
        parts = [format_scores(scores, self.controls[name]) for name, scores in self.protocols.items()]
        counts = self.record["counts"]
        lost = "".join(f", {reason} {count}" for reason, count in counts["reasons"].items())
        return "\n\n".join([*parts, ", ".join(f"{key} {counts[key]}" for key in counts if key != "reasons") + lost])


def evaluate_dataset(
    loaded: Loaded,
    dataset: DatasetSplit,
    settings: AnswerSettings,
    journal: Path | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    wups: Wups | None = None,
    hash_media: bool = False,
    known: tuple[Sequence[Example], str] = ((), "none"),
) -> Evaluation:
    """Asks the model every usable question of the split and scores its answers.

    The numbers do not depend on interruptions, `processes`, or batches.

    journal: file from which an interrupted evaluation resumes; None keeps everything in memory
    progress: receives numbers of clips, (done, total)
    wups: adds WUPS to the protocols
    hash_media: the data's hash covers the contents of the media
    known: the result of `read_training_examples`, for the baselines of blind guessing

    Raises:
        UserError: no usable example, or a journal of another evaluation.
    """
    examples, left_out = _select_askable(loaded.processor, dataset.examples, settings)
    if not examples:
        why = _explain_none(dataset, left_out)
        raise UserError(f"{dataset.root}: no usable example in split {dataset.split!r} of {dataset.name}: {why}")
    clips, media = group_by_clip(examples), loaded.model.config.media_settings()
    record = {
        **describe_data(dataset, hash_media),
        "checkpoint": {"name": str(loaded.folder.name), "sha256": hash_checkpoint(loaded.folder)},
        "settings": {
            "max_new_tokens": settings.max_new_tokens,
            "controls": list(settings.controls),
            "device": loaded.model.device.type,
            **{name: media[name] for name in STATED_SETTINGS},
        },
        "versions": collect_package_versions(),
    }
    if journal is None:
        rows = [row for batch in answer_in_batches(loaded, clips, settings, processes, progress) for row in batch]
    else:
        with Journal.open(journal, record) as kept:
            answered = {tuple(row["clip"]) for row in kept.rows}
            left = [clip for clip in clips if tuple(make_clip_key(clip)) not in answered]
            for batch in answer_in_batches(loaded, left, settings, processes, progress):
                kept.append(batch)
            rows = list(kept.rows)
    # After the journal: answers do not depend on it, so an evaluation may resume without or with a training split.
    record["train_baselines"] = known[1]
    return _score_rows(dataset, settings, clips, rows, record, left_out, wups, known[0])


def _explain_none(dataset: DatasetSplit, left_out: Mapping[str, int]) -> str:
    """The first problem in its own words, and how many examples are lost for which reason."""
    reasons = {**dataset.reasons, **left_out}
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "it has none"
    first = next((problem for problem in dataset.problems if problem.severity == "error"), None)
    # Where media were found it is not the first problem that left none of them.
    return f"{first} ({counts})" if first is not None and not dataset.examples else counts


def _select_askable(
    processor: MirasolProcessor, examples: Sequence[Example], settings: AnswerSettings
) -> tuple[list[Example], Counter[str]]:
    """The examples that can be asked, and how many cannot, by reason: the prompt with its longest candidate exceeds
    the model's text length, or the medium is a still image."""

    def count_tokens(texts: Sequence[str]) -> int:
        return max(map(len, processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]))

    lengths: dict[tuple[str, ...], int] = {(): 0}
    askable: list[Example] = []
    left_out: Counter[str] = Counter()
    for example in examples:
        if is_image(example.media):
            left_out["still image"] += 1
            continue
        candidates = settings.candidates(example)
        if candidates not in lengths:
            lengths[candidates] = count_tokens(candidates) + 1  # <eos>
        total = count_tokens([example.prompt]) + 2 + lengths[candidates]  # <bos>, <sep>
        if total <= processor.max_text_length:
            askable.append(example)
        else:
            left_out["text too long"] += 1
    return askable, left_out


def _score_rows(
    dataset: DatasetSplit,
    settings: AnswerSettings,
    clips: Sequence[ClipExamples],
    rows: Sequence[ClipRow],
    record: dict[str, Any],
    left_out: Mapping[str, int],
    wups: Wups | None,
    known: Sequence[Example],
) -> Evaluation:
    """The evaluation that the answered rows amount to."""
    examples, unusable, chunks = _split_usable(clips, rows)
    places = {example.id: place for place, example in enumerate(dataset.annotated)}
    examples.sort(key=lambda example: places[example.id])
    predictions = {name: _collect_predictions(rows, name) for name in (UNTOUCHED, *settings.controls)}
    scores = {name: _score_protocols(dataset, examples, own, wups, known) for name, own in predictions.items()}
    counts = _count_examples(dataset, examples, unusable, left_out)
    protocols = scores.pop(UNTOUCHED)
    controls = {protocol: {name: by[protocol] for name, by in scores.items()} for protocol in protocols}
    judged = {UNTOUCHED: protocols[OPEN].judged} | {name: by.judged for name, by in controls[OPEN].items()}
    record = {
        **record,
        "counts": counts,
        "calibration": _measure_calibration(judged, predictions)
        | summarise_surprise([row["surprise"] for row in rows if row.get("surprise") is not None]),
        "protocols": {
            name: {
                "how": HOW[name],
                **one.to_dict(),
                "headline_over_annotated": _compute_headline_over_annotated(one, counts["n_annotated"]),
                "controls": {key: control.to_dict()["metrics"] for key, control in controls[name].items()},
            }
            for name, one in protocols.items()
        },
        "unusable_clips": unusable,
    }
    return Evaluation(dataset, protocols, controls, tuple(examples), predictions[UNTOUCHED], chunks, record)


def _measure_calibration(
    judged: Mapping[str, Sequence[JudgedAnswer]], predictions: Mapping[str, Mapping[str, Prediction]]
) -> dict[str, Any]:
    """Calibration of the answers as they are, and under the controls that remove something (`judged` by control)."""
    found = {
        name: [JudgedProbability(predictions[name][item.example.id].probability, item.right) for item in items]
        for name, items in judged.items()
        if name in (UNTOUCHED, *REMOVING_CONTROLS)
    }
    return measure_calibration(found.pop(UNTOUCHED), found)


def _split_usable(
    clips: Sequence[ClipExamples], rows: Sequence[ClipRow]
) -> tuple[list[Example], list[dict[str, Any]], dict[str, int]]:
    """The examples that were asked, the clips that could not be read, and the chunks of each question's clip."""
    by_clip = {tuple(row["clip"]): row for row in rows}
    examples: list[Example] = []
    unusable, chunks = [], {}
    for clip in clips:
        row = by_clip[tuple(make_clip_key(clip))]
        if "reason" in row:
            window = {"media": clip.media, "start": clip.start, "end": clip.end}
            unusable.append({**window, "reason": row["reason"], "questions": len(clip.examples)})
        else:
            examples += clip.examples
            chunks |= {example.id: row["chunks"] for example in clip.examples}
    return examples, unusable, chunks


def _collect_predictions(rows: Sequence[ClipRow], name: str) -> dict[str, Prediction]:
    """Predictions by question id, of the clips as they are or under a control."""
    predictions = {}
    for row in rows:
        for id, answer in row.get("answered", {}).get(name, {}).items():
            scores = answer.get("scores")
            choice = max(range(len(scores)), key=scores.__getitem__) if scores else None
            predictions[id] = Prediction(
                answer["answer"],
                choice,
                _compute_log_softmax(scores) if scores else None,
                answer["probability"],
            )
    return predictions


def _compute_log_softmax(scores: Sequence[float]) -> tuple[float, ...]:
    highest = max(scores)
    total = highest + math.log(math.fsum(math.exp(score - highest) for score in scores))
    return tuple(score - total for score in scores)


def _score_protocols(
    dataset: DatasetSplit,
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    wups: Wups | None,
    known: Sequence[Example],
) -> dict[str, ProtocolScores]:
    """Scores by protocol; candidate scoring where every question has candidates and some answer is published."""
    form = find_normalisation(dataset.name)
    scores = {OPEN: score_answers(dataset.name, examples, predictions, form, known=known)}
    if wups is not None:
        scores[WUPS] = score_wups(dataset.name, examples, predictions, wups)
    if select_answered(examples) and all(predictions[example.id].scores is not None for example in examples):
        scores[CANDIDATES] = score_choices(dataset.name, examples, predictions, dataset.classes, known=known)
    return scores


def _compute_headline_over_annotated(scores: ProtocolScores, annotated: int) -> float | None:
    """The headline with every annotated example that was not asked counted as wrong; None where it is not a mean."""
    headline = scores.metrics.get(scores.headline)
    if headline is None or headline.value is None or scores.headline == "mAP":
        return None
    return headline.value * headline.n / annotated


def _count_examples(
    dataset: DatasetSplit, usable: Sequence[Example], unusable: Sequence[Mapping[str, Any]], left_out: Mapping[str, int]
) -> dict[str, Any]:
    reasons = Counter(dataset.reasons)
    reasons.update(left_out)
    reasons["unreadable clip"] += sum(clip["questions"] for clip in unusable)
    reasons["no published answer"] += sum(not example.target for example in usable)
    return {
        "n_annotated": dataset.counts.n_annotated,
        "n_found": dataset.counts.n_found,
        "n_usable": len(usable),
        "n_evaluated": sum(bool(example.target) for example in usable),
        "reasons": {reason: count for reason, count in reasons.items() if count},
    }


def hash_checkpoint(folder: Path) -> str:
    """Hash of the names and contents of a checkpoint's files, in hexadecimal; of all that answers depend on."""
    digest = hashlib.sha256()
    files = (path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    for file in sorted(path for path in files if path.name != CALIBRATION):
        digest.update(file.name.encode() + b"\n")
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_evaluation(folder: Path, evaluation: Evaluation) -> list[str]:
    """Writes predictions, the data set's official format where it has one, and last results.json; returns the names.

    The journal stays until everything is written (`Journal.end`), so that an interruption before that can be resumed.
    """
    written = []
    for protocol, scores in evaluation.protocols.items():
        judged = {item.example.id: item for item in scores.judged}
        rows = [
            _make_prediction_line(example, evaluation.predictions[example.id], judged.get(example.id), protocol)
            for example in evaluation.examples
        ]
        written.append(PREDICTION_FILES[protocol])
        _write_lines(folder / written[-1], rows)
    official = format_official_predictions(evaluation.dataset.name, evaluation.examples, evaluation.predictions)
    if official is not None:
        written.append(official[0])
        write_file_atomically(folder / official[0], json.dumps(official[1], ensure_ascii=False) + "\n")
    write_file_atomically(folder / RESULTS, json.dumps(evaluation.record, indent=1) + "\n")
    return [*written, RESULTS]


def _make_prediction_line(
    example: Example, prediction: Prediction, judged: JudgedAnswer | None, protocol: str
) -> dict[str, Any]:
    line = {
        "id": example.id,
        "video": example.video_name,
        "question_type": example.question_type,
        "prompt": example.prompt,
        "target": example.target,
    }
    if protocol == CANDIDATES:
        line |= {"prediction": prediction.choice, "scores": prediction.scores}
    else:
        line |= {"answer": prediction.answer, "probability": prediction.probability}
    value = {"value": judged.value} if protocol == WUPS and judged is not None else {}
    return {**line, "right": None if judged is None else judged.right, **value}


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_file_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def score_file(
    dataset: DatasetSplit,
    predictions: Path,
    normalisation: str = "none",
    wups: Wups | None = None,
    seed: int = 0,
    known: Sequence[Example] = (),
) -> ProtocolScores:
    """Scores a file of predictions (`read_predictions`) of a split, over all its annotated examples.

    Choices and candidate scores are scored as such; texts by exact match, or by WUPS where `wups` is given. `known` are
    examples of the training split, for baselines. Problems, such as questions without prediction, are part of the
    scores.

    Raises:
        UserError: an unknown normalisation, or one given where no texts are compared; unreadable predictions; a split
            without published answers.
    """
    if normalisation not in NORMALISATIONS:
        raise UserError(f"normalisation {normalisation!r} unknown: choose {', '.join(NORMALISATIONS)}")
    found = read_predictions(predictions, dataset.name, dataset.annotated)
    if not any(example.target for example in dataset.annotated):
        raise UserError(f"{dataset.name} {dataset.split}: has no published answers, so it cannot be scored here")
    chosen = any(prediction.choice is not None or prediction.scores is not None for prediction in found.values())
    _check_fits(dataset, predictions, chosen, normalisation, wups)
    if chosen:
        scores = score_choices(dataset.name, dataset.annotated, found, dataset.classes, seed, known)
    elif wups is not None:
        scores = score_wups(dataset.name, dataset.annotated, found, wups, seed)
    else:
        scores = score_answers(dataset.name, dataset.annotated, found, normalisation, seed, known)
    errors = [
        problem for problem in dataset.problems if problem.kind != "missing media" and problem.severity == "error"
    ]
    problems = [*errors, *find_unmatched(found, dataset.annotated, str(predictions))]
    ids = {example.id for example in dataset.annotated}
    counts = {
        "n_annotated": len(dataset.annotated),
        "n_evaluated": len(scores.judged),
        "n_predicted": len(ids & found.keys()),
        "n_missing": len(ids - found.keys()),
        "n_unknown": len(found.keys() - ids),
    }
    facts = {
        **scores.facts,
        "predictions": {"file": Path(predictions).name, "sha256": hash_file(Path(predictions))},
        "counts": counts,
        "problems": [problem.to_dict() for problem in problems],
    }
    return dataclasses.replace(scores, problems=tuple(problems), facts=facts)


def _check_fits(dataset: DatasetSplit, predictions: Path, chosen: bool, normalisation: str, wups: Wups | None) -> None:
    """Raises UserError for options without meaning for predictions that are choices (`chosen`), or that are texts."""
    if normalisation != "none" and (chosen or wups is not None):
        what = "choices or scores" if chosen else "WUPS"
        raise UserError(f"normalisation {normalisation!r} has no effect on {what}: leave --normalisation out")
    if chosen and wups is not None:
        raise UserError(f"{predictions}: has choices or scores, but WUPS compares texts: leave --wordnet out")
    if chosen and not dataset.classes and not all(example.candidates for example in dataset.annotated):
        raise UserError(f"{predictions}: has choices or scores, but {dataset.name} is open: give `answer` texts")


def collect_package_versions() -> dict[str, str | None]:
    """Versions of everything that computes a result; None for a package that is not installed."""
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
    """The part of results.json on the data. Its hash covers all annotated examples and the media found, with
    `media_contents` their contents too.

    Where all examples share one prompt (data sets without questions), it is stated.
    """
    media = (example.media for example in dataset.examples)
    prompts = {example.prompt for example in dataset.annotated}
    return {
        "source": dataset.name,
        "split": dataset.split,
        "data": {
            "sha256": digest_examples(dataset.root, dataset.annotated, media, media_contents).sha256,
            "sha256_of_media": "contents" if media_contents else "paths and sizes",
            "annotation_files": list(dataset.annotation_files),
            "published_examples": dataset.published.examples,
            **dataset.facts,
            **({"prompt": prompts.pop()} if len(prompts) == 1 else {}),
        },
    }


def write_scores(folder: Path, dataset: DatasetSplit, scores: ProtocolScores, train_baselines: str = "none") -> None:
    """Writes results.json and predictions.jsonl of scored predictions into a folder.

    `train_baselines`: origin of the examples that baselines guess from, see `read_training_examples`.
    """
    record = {
        **describe_data(dataset),
        "protocols": {scores.protocol: scores.to_dict()},
        "train_baselines": train_baselines,
        "versions": collect_package_versions(),
    }
    rows = [item.to_dict() | ({"value": item.value} if scores.protocol == WUPS else {}) for item in scores.judged]
    _write_lines(folder / PREDICTION_FILES[OPEN], rows)
    write_file_atomically(folder / RESULTS, json.dumps(record, indent=1) + "\n")
