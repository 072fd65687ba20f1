"""An explanation as one HTML page that needs no other file and no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mirasol.evaluation.figures import make_picture_url, map_to_colours
from mirasol.explain.compute import Explanation
from mirasol.explain.describe import describe_explanation, list_in_words
from mirasol.explain.pictures import LINES, colour_frames, colour_spectrogram, trace_waveform

LARGEST_FRAME = 96  # pixels
HOW = {
    "transformer": "The Transformer Combiner keeps the last outputs of a chunk. Its attention is followed through all "
    "layers: half of each output is what came in at its place, half what attention mixed in (attention rollout).",
    "cls": "The CLS Combiner keeps the outputs of learned tokens. Its attention is followed through all layers: half "
    "of each output is what came in at its place, half what attention mixed in (attention rollout).",
    "perceiver": "The Perceiver Combiner's learned latents attend to the features, layer after layer: half of each "
    "latent is what it was, half what attention mixed in (attention rollout).",
    "ttm": "The Token Turing Machine reads from its memory and the chunk, processes, and writes the next memory. Its "
    "weights of reading and writing, and the attention in between, are followed back through all chunks.",
    "late": "There is no joint Combiner: the Transformer takes picture and sound by themselves, and half of the "
    "features come of either. Its attention is followed through all layers: half of each output is what came in at its "
    "place, half what attention mixed in (attention rollout).",
    "concat": "There is no Combiner: each feature is one tube or patch of the chunk.",
}
OWN = {
    "cls": "the learned tokens themselves",
    "perceiver": "the learned latents themselves",
    "ttm": "the empty memory of the beginning",
}


def render_page(
    explanation: Explanation, chunk: int, *, file: str, checkpoint: str, facts: Mapping[str, str] | None = None
) -> str:
    """The page; `chunk`, from 0, is the one looked at closely. `file` and `checkpoint` are names to show, `facts` what
    its end lists."""
    import jinja2

    packages = ("mirasol.explain", "mirasol.evaluation")  # the second one has the style that all pages share
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, ".") for package in packages]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    record = describe_explanation(explanation, chunk)
    reads, memory = record["reads"], record["reads"]["memory"] or {}
    last = explanation.reading.last_layer
    page = environment.get_template("explain.html.jinja").render(
        record=record,
        words=list_in_words(record),
        file=file,
        checkpoint=checkpoint,
        chunks=explanation.chunks,
        edges=explanation.edges.tolist(),
        every=-(-explanation.chunks // 12),
        seen=_draw_seen(explanation),
        waveform=_draw_waveform(explanation),
        spectrogram=None
        if explanation.spectrogram is None
        else make_picture_url(
            map_to_colours(explanation.spectrogram.reshape(-1, explanation.patches[:, 3].max()).T[::-1])
        ),
        strongest=_find_strongest(record),
        how=HOW[reads["combiner"]],
        own=OWN.get(reads["combiner"], ""),
        rollout=_draw_reads(explanation, explanation.reading.rollout[chunk], reads["rollout"]),
        last_layer=None if last is None else _draw_reads(explanation, last[chunk], reads["last_layer"]),
        memory_read=_list_rows(memory.get("read")),
        memory_write=_list_rows(memory.get("write")),
        expected=_draw_expected(explanation, record),
        facts={"Combiner": f"{reads['combiner']}, scope {reads['scope']}", **(facts or {})},
    )
    # Names of files on disk need not be UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


def name_file(path: str | Path) -> str:
    """A file's name for the page."""
    return Path(path).name


def _draw_seen(explanation: Explanation) -> list[str | None]:
    if explanation.frames is None:
        return [None] * explanation.chunks
    middle = explanation.frames[:, explanation.frames.shape[1] // 2]
    return [
        make_picture_url(np.ascontiguousarray(frame), LARGEST_FRAME) if present else None
        for frame, present in zip(middle, explanation.video_present, strict=True)
    ]


def _draw_waveform(explanation: Explanation) -> dict[str, Any] | None:
    """The outline of the waveform as an SVG path, samples of -1 to 1 from bottom to top at most."""
    ends = trace_waveform(explanation)
    if ends is None:
        return None
    ends = ends / max(float(np.abs(ends).max()), 1e-9)
    highs = " ".join(f"L{line} {1 - high:.3f}" for line, (_, high) in enumerate(ends))
    lows = " ".join(f"L{line} {1.01 - low:.3f}" for line, (low, _) in reversed(list(enumerate(ends))))
    return {"lines": LINES, "path": f"M0 1 {highs} {lows} Z"}


def _draw_reads(
    explanation: Explanation, shares: Float[np.ndarray, "m source token"], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Pictures of what is read, and their numbers."""
    mean = shares.mean(axis=0)
    frames, spectrogram = colour_frames(explanation, mean), colour_spectrogram(explanation, mean)
    shown: list[str | None] = [None] * explanation.chunks
    if frames is not None:
        pairs = zip(frames, explanation.video_present, strict=True)
        shown = [make_picture_url(frame, LARGEST_FRAME) if present else None for frame, present in pairs]
    return {
        "frames": shown,
        "spectrogram": None if spectrogram is None else make_picture_url(spectrogram),
        "numbers": numbers,
        "picture_total": sum(numbers["picture"]),
        "sound_total": sum(numbers["sound"]),
        "strongest": max(*numbers["picture"], *numbers["sound"], 1e-9),
    }


def _find_strongest(record: Mapping[str, Any]) -> dict[str, float]:
    """The largest value of each kind of cell, which is shown darkest."""
    mattered, reads = record["mattered"], record["reads"]
    losses = [*mattered["loss_without_picture"], *mattered["loss_without_sound"]]
    features = [value for row in reads["rollout"]["by_feature"] for value in (*row["picture"], *row["sound"])]
    memory = [value for row in (reads["memory"] or {"content": []})["content"] for value in row]
    return {
        "attention": max(value for token in record["tokens"] for value in token["attention"]),
        "loss": max([abs(value) for value in losses if value is not None], default=1.0) or 1.0,
        "feature": max([*features, 1e-9]),
        "memory": max([*memory, 1e-9]),
    }


def _list_rows(columns: Mapping[str, list[float]] | None) -> list[dict[str, float]]:
    """Columns by name as rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] if columns else []


def _draw_expected(explanation: Explanation, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The frames of the expected chunk, and what was seen there; None behind the last chunk."""
    if not record["expected"]["is_shown"]:
        return None
    place = record["expected"]["chunk"] - 1
    seen = None
    if explanation.frames is not None and explanation.video_present[place]:
        seen = [make_picture_url(np.ascontiguousarray(frame), LARGEST_FRAME) for frame in explanation.frames[place]]
    expected = explanation.expected[place - explanation.first_expected]
    return {
        "pictures": [make_picture_url(np.ascontiguousarray(frame), LARGEST_FRAME) for frame in expected],
        "seen": seen,
    }
