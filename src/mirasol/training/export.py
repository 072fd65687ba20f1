"""Exports a run's model: weights, processor, and a model card that says how they were trained."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirasol import MirasolForConditionalGeneration, MirasolProcessor
from mirasol.checkpoint import Untrained, load_checkpoint
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import read_run_recipe, recipe_from_dict
from mirasol.errors import UserError
from mirasol.files import hash_file, remove_folder, write_folder_atomically
from mirasol.json_values import parse_own_json
from mirasol.training.build import Run, read_recorded_config
from mirasol.training.checkpoint import Checkpoints, save_model
from mirasol.training.checkpoint_io import DamagedFile
from mirasol.training.logging import BestStep, read_metrics
from mirasol.training.run_folder import collect_versions
from mirasol.training.weights.lora import add_adapters, merge_adapters
from mirasol.training.weights.stages import Regularisers, StageWeights


def export_run(
    run: str | Path, out: str | Path, step: int | None = None, best: bool = False, average: bool | None = None
) -> Path:
    """Writes a folder that `from_pretrained` loads, with a model card (README.md). Returns it.

    step: exports the checkpoint after this many steps; None: the finished model, or the newest checkpoint of an
        unfinished run
    best: exports the checkpoint with the best validation, by the recipe's `keep_best`, or by default by mean accuracy
        over the validation's parts
    average: exports the moving average of the weights (`ema`); None: if the recipe keeps one

    Raises:
        UserError: no run, no such checkpoint, a damaged one, no average, or `out` exists.
    """
    run, out = Path(run), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists, and nothing is overwritten: choose another folder")
    recipe, facts = _read_run(run)
    checkpoints = Checkpoints(run / "checkpoints", recipe.keep_last)
    if best:
        step = _find_best_step(run, checkpoints.list_steps(), recipe.keep_best)
    finished = (run / "checkpoint").is_dir()
    if step is None and not finished:
        if not checkpoints.list_steps():
            raise UserError(f"{run}: this run has no checkpoint yet: continue it with `mirasol train --resume`")
        step = checkpoints.list_steps()[-1]
    if average and recipe.ema is None:
        raise UserError(f"{run}: this run has no average of its weights: leave out --ema, or train with ema")
    averaged = recipe.ema is not None and average is not False
    if step is None and average is False and recipe.ema is not None:
        step = _read_last_step(run, recipe)  # the finished model is the average
    if step is None:
        loaded = load_checkpoint(run / "checkpoint")
        model, processor, step = loaded.model, loaded.processor, _read_last_step(run, recipe)
    else:
        model, processor = _load_checkpoint(run, recipe, facts, checkpoints, step, averaged), _load_processor(run)

    def fill(folder: Path) -> None:
        save_model(folder, model, processor)
        digest = hash_file(folder / "model.safetensors")
        training = {**facts, "steps": step, "averaged": averaged, "weights_sha256": digest, "recipe": recipe.to_dict()}
        training["untrained"] = _find_untrained(recipe, facts, model, step).to_dict()
        (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(
            format_model_card(recipe, training, _find_validation(run, step), model), encoding="utf-8"
        )

    write_folder_atomically(out, fill, replace=True)
    return out


def write_finished_model(run: Run, weights: Mapping[str, Tensor], steps: int) -> None:
    """Writes the `checkpoint` of a run's folder that finished after `steps` steps, and removes what only the training
    needed."""

    recorded = run.folder.read_facts()

    def fill(target: Path) -> None:
        save_model(target, run.model, run.processor, merge_adapters(run.model.config, run.recipe, weights))
        facts = {
            "steps": steps,
            "training_seconds": round(run.clock.seconds(), 1),
            "weights_sha256": hash_file(target / "model.safetensors"),
            "untrained": run.weights.find_untrained(run.recipe, steps).to_dict(),
            "versions": collect_versions(),
            "rendered_world": recorded.get("rendered_world"),
            "initial_checkpoint": recorded.get("initial_checkpoint"),
            "recipe": run.recipe.to_dict(),
        }
        (target / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    write_folder_atomically(run.folder.checkpoint, fill, replace=True)
    remove_folder(run.folder.path / "examples")


def _read_run(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """The run's recipe, its epochs counted in steps, and the content of run.json."""
    for name in ("recipe.yaml", "run.json"):
        if not (run / name).is_file():
            raise UserError(f"{run}: not a run folder: it has no {name}")
    facts = run / "run.json"
    recipe = recipe_from_dict(read_run_recipe(run / "recipe.yaml")[0], str(run))
    values = parse_own_json(facts.read_text(encoding="utf-8"), facts, "restore a copy of it")
    return recipe.count_epochs(values.get("stage_steps", {})), values


def _read_last_step(run: Path, recipe: Recipe) -> int:
    """The steps of a finished run: a run with `patience` may have fewer than its recipe."""
    file = run / "checkpoint" / "training.json"
    if not file.is_file():
        return recipe.total_steps
    return parse_own_json(file.read_text(encoding="utf-8"), file, "restore a copy of it").get(
        "steps", recipe.total_steps
    )


def _find_best_step(run: Path, steps: list[int], metric: str | None) -> int:
    """Of the steps that have a checkpoint, the one with the best `metric`, or the best mean accuracy over the
    validation's parts."""
    lines = [
        line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation" and line["step"] in steps
    ]
    if not lines:
        raise UserError(f"{run}: no existing checkpoint was validated: choose one with --step ({_list_steps(steps)})")
    if metric is not None:
        return BestStep(metric, lines).step
    found = {}
    for line in lines:
        parts = [value["accuracy"] for value in line.values() if isinstance(value, Mapping)]
        found[line["step"]] = sum(parts) / len(parts)
    return max(found, key=lambda step: (found[step], step))


def _load_checkpoint(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    checkpoints: Checkpoints,
    step: int,
    averaged: bool,
) -> MirasolForConditionalGeneration:
    """The model as it was after `step` steps."""
    if step not in checkpoints.list_steps():
        raise UserError(f"{run}: has no checkpoint after {step} steps: {_list_steps(checkpoints.list_steps())}")
    model = MirasolForConditionalGeneration(read_recorded_config(recipe, facts))
    add_adapters(model, recipe)
    stage = recipe.stages[recipe.find_stage(step - 1)[0]]
    model.config.loss_weights = stage.loss_weights
    Regularisers(model).enter(stage)
    try:
        checkpoints.load(step, {"model": model.state_dict()})
        if averaged:
            checkpoints.load(step, {"average": dict(model.named_parameters())})
    except DamagedFile as error:
        raise UserError(f"{checkpoints.path(step)}: damaged ({error}): choose another with --step") from error
    if recipe.lora is not None:
        merged = merge_adapters(model.config, recipe, model.state_dict())
        model = MirasolForConditionalGeneration(model.config)
        model.load_state_dict(merged)
    return model.eval()


def _load_processor(run: Path) -> MirasolProcessor:
    return MirasolProcessor.from_pretrained(run / "processor", local_files_only=True)


def _find_untrained(
    recipe: Recipe, facts: Mapping[str, Any], model: MirasolForConditionalGeneration, step: int
) -> Untrained:
    """What is untrained after `step` steps of a run; runs of versions that did not record it have nothing untrained."""
    recorded = facts.get("untrained") or {"weights": (), "rows": {}}
    initial = Untrained(frozenset(recorded["weights"]), recorded["rows"])
    if recipe.lora is not None:
        with torch.device("meta"):
            model = MirasolForConditionalGeneration(model.config)
        add_adapters(model, recipe)
    return StageWeights(recipe, model, initial).find_untrained(recipe, step)


def _find_validation(run: Path, step: int) -> dict[str, Any] | None:
    """The last validation up to this step."""
    found = [
        line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation" and line["step"] <= step
    ]
    return found[-1] if found else None


def _list_steps(steps: list[int]) -> str:
    return f"there are {', '.join(map(str, steps))}" if steps else "there is none"


def format_model_card(
    recipe: Recipe,
    facts: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    model: MirasolForConditionalGeneration,
) -> str:
    """README.md of a model: how to use it, how and on what it was trained, and its validation."""
    import yaml

    parameters = sum(model.num_params().values())
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    data = yaml.safe_dump(recipe.to_dict()["data"], sort_keys=False).rstrip()
    digests = {**facts.get("data", {}), **facts.get("examples", {})}
    hashes = "\n".join(f"| {name} | `{digest}` |" for name, digest in digests.items())
    return CARD.format(
        parameters=f"{parameters:,}", steps=f"{facts['steps']:,}", total=f"{recipe.total_steps:,}",
        weights=facts["weights_sha256"], versions=versions, commit=facts.get("commit") or "unknown",
        world=_describe_world(facts.get("rendered_world")),
        components="\n".join(f"| {name} | {count:,} |" for name, count in model.num_params().items()),
        data=data, hashes=hashes or "| none | |", metrics=_format_metrics(validation, recipe.ema, facts["averaged"]),
        averaged="" if recipe.ema is None else f" (ema={recipe.ema}: {_describe_weights(facts['averaged'])})",
        recipe=yaml.safe_dump(replace(recipe, output="").to_dict(), sort_keys=False).rstrip(),
    )  # fmt: skip


def _describe_world(world: str | None) -> str:
    return f" It has seen rendered scenes only ({world}): its answers about other videos are guesses." if world else ""


def _describe_weights(averaged: bool) -> str:
    return "the moving average of the weights" if averaged else "the last weights, not their moving average"


def _format_metrics(validation: Mapping[str, Any] | None, ema: float | None, averaged: bool) -> str:
    if validation is None:
        return "This run was not validated."
    note = [] if ema is None or averaged else [f"The numbers are those of {_describe_weights(True)}."]
    lines = [f"Validation after {validation['step']:,} steps: exact match of the teacher-forced most likely tokens.",
             "`mirasol evaluate` measures the answers that the model generates.", *note, "",
             "| part | type | accuracy | text loss | rows |", "|---|---|---|---|---|"]  # fmt: skip
    for part, values in validation.items():
        if not isinstance(values, Mapping):
            continue
        lines.append(f"| {part} | all | {values['accuracy']:.4f} | {values['text_loss']:.4f} | |")
        for name, own in values["by_type"].items():
            lines.append(f"| {part} | {name} | {own['accuracy']:.4f} | {own['text_loss']:.4f} | {own['rows']} |")
    return "\n".join(lines)


CARD = """---
# license: to be chosen by whoever publishes the model; the terms of the data and of the starting weights may limit it
library_name: mirasol
pipeline_tag: video-text-to-text
tags: [mirasol, video, audio, question-answering]
---

# A Mirasol model

Answers questions about what is seen and heard in a video. {parameters} parameters, after {steps} of {total} training
steps{averaged}.{world}

```python
import mirasol.auto  # registers the model with transformers' Auto classes
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

model = AutoModelForSeq2SeqLM.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
```

On the command line: `mirasol ask . clip.mp4 "what is heard?"`

| component | parameters |
|---|---|
{components}

## Data

```yaml
{data}
```

| manifest | SHA-256 |
|---|---|
{hashes}

## Metrics

{metrics}

## Training

Weights: SHA-256 `{weights}`. Versions: {versions}. Commit: {commit}.

```yaml
{recipe}
```
"""
