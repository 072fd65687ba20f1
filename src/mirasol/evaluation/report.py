"""The report: one self-contained HTML page that shows how a run went and what the model does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from mirasol.evaluation.charts import Frame, Line, heat, line_chart, png_url, smoothed
from mirasol.evaluation.exhibit import Exhibit
from mirasol.evaluation.metrics import Answered, Score, UnusableClip

LOSSES = (
    ("text_loss", "Text", "cross-entropy of the target tokens, nats"),
    ("latent_loss", "Latent", "distance to the next chunk's features"),
    ("video_loss", "Video", "distance to the pixels of a chunk"),
    ("audio_loss", "Audio", "distance to the spectrogram of a chunk"),
)
CONTROL_TITLES = {
    "no_video": "no video",
    "no_audio": "no audio",
    "no_media": "neither",
    "shifted_audio": "audio shifted",
}
# Shown first and in this order; types that a data set adds follow.
TYPE_ORDER = ("sight", "hearing", "bound", "order", "count", "range")
TYPE_MEANING = {
    "sight": "what is seen",
    "hearing": "what is heard",
    "bound": "sight and sound at one time",
    "order": "what comes after, before",
    "count": "how many",
    "range": "first against last",
}


@dataclass(frozen=True)
class ReportData:
    """What the report is made of.

    metrics: what metrics.json holds; blind: score of the best guess without any clip (`metrics.blind`); log: the lines
    of the run's metrics.jsonl; answered: the answers on the test clips; clips: numbers of clips by split;
    surroundings: the run's run.json; recipe: `Recipe.to_dict`.
    """

    metrics: Mapping[str, Any]
    blind: Score
    log: Sequence[Mapping[str, Any]]
    answered: Sequence[Answered]
    exhibit: Exhibit
    clips: Mapping[str, int]
    unusable: Sequence[UnusableClip]
    surroundings: Mapping[str, Any]
    recipe: Mapping[str, Any]


def render_report(data: ReportData) -> str:
    """The whole page as HTML; needs no other file and no network."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mirasol.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.0f}"
    environment.filters["clock"] = _clock
    types = ordered_types(data.metrics["test"]["by_type"])
    return environment.get_template("report.html.jinja").render(
        metrics=data.metrics,
        types=types,
        meaning=TYPE_MEANING,
        styles=type_styles(data, types),
        columns=score_columns(data.metrics, data.blind),
        controls=[(key, CONTROL_TITLES.get(key, key)) for key in data.metrics["controls"]],
        losses=loss_charts(data.log),
        learning=learning_chart(data.log, type_styles(data, types)),
        exhibit=exhibit_view(data.exhibit),
        samples=sample_answers(data.answered, types),
        clips=data.clips,
        unusable=data.unusable,
        steps=max((row["step"] for row in data.log), default=0),
        surroundings=data.surroundings,
        recipe=data.recipe,
    )


def ordered_types(names: Mapping[str, Any]) -> list[str]:
    """Question types in the order of the page."""
    known = [name for name in TYPE_ORDER if name in names]
    return known + sorted(set(names) - set(known))


def type_styles(data: ReportData, types: Sequence[str]) -> dict[str, str]:
    """CSS class by question type: a colour each, the same all over the page; training-only types come after."""
    validated = {name for row in data.log if row["kind"] == "validation" for name in _by_type(row)}
    names = [*types, *sorted(validated - set(types))]
    return {name: f"c{place % 8}" for place, name in enumerate(names)}


def score_columns(metrics: Mapping[str, Any], blind: Score) -> list[tuple[str, Mapping[str, Any]]]:
    """Columns of the table of scores: (heading, score)."""
    columns = [("test", metrics["test"]), ("chance", metrics["chance"]), ("best blind guess", blind.to_dict())]
    columns += [(CONTROL_TITLES.get(name, name), score) for name, score in metrics["controls"].items()]
    if metrics["shipped"]:
        columns.append(("shipped weights", metrics["shipped"]["test"]))
    return columns


def _by_type(row: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by type of a validation line, whole clips and segments together."""
    parts = [row[part] for part in ("segment", "clip") if part in row]
    return {name: values["accuracy"] for part in parts for name, values in part["by_type"].items()}


def stage_marks(log: Sequence[Mapping[str, Any]]) -> dict[float, str]:
    """First logged step of each stage and the stage's name."""
    train = [row for row in log if row["kind"] == "train"]
    return {next(rows)["step"]: stage for stage, rows in groupby(train, key=lambda row: row["stage"])}


def loss_charts(log: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One chart per loss: every logged value thin, their running mean strong; validation as a line of its own."""
    train = [row for row in log if row["kind"] == "train"]
    charts = []
    for key, title, unit in LOSSES:
        if key == "audio_loss" and not any(key in row for row in train):
            continue
        points = [(row["step"], row[key]) for row in train]
        validation = [(row["step"], row["clip"][key]) for row in log if row["kind"] == "validation" and "clip" in row]
        # The first steps are far above the rest: the axis is made for what comes after them.
        values = sorted(value for _, value in points)
        high = values[int(0.97 * (len(values) - 1))] * 1.1 if values else 1.0
        lines = [
            Line(f"{title} loss", points, "faint"),
            Line("running mean", smoothed(points), "strong"),
            Line("validation, whole clips", validation, "dashed"),
        ]
        chart = line_chart(lines, Frame(360, 220), y_range=(0, high or 1.0), marks=stage_marks(log))
        last = smoothed(points)[-1][1] if points else float("nan")
        charts.append({"title": title, "unit": unit, "svg": chart, "last": f"{last:.3f}"})
    return charts


def learning_chart(log: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> str:
    """Validation accuracy of every question type over training."""
    rows = [row for row in log if row["kind"] == "validation"]
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in styles}
    for row in rows:
        for name, accuracy in _by_type(row).items():
            curves[name].append((row["step"], accuracy))
    lines = [Line(name, points, styles[name]) for name, points in curves.items() if points]
    frame = Frame(1040, 340, right=130)
    return line_chart(lines, frame, y_range=(0, 1), percent=True, marks=stage_marks(log), direct_labels=True)


def exhibit_view(exhibit: Exhibit) -> dict[str, Any]:
    """Pictures and strips of the clip looked at closely, one column per chunk."""
    chunks = len(exhibit.edges) - 1
    seen = [_filmstrip(exhibit.frames[t]) for t in range(chunks)] if exhibit.frames is not None else None
    expected = [_filmstrip(chunk) for chunk in exhibit.reconstruction]
    foreseen = len(expected) < chunks  # of the first chunk nothing could be expected
    spectrogram = None
    if exhibit.spectrogram is not None:
        spectrogram = png_url(heat(exhibit.spectrogram.T[::-1]))  # low tones at the bottom
    strongest = max(float(exhibit.attention.max()), 1e-9)
    questions = [
        {
            "prompt": item.example.prompt,
            "answer": item.answer,
            "target": item.example.target,
            "type": item.example.type_name,
            "right": item.right,
            "attention": [(float(share), float(share) / strongest) for share in row],
        }
        for item, row in zip(exhibit.answered, exhibit.attention, strict=True)
    ]
    return {
        "media": exhibit.media,
        "chunks": chunks,
        "edges": exhibit.edges,
        "seen": seen,
        "expected": [None, *expected] if foreseen else expected,
        "foreseen": foreseen,
        "frames_per_chunk": exhibit.reconstruction.shape[1] if len(exhibit.reconstruction) else 1,
        "spectrogram": spectrogram,
        "questions": questions,
    }


def _filmstrip(frames: np.ndarray) -> str:
    """The frames of one chunk, [F, height, width, 3], side by side as one picture: the page shows one of them, and
    plays all when pointed at."""
    return png_url(np.ascontiguousarray(np.concatenate(list(frames), axis=1)))


def sample_answers(answered: Sequence[Answered], types: Sequence[str], each: int = 3) -> list[dict[str, Any]]:
    """For each type some right and some wrong answers, spread over the clips rather than the first ones alone."""
    groups = []
    for name in types:
        items = [item for item in answered if item.example.type_name == name]
        right, wrong = ([item for item in items if item.right == verdict] for verdict in (True, False))
        groups.append(
            {
                "type": name,
                "asked": len(items),
                "right_count": len(right),
                "right": _spread(right, each),
                "wrong": _spread(wrong, each),
            }
        )
    return groups


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
