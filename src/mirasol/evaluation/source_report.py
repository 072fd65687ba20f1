"""The report of a checkpoint on a data set: one HTML file without any request to the network."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirasol.checkpoint import Loaded
from mirasol.errors import BadClip
from mirasol.evaluation.charts import heat, png_url
from mirasol.evaluation.evaluate import DecodedClips
from mirasol.evaluation.intervals import mean_intervals
from mirasol.evaluation.scoring import CANDIDATES, Judged, Scored
from mirasol.evaluation.source_evaluation import Evaluated
from mirasol.files import write_whole
from mirasol.media.timeline import ChunkGrid

SHOWN = 6  # right examples, and as many wrong ones
BINS = 5
CONFUSIONS = 15
LARGEST_MATRIX = 600  # classes; a larger picture shows nothing
LARGEST_TABLE = 45  # classes whose names find room beside the matrix
MOST_UNUSABLE = 20


def write_report(file: Path, loaded: Loaded, evaluated: Evaluated) -> None:
    """Writes the report; the clips of the examples shown are decoded once more for their frames."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mirasol.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.1f}"
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    extractor = loaded.processor.feature_extractor
    clips = DecodedClips(extractor, evaluated.dataset.root)
    record = {key: value for key, value in evaluated.record.items() if key not in ("protocols", "unusable_clips")}
    page = environment.get_template("source_report.html.jinja").render(
        record=evaluated.record,
        facts=json.dumps(record, indent=1),
        unusable=evaluated.record["unusable_clips"][:MOST_UNUSABLE],
        more_unusable=max(0, len(evaluated.record["unusable_clips"]) - MOST_UNUSABLE),
        protocols=[
            _protocol(evaluated, name, scored, clips, extractor.grid) for name, scored in evaluated.protocols.items()
        ],
    )
    # Names of files on disk need not be UTF-8.
    write_whole(file, page.encode("utf-8", "replace").decode("utf-8"))


def _protocol(evaluated: Evaluated, name: str, scored: Scored, clips: DecodedClips, grid: ChunkGrid) -> dict[str, Any]:
    right = [item for item in scored.judged if item.right]
    wrong = [item for item in scored.judged if not item.right]
    return {
        "name": name,
        "how": evaluated.record["protocols"][name]["how"],
        "normalisation": scored.normalisation,
        "headline": scored.headline,
        "value": scored.metrics[scored.headline],
        "over_annotated": evaluated.record["protocols"][name]["headline_over_annotated"],
        "metrics": scored.metrics,
        "baselines": scored.baselines,
        "controls": {key: control.metrics[scored.headline] for key, control in evaluated.controls[name].items()},
        "by_control": by_control(scored, evaluated.controls[name]),
        "lengths": [
            {**one, "label": length_label(one["shortest"], one["longest"], grid)}
            for one in accuracy_by_length(scored.judged, evaluated.chunks)
        ],
        "confusions": most_confused(scored.judged),
        "table": confusion_table(scored.judged, evaluated.dataset.classes) if name == CANDIDATES else None,
        "matrix": confusion_picture(scored.judged, evaluated.dataset.classes) if name == CANDIDATES else None,
        "right": [_example(item, clips) for item in _spread(right)],
        "wrong": [_example(item, clips) for item in _spread(wrong)],
        "right_count": len(right),
        "wrong_count": len(wrong),
    }


def by_control(scored: Scored, controls: Mapping[str, Scored]) -> list[dict[str, Any]]:
    """One row for each number of the table: its value as asked, and under each control; None where nothing defines it.

    Nothing without controls, and of a table that has no more than its headline.
    """
    if not controls or len(scored.metrics) == 1:
        return []
    return [
        {"name": name, "values": [estimate.value, *(control.metrics[name].value for control in controls.values())]}
        for name, estimate in scored.metrics.items()
        if estimate.value is not None and estimate.value <= 1 and name != "d-prime"
    ]


def accuracy_by_length(judged: Sequence[Judged], chunks: dict[str, int]) -> list[dict[str, Any]]:
    """Accuracy of up to five bins of about equally many questions, by the number of chunks of their clips; with 95 %
    intervals over videos."""
    lengths = np.array([chunks[item.example.id] for item in judged])
    if not len(lengths):
        return []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BINS + 1), method="lower"))
    bins = np.searchsorted(edges[1:-1], lengths, side="right")
    values = np.array([item.value for item in judged])
    chosen = bins[:, None] == np.unique(bins)
    intervals = mean_intervals(values, [item.example.video_name for item in judged], chosen)
    return [
        {
            "shortest": int(lengths[inside].min()),
            "longest": int(lengths[inside].max()),
            "value": float(values[inside].mean()),
            "low": interval.low,
            "high": interval.high,
            "n": int(inside.sum()),
        }
        for inside, interval in zip(chosen.T, intervals, strict=True)
    ]


def length_label(shortest: int, longest: int, grid: ChunkGrid) -> str:
    """Chunks in words, and seconds where chunks have a length; clips of `max_chunks` chunks may be longer."""
    numbers = [shortest] if shortest == longest else [shortest, longest]
    chunks = f"{' to '.join(map(str, numbers))} chunk{'s' if longest > 1 else ''}"
    if grid.chunk_seconds is None:
        return chunks
    seconds = " to ".join(f"{number * grid.chunk_seconds:g}" for number in numbers)
    return f"{seconds} s{' or more' if longest == grid.max_chunks else ''} ({chunks})"


def most_confused(judged: Sequence[Judged]) -> list[tuple[str, str, int]]:
    """(target, what was answered, how often) of the most frequent wrong answers; ties in alphabetical order."""
    wrong = Counter((item.example.target, item.predicted or "") for item in judged if not item.right)
    ranked = sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:CONFUSIONS]
    return [(*pair, count) for pair, count in ranked]


def _confusion(judged: Sequence[Judged], classes: Sequence[str]) -> np.ndarray | None:
    """How many clips of each class (row) were given each class (column); None where there are none."""
    place = {name: index for index, name in enumerate(classes)}
    pairs = [(place.get(item.example.target), place.get(item.predicted or "")) for item in judged]
    known = [(target, said) for target, said in pairs if target is not None and said is not None]
    if not known:
        return None
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, tuple(np.array(known).T), 1)
    return counts


def confusion_table(judged: Sequence[Judged], classes: Sequence[str]) -> list[dict[str, Any]] | None:
    """The confusion of classes with their names, of those that occur; None where they are too many for a table."""
    counts = _confusion(judged, classes)
    if counts is None:
        return None
    there = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    if len(there) > LARGEST_TABLE:
        return None
    rows = []
    for row in there:
        total = max(int(counts[row].sum()), 1)
        cells = [{"count": int(counts[row, column]), "share": counts[row, column] / total, "said": classes[column],
                  "right": row == column} for column in there]  # fmt: skip
        rows.append({"name": classes[row], "cells": cells, "n": int(counts[row].sum())})
    return rows


def confusion_picture(judged: Sequence[Judged], classes: Sequence[str]) -> str | None:
    """A pixel for every pair of classes: the share of a row's clips (target) that were given a column's class."""
    counts = _confusion(judged, classes) if len(classes) <= LARGEST_MATRIX else None
    if counts is None:
        return None
    return png_url(heat(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)))


def _spread(items: Sequence[Judged]) -> list[Judged]:
    """A few of all, evenly spaced, at most one of a video as far as there are enough."""
    by_video = {item.example.video_name: item for item in reversed(items)}
    chosen = list(reversed(by_video.values()))
    if len(chosen) <= SHOWN:
        return chosen
    return [chosen[(2 * place + 1) * len(chosen) // (2 * SHOWN)] for place in range(SHOWN)]


def _example(item: Judged, clips: DecodedClips) -> dict[str, Any]:
    example = item.example
    return {
        "prompt": example.prompt,
        "target": example.target,
        "answer": item.predicted or "",
        "right": item.right,
        "type": example.question_type,
        "media": example.media,
        "frames": _frames(clips, example.media, example.start, example.end),
    }


def _frames(clips: DecodedClips, media: str, start: float | None, end: float | None, count: int = 4) -> str | None:
    """Middle frames of a few chunks side by side; None of a clip without video, or that is gone by now."""
    try:
        tensors = clips.load(media, start, end)
    except BadClip:
        return None
    if not tensors["video_mask"].any():
        return None
    video = tensors["video"]
    chosen = np.unique(np.linspace(0, len(video) - 1, count).round().astype(int))
    frames = [video[int(place), video.shape[1] // 2].permute(1, 2, 0).numpy() for place in chosen]
    return png_url(np.ascontiguousarray(np.concatenate(frames, axis=1)))
