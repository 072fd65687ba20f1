"""The report of a checkpoint on a data set: one HTML file without any request to the network."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirasol.checkpoint import Loaded
from mirasol.errors import BadClip
from mirasol.evaluation.charts import heat, png_url
from mirasol.evaluation.evaluate import DecodedClips
from mirasol.evaluation.scoring import CANDIDATES, Judged, Scored
from mirasol.evaluation.source_evaluation import Evaluated
from mirasol.files import write_whole

SHOWN = 6  # right examples, and as many wrong ones
BINS = 5
CONFUSIONS = 15
LARGEST_MATRIX = 600  # classes; a larger picture shows nothing


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
    clips = DecodedClips(loaded.processor.feature_extractor, evaluated.source.root)
    record = {key: value for key, value in evaluated.record.items() if key not in ("protocols", "unusable_clips")}
    page = environment.get_template("source_report.html.jinja").render(
        record=evaluated.record,
        facts=json.dumps(record, indent=1),
        protocols=[_protocol(evaluated, name, scored, clips) for name, scored in evaluated.protocols.items()],
    )
    write_whole(file, page)


def _protocol(evaluated: Evaluated, name: str, scored: Scored, clips: DecodedClips) -> dict[str, Any]:
    right = [item for item in scored.judged if item.right]
    wrong = [item for item in scored.judged if not item.right]
    return {
        "name": name,
        "how": evaluated.record["protocols"][name]["how"],
        "normalisation": scored.normalisation,
        "headline": scored.headline,
        "metrics": scored.metrics,
        "baselines": scored.baselines,
        "controls": {key: control.metrics[scored.headline] for key, control in evaluated.controls[name].items()},
        "lengths": accuracy_by_length(scored.judged, evaluated.chunks),
        "confusions": most_confused(scored.judged),
        "matrix": confusion_picture(scored.judged, evaluated.source.classes) if name == CANDIDATES else None,
        "examples": [_example(item, clips) for group in (right, wrong) for item in _spread(group)],
    }


def accuracy_by_length(judged: Sequence[Judged], chunks: dict[str, int]) -> list[dict[str, Any]]:
    """Accuracy of up to five bins of about equally many questions, by the number of chunks of their clips."""
    lengths = np.array([chunks[item.example.id] for item in judged])
    if not len(lengths):
        return []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BINS + 1), method="lower"))
    bins = np.searchsorted(edges[1:-1], lengths, side="right")
    values = np.array([item.value for item in judged])
    return [
        {
            "low": int(lengths[bins == place].min()),
            "high": int(lengths[bins == place].max()),
            "value": float(values[bins == place].mean()),
            "n": int((bins == place).sum()),
        }
        for place in np.unique(bins)
    ]


def most_confused(judged: Sequence[Judged]) -> list[tuple[str, str, int]]:
    """(target, what was answered, how often) of the most frequent wrong answers; ties in alphabetical order."""
    wrong = Counter((item.example.target, item.predicted or "") for item in judged if not item.right)
    ranked = sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:CONFUSIONS]
    return [(*pair, count) for pair, count in ranked]


def confusion_picture(judged: Sequence[Judged], classes: Sequence[str]) -> str | None:
    """A pixel for every pair of classes: the share of a row's clips (target) that were given a column's class."""
    place = {name: index for index, name in enumerate(classes)}
    pairs = [(place.get(item.example.target), place.get(item.predicted or "")) for item in judged]
    known = [(target, said) for target, said in pairs if target is not None and said is not None]
    if not known or len(classes) > LARGEST_MATRIX:
        return None
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, tuple(np.array(known).T), 1)
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
