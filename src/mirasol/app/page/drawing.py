"""Answers, candidates and timelines as HTML. Everything that somebody typed is escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from mirasol.app.server.refusals import shorten
from mirasol.evaluation.answer import RankedCandidate
from mirasol.explain import Explanation
from mirasol.explain.pictures import scale_spectrogram

FRAME_SIDE = 96  # pixels
LEAST_LOSS = 0.5  # nats that are coloured fully, where no chunk matters more


def draw_answer(text: str, probability: float | None = None, note: str = "") -> str:
    """The answer so far; with its probability once it is complete."""
    said = f'<p class="answer">{escape(text) or "…"}</p>'
    if probability is not None:
        said += f'<p class="soft">probability of exactly this answer: <b>{probability:.0%}</b></p>'
    if note:
        said += f'<p class="soft">{escape(note)}</p>'
    return f'<section class="mirasol" aria-label="answer">{said}</section>'


def draw_trouble(message: str) -> str:
    """What went wrong, in words."""
    return f'<section class="mirasol trouble" role="alert">{escape(shorten(message))}</section>'


def draw_candidates(ranked: Sequence[RankedCandidate]) -> str:
    """The candidates, the most likely first, with a bar for the share of each."""
    rows = [
        f'<li><span>{escape(one.text)}</span><meter min="0" max="1" value="{one.share:.4f}" '
        f'aria-label="{escape(one.text, quote=True)}"></meter><b>{one.share:.0%}</b></li>'
        for one in ranked
    ]
    return f'<section class="mirasol" aria-label="candidates"><ol class="bars">{"".join(rows)}</ol></section>'


def draw_timeline(explanation: Explanation) -> str:
    """Below the player: for each chunk its frame and spectrogram, where the answer looked, and what mattered. Every
    cell is a button that seeks."""
    looked = explanation.cross_attention.mean(axis=(0, 1)).sum(axis=-1)
    losses = explanation.occlusion.losses
    most = max(np.nanmax(losses, initial=0.0), LEAST_LOSS)
    edges = explanation.edges - explanation.edges[0]
    rows = [
        _draw_row("seen", edges, _draw_frames(explanation), "film"),
        _draw_row("heard", edges, _draw_spectrograms(explanation), "sound"),
        _draw_heat("looked at", edges, looked, looked.max(), "{:.0%} of the attention of the answer"),
        _draw_heat("picture mattered", edges, losses[0], most, "without this picture {:+.2f} nats"),
        _draw_heat("sound mattered", edges, losses[1], most, "without this sound {:+.2f} nats"),
    ]
    style = f"--chunks: {explanation.chunks}"
    told = (
        "Attention says where the model looked; what mattered is measured: how far the answer's log-likelihood falls "
        "without a chunk's picture or sound. Click a chunk to play from there."
    )
    return (
        f'<section class="mirasol" aria-label="timeline"><div class="scroll"><div class="timeline" style="{style}" '
        f'data-seconds="{edges[-1]:.3f}"><div class="playhead" aria-hidden="true"></div>{"".join(rows)}</div></div>'
        f'<p class="soft">{told}</p></section>'
    )


def _draw_row(name: str, edges: np.ndarray, cells: Sequence[tuple[str, str, str]], kind: str) -> str:
    """A row of buttons. cells: of each chunk its style, its text, and what it is called."""
    found = [f'<span class="side">{name}</span>']
    for chunk, (style, text, told) in enumerate(cells):
        label = f"{name}, chunk {chunk + 1}, {edges[chunk]:.1f} to {edges[chunk + 1]:.1f} s: {told}"
        found.append(
            f'<button type="button" class="cell {kind}" data-seek="{edges[chunk]:.3f}" style="{style}" '
            f'aria-label="{label}" title="{label}">{text}</button>'
        )
    return "".join(found)


def _draw_frames(explanation: Explanation) -> list[tuple[str, str, str]]:
    if explanation.frames is None:
        return [("", "no picture", "no picture")] * explanation.chunks
    middle = explanation.frames[:, explanation.frames.shape[1] // 2]
    return [
        (_make_background(frame), "", "its middle frame") if present else ("", "no picture", "no picture")
        for frame, present in zip(middle, explanation.video_present, strict=True)
    ]


def _draw_spectrograms(explanation: Explanation) -> list[tuple[str, str, str]]:
    if explanation.spectrogram is None:
        return [("", "no sound", "no sound")] * explanation.chunks
    pieces = np.split((255 * scale_spectrogram(explanation)).astype(np.uint8), explanation.chunks, axis=1)
    return [
        (_make_background(piece), "", "its spectrogram") if present else ("", "no sound", "no sound")
        for piece, present in zip(pieces, explanation.audio_present, strict=True)
    ]


def _draw_heat(name: str, edges: np.ndarray, values: np.ndarray, most: float, told: str) -> str:
    """A row of numbers, coloured by their share of `most`; NaN where there is none."""
    cells = []
    for value in values.tolist():
        if np.isnan(value):
            cells.append(("", "–", "nothing there"))
            continue
        shown = f"{value:.0%}" if "%" in told else f"{round(value, 1) + 0.0:.1f}"
        cells.append(
            (f"--v: {max(value, 0.0) / most:.3f}", shown, told.format(value if "%" in told else round(-value, 2) + 0.0))
        )
    return _draw_row(name, edges, cells, "look")


def _make_background(pixels: np.ndarray) -> str:
    """A picture as a background that needs no request."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((FRAME_SIDE, FRAME_SIDE))
    written = io.BytesIO()
    picture.save(written, "PNG")
    return f"background-image: url(data:image/png;base64,{base64.b64encode(written.getvalue()).decode()})"
