"""The four stages in miniature, each starting from the last: image-text, video-text, audio, question answering."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mirasol.config.recipe_io import load_recipe
from mirasol.synthetic.synthesize import synthesize
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train
from mirasol.training.weights.stages import find_trainable_component

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
CHAIN = {"image_text": "images", "video_text": "captions", "audio": "sounds", "finetune": "questions"}
STAGE = {"image_text": "images", "video_text": "slots", "audio": "slots", "finetune": "questions"}


def run_chain(folder: Path, console, data: dict[str, int], changes: dict[str, list[str]]) -> dict[str, Path]:
    """Renders the data and trains the recipes one after the other. Returns the run folders."""
    runs: dict[str, Path] = {}
    before = None
    for name, kind in CHAIN.items():
        root = folder / kind
        synthesize(root, seed=1, train=data[kind], validation=max(2, data[kind] // 30), test=0, kind=kind)
        init = [] if before is None else [f"model.init={before}"]
        options = [f"output={folder / name}", f"data.root={root}", *init, *changes.get(name, []), *changes["all"]]
        before = train(load_recipe(RECIPES / f"{name}.yaml", options), console=console).parent
        runs[name] = before
    return runs


def test_the_four_recipes_run_each_from_the_last_and_train_what_they_say(tmp_path, console):
    stack = "{depth: 1, width: 16, hidden: 16, heads: 1, head_width: 16}"
    parts = ("vit", "audio.adapter", "combiner.stack", "latent.stack", "reconstruction.stack", "text.stack")
    small = [f"model.overrides.{part}={stack}" for part in parts]
    small += ["model.overrides.audio.backbone=shared", "model.overrides.contrastive.width=8"]
    changes = {
        "all": ["validate_every=2", "validation_clips=2", "checkpoint_every=2", "samples=0"],
        "image_text": small,
    }
    for name, stage in STAGE.items():
        sizes = ["steps=2", "clips_per_step=3"]
        changes[name] = [*changes.get(name, []), *(f"stages.{stage}.{size}" for size in sizes)]
    changes["finetune"].append("stages.questions.questions_per_clip=2")
    runs = run_chain(tmp_path, console, dict.fromkeys(CHAIN.values(), 4), changes)

    weights = {name: load_file(run / "checkpoint" / "model.safetensors") for name, run in runs.items()}
    moved = {}
    for first, second in (("image_text", "video_text"), ("video_text", "audio"), ("audio", "finetune")):
        assert weights[first].keys() == weights[second].keys()
        moved[second] = {
            find_trainable_component(key)
            for key, value in weights[second].items()
            if not value.equal(weights[first][key])
        }
    assert moved["audio"] == {"audio"}
    assert {"text", "vocabulary", "contrastive"}.isdisjoint(moved["video_text"])
    assert {"text", "vocabulary", "combiner", "latent", "reconstruction", "audio", "vit"} <= moved["finetune"]
    for name, run in runs.items():
        assert json.loads((run / "run.json").read_text())["components"]["contrastive"]["parameters"] > 0, name


@pytest.mark.slow
def test_question_answering_learns_faster_after_the_stages_before_it(tmp_path, console):
    """Half an hour on one core: the curves of docs/training.md. The demo has 0.81 to 0.86 right; 64 clips have some 380
    questions, so a validation is known to 0.02."""
    accuracy = 0.8
    data = {"images": 4000, "captions": 2400, "sounds": 1200, "questions": 2400}
    runs = run_chain(tmp_path, console, data, {"all": []})
    options = [f"output={tmp_path / 'scratch'}", f"data.root={tmp_path / 'questions'}", "model.init=null"]
    options += ["tokenizer.init=tiny", f"data.cache={runs['finetune'] / 'cache'}"]
    scratch = train(load_recipe(RECIPES / "finetune.yaml", options), console=console).parent

    def curve(run: Path) -> dict[int, float]:
        lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"]
        return {line["step"]: line["clip"]["accuracy"] for line in lines}

    def first(curve: dict[int, float]) -> float:
        return min((step for step, reached in curve.items() if reached >= accuracy), default=math.inf)

    after, alone = curve(runs["finetune"]), curve(scratch)
    assert first(after) < first(alone), (after, alone)
    assert all(after[step] > alone[step] for step in range(50, 301, 50)), (after, alone)
