"""What each sense is worth at each step of noise: paired by question, intervals over clips; the whole path once."""

import io
import json

import numpy as np
import pytest
from fake_recordings import make_spoken_digits
from rich.console import Console

from mirasol.experiments.digit_clips import GRID
from mirasol.experiments.folder import Settings
from mirasol.experiments.seen_heard import Right, SeenHeardExperiment, score_steps

SMALL = (
    *(
        f"model.overrides.{part}={{depth: 1, width: 32, hidden: 32, heads: 1, head_width: 32}}"
        for part in ("vit", "audio.adapter", "combiner.stack", "latent.stack", "reconstruction.stack", "text.stack")
    ),
    "stages.seconds.steps=1",
    "stages.questions.steps=1",
    "stages.seconds.clips_per_step=2",
    "stages.questions.clips_per_step=2",
    "optimizer.warmup_steps=1",
    "validation_clips=1",
)


def make_rights(clips: int, senses: float, noise: tuple[int, int], rng: np.random.Generator) -> list[Right]:
    """Three questions a clip; sight is right with probability `senses`, both where sight or hearing is."""
    rights = []
    for clip in range(clips):
        for _ in range(3):
            sight, hearing = rng.random() < senses, rng.random() < senses
            rights.append(Right(str(clip), *noise, sight or hearing, sight, hearing))
    return rights


def test_gains_are_paired_and_their_intervals_tell_gain_from_none():
    rng = np.random.default_rng(0)
    clean = make_rights(40, 1.0, (0, 0), rng)
    noisy = make_rights(40, 0.6, (2, 2), rng)
    first, last = score_steps(noisy + clean)
    assert (first.picture, first.sound, last.picture, last.sound) == (0, 0, 2, 2)
    assert first.both == first.sight == first.hearing == (1.0, 1.0, 1.0)
    assert first.over_sight == first.over_hearing == (0.0, 0.0, 0.0)
    for gain, alone in ((last.over_sight, last.sight), (last.over_hearing, last.hearing)):
        assert gain[0] == pytest.approx(last.both[0] - alone[0]) and 0 < gain[1] < gain[0] < gain[2]


@pytest.mark.slow
def test_from_recordings_to_both_tables(tmp_path):
    data = make_spoken_digits(tmp_path / "spoken")
    settings = Settings("seen_heard", str(data), str(tmp_path / "out"), ("scratch",), overrides=SMALL)
    counts = {"train": 4, "validation": 1, "test": 2, GRID: 1}
    console = Console(file=io.StringIO())
    folder = SeenHeardExperiment(settings, console, counts).run()
    record = json.loads((folder / "results.json").read_text())["starts"]["scratch"]
    assert record["types"].keys() >= {"sight", "hearing", "order"}
    assert all(0 <= own["no_media"] <= 1 and own["chance"] > 0 for own in record["types"].values())
    assert [(step["picture"], step["sound"]) for step in record["steps"]] == [
        (p, s) for p in range(3) for s in range(3)
    ]
    table = (folder / "table.txt").read_text()
    assert "both - sight" in table and "shifted audio" in table
    before = (folder / "results.json").read_bytes()
    SeenHeardExperiment(settings, console, counts).run()
    assert (folder / "results.json").read_bytes() == before
