"""Predictions in files: the official formats of the data sets, and one line per question for all of them."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mirasol.data.datasets.contract import Problem
from mirasol.data.datasets.tables import is_utf8, parse_annotation_json, raise_if_not_utf8, read_text
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.json_values import InvalidJson, parse_json

# Head of a submission to EPIC-SOUNDS' challenge. The submitter states the levels of supervision (pre-training, labels,
# data); t_mod 2: trained on sound and sight.
CHALLENGE = {
    "version": "0.1",
    "challenge": "audio_based_interaction_recognition",
    "sls_pt": None,
    "sls_tl": None,
    "sls_td": None,
    "t_mod": 2,
}

# How an answer without text is shown to a reader.
EMPTY_ANSWER = "(empty answer)"
NO_ANSWER = "(no answer)"
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Prediction:
    """The prediction for one question: a text, the index of a candidate, or a score for every candidate.

    probability: of the text, where a model gave it (`mirasol.evaluation.answer.Answer`)
    """

    answer: str | None = None
    choice: int | None = None
    scores: tuple[float, ...] | None = None
    probability: float | None = None


def read_predictions(path: Path, dataset: str, examples: Sequence[Example]) -> dict[str, Prediction]:
    """Reads the predictions of a file, by question id.

    json: the data set's official format (ActivityNet-QA: a list of {question_id, answer}; NExT-QA: an object by
    `{video}_{qid}` of {prediction}, or by video and qid of texts; EPIC-SOUNDS: the challenge's `results` by
    annotation_id of scores by class_id), or for any data set a list of objects with `id` and
    `answer`, `prediction` or `scores`. jsonl: such objects, one a line. npy: scores [example, class] in the order of
    the annotation.

    Raises:
        UserError: an unreadable file, another format, a question predicted twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions")
    if path.suffix == ".npy":
        return _read_matrix(path, examples)
    text = read_text(path)
    raise_if_not_utf8(text, str(path))
    if path.suffix == ".jsonl":
        # By line feeds alone: texts from the web contain other characters that `splitlines` takes for ends of lines.
        lines = enumerate(text.split("\n"), start=1)
        items: Any = [parse_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    else:
        items = parse_annotation_json(text, str(path), lambda pairs: _build_object(pairs, path))
    found: dict[str, Prediction] = {}
    for id, value, place in _iterate_entries(items, path):
        if id in found:
            raise UserError(f"{path}, {place}: question {id!r} is predicted twice: keep one of the two")
        found[id] = _parse_prediction(value, f"{path}, {place}")
    return found


def _build_object(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """A JSON object. A key that appears twice, which would silently lose one value, raises UserError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{path}: {twice!r} appears twice in one object: keep one of the two")
    return found


def parse_line(text: str, place: str) -> Any:
    """One line of jsonl. Raises UserError, which names the place, where it is not JSON."""
    try:
        return parse_json(text)
    except InvalidJson as error:
        column = f", column {error.column}" if error.column is not None else ""
        raise UserError(f"{place}{column}: is not JSON ({error.reason})") from error


def _iterate_entries(items: Any, path: Path) -> Iterable[tuple[str, Any, str]]:
    """(id, value, place in the file) of each prediction."""
    if isinstance(items, list):
        for place, item in enumerate(items, start=1):
            id = item.get("id", item.get("question_id")) if isinstance(item, dict) else None
            if not isinstance(id, str | int) or isinstance(id, bool):
                raise UserError(f"{path}, entry {place}: expected an object with `id` or `question_id`: {item!r:.80}")
            yield str(id), item, f"entry {place}"
    elif isinstance(items, dict) and isinstance(items.get("results"), dict):
        for key, value in items["results"].items():
            yield key, {"scores": _parse_interaction(value, f"{path}, annotation {key}")}, f"annotation {key}"
    elif isinstance(items, dict):
        for key, value in items.items():
            if isinstance(value, dict) and "prediction" not in value:
                for qid, answer in value.items():
                    yield f"{key}_{qid}", answer, f"video {key}, question {qid}"
            else:
                yield key, value, f"question {key}"
    else:
        raise UserError(f"{path}: expected a list or an object of predictions, found {type(items).__name__}")


def _parse_interaction(value: Any, place: str) -> list[Any]:
    """The scores of an entry of EPIC-SOUNDS' challenge: {"interaction": {"0": 1.2, "1": …}}."""
    by_class = value.get("interaction") if isinstance(value, dict) else None
    if not isinstance(by_class, dict) or by_class.keys() != {str(index) for index in range(len(by_class))}:
        raise UserError(f"{place}: expected `interaction` with a score for every class_id, 0 and following")
    return [by_class[str(index)] for index in range(len(by_class))]


def _parse_prediction(value: Any, place: str) -> Prediction:
    if not isinstance(value, dict):
        value = {"answer": value}
    answer, choice, scores = value.get("answer"), value.get("prediction"), value.get("scores")
    if scores is not None:
        if not isinstance(scores, list) or not all(_is_number(score) for score in scores):
            raise UserError(f"{place}: `scores` must be a list of finite numbers, one for each class")
        return Prediction(answer if isinstance(answer, str) else None, choice, tuple(map(float, scores)))
    if choice is not None:
        if not isinstance(choice, int) or isinstance(choice, bool):
            raise UserError(f"{place}: `prediction` must be the index of an option, found {choice!r:.80}")
        return Prediction(choice=choice)
    if not isinstance(answer, str) or not is_utf8(answer):
        raise UserError(f"{place}: expected a text as `answer`, found {answer!r:.80}")
    return Prediction(answer)


def _is_number(value: Any) -> bool:
    # An integer of hundreds of digits is too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _read_matrix(path: Path, examples: Sequence[Example]) -> dict[str, Prediction]:
    wrong = f"{path}: not an array of numbers as written by numpy.save"
    try:
        scores = np.load(path, allow_pickle=False)
    # A corrupt header may claim any size, is parsed as Python, or makes the file an archive.
    except (ValueError, OSError, EOFError, MemoryError, SyntaxError, TokenError, BadZipFile) as error:
        raise UserError(wrong) from error
    if not isinstance(scores, np.ndarray):  # an archive of several
        raise UserError(wrong)
    if scores.dtype.kind not in "iuf":
        raise UserError(f"{path}: expected real numbers, found {scores.dtype}")
    if scores.ndim != 2 or len(scores) != len(examples) or not np.isfinite(scores).all():
        raise UserError(
            f"{path}: expected finite scores [{len(examples)}, classes], a row for each annotated example; "
            f"found shape {list(scores.shape)}"
        )
    return {example.id: Prediction(scores=tuple(row)) for example, row in zip(examples, scores.tolist(), strict=True)}


def find_unmatched(predictions: Mapping[str, Prediction], examples: Iterable[Example], path: str) -> list[Problem]:
    """Problems of predictions that do not match the questions one to one: missing ones count as wrong (official
    denominators are all annotated questions), those of unknown questions are ignored."""
    ids = [example.id for example in examples]
    unknown, missing = sorted(predictions.keys() - set(ids)), [id for id in ids if id not in predictions]
    problems = []
    if missing:
        message = f"{len(missing)} questions have no prediction and count as wrong, the first: {missing[0]!r}"
        problems.append(Problem("missing prediction", message, path, examples=len(missing)))
    if unknown:
        message = f"{len(unknown)} predictions of unknown questions are ignored, the first: {unknown[0]!r}"
        problems.append(Problem("unknown question", message, path, examples=len(unknown)))
    return problems


def format_official_predictions(
    dataset: str, examples: Sequence[Example], predictions: Mapping[str, Prediction]
) -> tuple[str, Any] | None:
    """Name and content of the file that the data set's official script reads; None where it has none."""
    pairs = [(example, predictions[example.id]) for example in examples if example.id in predictions]
    if dataset == "activitynet_qa":
        return "predictions.official.json", [{"question_id": e.id, "answer": p.answer or ""} for e, p in pairs]
    if dataset == "nextqa_mc":
        return "predictions.official.json", {
            e.id: {"prediction": p.choice, "answer": e.answer_index} for e, p in pairs if p.choice is not None
        }
    if dataset == "nextqa_oe":
        by_video: dict[str, dict[str, str]] = {}
        for example, prediction in pairs:
            qid = example.id.removeprefix(f"{example.video}_")
            by_video.setdefault(example.video, {})[qid] = prediction.answer or ""
        return "predictions.official.json", by_video
    scored = {e.id: p.scores for e, p in pairs if p.scores is not None}
    if dataset == "epic_sounds" and scored:
        results = {
            id: {"interaction": {str(index): score for index, score in enumerate(scores)}}
            for id, scores in scored.items()
        }
        return "predictions.official.json", {**CHALLENGE, "results": results}
    return None
