"""A suite that trains in seconds: two rows with two seeds, and a pretraining."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from mirasol.ablation.execute import make_runs, run_here
from mirasol.ablation.plan import RunCost, write_suite
from mirasol.ablation.runs import Run, SuiteRuns
from mirasol.training.logging import read_metrics

STACK = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32, "dropout": 0.1}
PARTS = {name: {"stack": STACK} for name in ("combiner", "latent", "reconstruction", "text")}
MEASURED = ("seconds", "clips_per_second", "data_wait")  # by a clock
SMALL_MODEL = {"vit": STACK, "audio": {"adapter": STACK}, **PARTS}


def make_recipe_values(data: Path, cache: Path, name: str, stage: dict[str, Any]) -> dict[str, Any]:
    """A recipe of two steps, as plain data."""
    return {
        "seed": 3,
        "output": "unused",
        "data": {"root": str(data), "cache": str(cache)},
        "stages": {name: {"steps": 2, "clips_per_step": 2, **stage}},
        "optimizer": {"warmup_steps": 2},
        "device": "cpu",
        "log_every": 1,
        "validate_every": 1,
        "validation_clips": 2,
        "checkpoint_every": 1,
        "samples": 0,
        "threads": 1,
    }


def make_suite_values(data: Path, cache: Path) -> dict[str, Any]:
    """The suite as plain data."""
    base = make_recipe_values(data, cache, "questions", {"questions_per_clip": 2})
    base["model"] = {"new": ["combiner", "latent"]}
    return {
        "title": "Two rows",
        "base": base,
        "seeds": 2,
        "reference": "plain",
        "pretraining": {"first": {"recipe": "pretrain.yaml"}},
        "rows": {
            "plain": {"pretraining": "first", "paper": 45.0},
            "heavy": {
                "label": "text 10 & more_%",
                "pretraining": "first",
                "paper": 45.4,
                "expected": "better",
                "overrides": {"stages": {"questions": {"loss_weights": {"text": 10.0}}}},
            },
        },
    }


def write_suite_files(folder: Path, values: dict[str, Any], data: Path, cache: Path) -> Path:
    """The suite's file and that of its pretraining in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pretrain = make_recipe_values(data, cache, "slots", {"span": "segment", "questions_per_clip": 1})
    pretrain["model"] = {"preset": "tiny", "overrides": copy.deepcopy(SMALL_MODEL)}
    pretrain["tokenizer"] = {"vocab_size": 300}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(pretrain))
    file = folder / "two_rows.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def make_all(runs: SuiteRuns, chosen: list[Run] | None = None) -> None:
    """What the command does, in this process, with costs that nobody counted: counting takes as long as the runs."""
    chosen = runs.list_rows() if chosen is None else chosen
    costs = {run.name: RunCost(2, 1_000, 10**9, 1.0, 10**6) for run in chosen}
    runs.output.mkdir(parents=True, exist_ok=True)
    write_suite(runs, costs)
    make_runs(runs.list_left(chosen), run_here, lambda name, facts: None)


def list_results(output: Path) -> dict[str, tuple]:
    """Of every run the weights, the log without what a clock measured, and the answers."""
    found = {}
    for folder in sorted((output / "runs").glob("*/*")):
        log = read_metrics(folder / "train" / "metrics.jsonl")
        found[f"{folder.parent.name}/{folder.name}"] = (
            (folder / "train" / "checkpoint" / "model.safetensors").read_bytes(),
            [{key: value for key, value in line.items() if key not in MEASURED} for line in log],
            json.loads((folder / "answers.json").read_text()),
        )
    return found
