"""What the machine has: batches that fit its memory, the time of a step, clips that are silent."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media_making import Audio, Video, grey, steady, tone, write_media

from mirasol.checkpoint import load_checkpoint
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.example import ClipExamples, Example
from mirasol.finetune import measure
from mirasol.finetune.measure import decode_some, find_cache_limit, find_free_memory, fit_memory, measure_pace


@pytest.fixture
def recipe(tmp_path):
    stage = {"steps": 5, "clips_per_step": 12, "questions_per_clip": 1, "trains": ["text", "latent"]}
    values = {"seed": 0, "output": "out", "data": {"root": str(tmp_path)}, "stages": {"finetune": stage}}
    return recipe_from_dict(values)


@pytest.mark.parametrize(
    ("free", "accumulation", "recompute", "words"),
    [
        (None, 1, "none", "unknown"),
        (10_000, 1, "none", "a step takes"),
        (1_000, 2, "none", "in 2 microbatches"),
        (300, 4, "none", "in 4 microbatches"),
        (50, 12, "block", "in 12 microbatches"),
        (1, 12, "block", "it may not fit"),
    ],
)
def test_a_step_is_divided_until_it_fits(recipe, monkeypatch, free, accumulation, recompute, words):
    """A planned step takes 1,200 units shared among its microbatches, a third of that with recomputation."""

    def plan(planned, _):
        peak = 1200 * 0.6 / planned.accumulation / (3 if planned.recompute == "block" else 1)
        return SimpleNamespace(stages={"finetune": SimpleNamespace(memory=SimpleNamespace(peak=peak))})

    monkeypatch.setattr(measure, "plan_run", plan)
    fitted, said = fit_memory(recipe, free, 4, 20)
    assert (fitted.accumulation, fitted.recompute) == (accumulation, recompute)
    assert words in said
    assert fitted.stages == recipe.stages


def test_the_machine_says_what_it_has(tmp_path):
    assert find_free_memory(torch.device("cpu")) > 2**20
    assert find_cache_limit(tmp_path / "not" / "there") > 0


@pytest.mark.parametrize(("gain", "level"), [(0.0, "flat"), (0.5, "flat"), (0.5, "noise"), (0.0, "noise")])
def test_silence_and_single_colours_are_told(untrained, tmp_path, gain, level):
    loaded, random, clips = load_checkpoint(untrained), np.random.default_rng(0), []
    for number in range(3):
        noise = [random.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(10)]
        pictures = noise if level == "noise" else [grey(90)] * 10
        sound = Audio([(0.0, tone(1.0, gain=gain))])
        write_media(tmp_path / f"{number}.mp4", Video(pictures, steady(10, 10)), sound)
        clips.append(ClipExamples(f"{number}.mp4", None, None, (Example(str(number), "", None, None, "what?", "x"),)))
    broken = ClipExamples("gone.mp4", None, None, clips[0].examples)
    decoded = decode_some(loaded, tmp_path, [*clips, broken])
    notes = " ".join(decoded.describe())
    assert len(decoded.tensors) == 3 and decoded.seconds > 0
    assert ("is silence" in notes) == (gain == 0)
    assert ("one colour" in notes) == (level == "flat")


@pytest.mark.parametrize("cache", [None, "features"])
def test_a_step_is_timed_with_what_the_stage_trains(untrained, shapes, recipe, cache):
    recipe = replace(recipe, data=replace(recipe.data, feature_cache=cache))
    loaded = load_checkpoint(untrained)
    examples = [Example(str(n), "", None, None, "what?", "x y"[: n + 1]) for n in range(2)]
    media = sorted((shapes / "clips" / "test").iterdir())[0].name
    clip = ClipExamples(f"clips/test/{media}", None, None, tuple(examples))
    [tensors] = decode_some(loaded, shapes, [clip]).tensors
    pace = measure_pace(recipe, loaded, examples, tensors, torch.device("cpu"))
    assert pace.step > 0 and (pace.encoding > 0) == (cache is not None)
    trained = {name.split(".")[0] for name, value in loaded.model.named_parameters() if value.requires_grad}
    assert trained <= {"text", "latent"} and trained
