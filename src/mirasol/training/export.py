"""From a run's folder to one that others can load: weights, processor, and a card that says how they came to be."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirasol import MirasolConfig, MirasolForConditionalGeneration, MirasolProcessor
from mirasol.checkpoint import find_checkpoint, load_checkpoint, read_config
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import read_run_recipe, recipe_from_dict
from mirasol.errors import UserError
from mirasol.files import hash_file, write_folder_atomically
from mirasol.json_values import parse_own_json
from mirasol.training.best import BestStep
from mirasol.training.checkpoint import Checkpoints, save_model
from mirasol.training.checkpoint_io import DamagedFile
from mirasol.training.logging import read_metrics
from mirasol.training.regularisers import Regularisers


def export_run(
    run: str | Path, out: str | Path, step: int | None = None, best: bool = False, average: bool | None = None
) -> Path:
    """Writes a folder that `from_pretrained` takes, with a model card (README.md). Returns it.

    step: the checkpoint after so many steps; None is the finished model, or the newest checkpoint of an unfinished run
    best: the checkpoint with the best validation of those that are there, by the recipe's `keep_best`, or by the mean
        accuracy over the validation's parts where it names none
    average: the moving average of the weights (`ema`); None takes it where the recipe keeps one

    Raises:
        UserError: no run, no such checkpoint, a damaged one, no average, or `out` exists.
    """
    run, out = Path(run), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists: give another folder, for nothing is overwritten")
    recipe, facts = _read_run(run)
    checkpoints = Checkpoints(run / "checkpoints", recipe.keep_last)
    if best:
        step = _best_step(run, checkpoints.steps(), recipe.keep_best)
    finished = (run / "checkpoint").is_dir()
    if step is None and not finished:
        if not checkpoints.steps():
            raise UserError(f"{run}: this run has no checkpoint yet: go on with `mirasol train --resume`")
        step = checkpoints.steps()[-1]
    if average and recipe.ema is None:
        raise UserError(f"{run}: this run keeps no average of its weights: leave out --ema, or train with ema")
    averaged = recipe.ema is not None and average is not False
    if step is None and average is False and recipe.ema is not None:
        step = recipe.total_steps  # the finished model is the average
    if step is None:
        loaded = load_checkpoint(run / "checkpoint")
        model, processor, step = loaded.model, loaded.processor, recipe.total_steps
    else:
        model, processor = _load(run, recipe, facts, checkpoints, step, averaged), _processor(run)

    def fill(folder: Path) -> None:
        save_model(folder, model, processor)
        digest = hash_file(folder / "model.safetensors")
        training = {**facts, "steps": step, "averaged": averaged, "weights_sha256": digest, "recipe": recipe.to_dict()}
        (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(recipe, training, _validation(run, step), model), encoding="utf-8")

    write_folder_atomically(out, fill, replace=True)
    return out


def _read_run(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """The run's recipe, and what run.json records."""
    for name in ("recipe.yaml", "run.json"):
        if not (run / name).is_file():
            raise UserError(f"{run}: not the folder of a run: it has no {name}")
    facts = run / "run.json"
    recipe = recipe_from_dict(read_run_recipe(run / "recipe.yaml")[0], str(run))
    return recipe, parse_own_json(facts.read_text(encoding="utf-8"), facts, "put its copy back")


def _best_step(run: Path, steps: list[int], metric: str | None) -> int:
    """The step with the best `metric`, or the highest mean accuracy over the validation's parts, of those that have a
    checkpoint."""
    lines = [
        line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation" and line["step"] in steps
    ]
    if not lines:
        raise UserError(f"{run}: no checkpoint that is there was validated: choose one with --step ({_told(steps)})")
    if metric is not None:
        return BestStep(metric, lines).step
    found = {}
    for line in lines:
        parts = [value["accuracy"] for value in line.values() if isinstance(value, Mapping)]
        found[line["step"]] = sum(parts) / len(parts)
    return max(found, key=lambda step: (found[step], step))


def _load(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    checkpoints: Checkpoints,
    step: int,
    averaged: bool,
) -> MirasolForConditionalGeneration:
    """The model as it was after `step` steps."""
    if step not in checkpoints.steps():
        raise UserError(f"{run}: has no checkpoint after {step} steps: {_told(checkpoints.steps())}")
    model = MirasolForConditionalGeneration(_config(recipe, facts))
    stage = recipe.stages[recipe.stage_at(step - 1)[0]]
    model.config.loss_weights = stage.loss_weights
    Regularisers(model).enter(stage)
    try:
        checkpoints.load(step, {"model": model.state_dict()})
        if averaged:
            checkpoints.load(step, {"average": dict(model.named_parameters())})
    except DamagedFile as error:
        raise UserError(f"{checkpoints.path(step)}: damaged ({error}): choose another one with --step") from error
    return model.eval()


def _config(recipe: Recipe, facts: Mapping[str, Any]) -> MirasolConfig:
    if facts.get("model_config"):
        return MirasolConfig(**facts["model_config"])
    # Runs of before the config was recorded.
    if recipe.model.init is not None:
        return read_config(find_checkpoint(recipe.model.init))
    return MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)


def _processor(run: Path) -> MirasolProcessor:
    return MirasolProcessor.from_pretrained(run / "processor", local_files_only=True)


def _validation(run: Path, step: int) -> dict[str, Any] | None:
    """The newest validation that is not of later steps."""
    found = [
        line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation" and line["step"] <= step
    ]
    return found[-1] if found else None


def _told(steps: list[int]) -> str:
    return f"there are {', '.join(map(str, steps))}" if steps else "there is none"


def model_card(
    recipe: Recipe,
    facts: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    model: MirasolForConditionalGeneration,
) -> str:
    """README.md of a model: how to use it, what it was trained on and how, and what it reached."""
    import yaml

    parameters = sum(model.num_params().values())
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    data = yaml.safe_dump(recipe.to_dict()["data"], sort_keys=False).rstrip()
    digests = {**facts.get("data", {}), **facts.get("examples", {})}
    hashes = "\n".join(f"| {name} | `{digest}` |" for name, digest in digests.items())
    return CARD.format(
        parameters=f"{parameters:,}", steps=f"{facts['steps']:,}", total=f"{recipe.total_steps:,}",
        weights=facts["weights_sha256"], versions=versions, commit=facts.get("commit") or "not known",
        components="\n".join(f"| {name} | {count:,} |" for name, count in model.num_params().items()),
        data=data, hashes=hashes or "| none | |", metrics=_metrics(validation, recipe.ema, facts["averaged"]),
        averaged="" if recipe.ema is None else f" (ema={recipe.ema}: {_averaged(facts['averaged'])})",
        recipe=yaml.safe_dump(replace(recipe, output="").to_dict(), sort_keys=False).rstrip(),
    )  # fmt: skip


def _averaged(averaged: bool) -> str:
    return "the moving average of the weights" if averaged else "the last weights, not their moving average"


def _metrics(validation: Mapping[str, Any] | None, ema: float | None, averaged: bool) -> str:
    if validation is None:
        return "This run was not validated."
    told = [] if ema is None or averaged else [f"The numbers are those of {_averaged(True)}."]
    lines = [f"Validation after {validation['step']:,} steps: exact match of the teacher-forced most likely tokens.",
             "What the model answers in its own words is measured by `mirasol evaluate`.", *told, "",
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
steps{averaged}.

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
