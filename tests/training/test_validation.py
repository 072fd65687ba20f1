from dataclasses import replace

import pytest
import torch

from mirasol.checkpoint import load_checkpoint
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.clip_cache import ClipCache
from mirasol.data.datasets.folder import read_examples
from mirasol.errors import UserError
from mirasol.training import validation
from mirasol.training.trainer import train
from mirasol.training.validation import Validation
from mirasol.training.weights.stages import compute_stage_losses


def test_questions_without_a_type_are_untyped(recipe, examples, untrained, data_root, tmp_path):
    recipe = replace(recipe, validation_clips=1)
    loaded = load_checkpoint(untrained)
    cache = ClipCache(tmp_path, data_root, loaded.model.config.media_settings())
    own = Validation(recipe, [replace(example, question_type="") for example in examples])
    found = own.run(loaded.model, loaded.processor, cache, torch.device("cpu"))
    assert all(part["by_type"].keys() == {"untyped"} for part in found.values())


def test_clips_are_validated_a_microbatch_at_a_time_or_as_many_as_asked_for(
    recipe, examples, untrained, data_root, tmp_path, monkeypatch
):
    loaded, sizes = load_checkpoint(untrained), []
    cache = ClipCache(tmp_path, data_root, loaded.model.config.media_settings())

    def counted(model, stage, batch):
        sizes.append(len(batch["chunk_mask"]))
        return compute_stage_losses(model, stage, batch)

    monkeypatch.setattr(validation, "compute_stage_losses", counted)
    # Rounding aside, what each clip has by itself stays the same.
    stage = replace(recipe.stages["questions"], clips_per_step=4)
    recipe = replace(recipe, stages={"questions": stage}, validation_clips=4)
    found = []
    for changes in ({}, {"accumulation": 2}, {"validation_batch": 3}, {"accumulation": 2, "validation_batch": 1}):
        own = Validation(replace(recipe, **changes), examples)
        found.append(own.run(loaded.model, loaded.processor, cache, torch.device("cpu"))["clip"])
    assert sizes == [4, 2, 2, 3, 1, 1, 1, 1, 1]
    for other in found[1:]:
        assert other["accuracy"] == found[0]["accuracy"]
        assert other["text_loss"] == pytest.approx(found[0]["text_loss"], rel=1e-4)
    with pytest.raises(UserError, match="validation_batch=0 must be positive"):
        replace(recipe, validation_batch=0)


def test_stages_that_are_not_validated_are_told_at_the_start(recipe, examples):
    whole = [example for example in examples if example.start is None]
    validation = Validation(recipe, examples)
    assert list(validation.parts) == ["segment", "clip"]
    assert validation.absent == []
    assert Validation(recipe, whole).absent == ["segment"]
    assert Validation(recipe, {"a": whole, "b": examples}).absent == ["a_segment"]
    validation.leave_out({(example.media, example.start, example.end) for example in whole})
    assert validation.absent == ["clip"]


def test_a_run_says_once_what_its_validation_lacks(values, data_root, console):
    values["stages"] = {"slots": {"steps": 1, "span": "segment", "clips_per_step": 2, "questions_per_clip": 1}}
    assert not any(example.start for example in read_examples(data_root, "validation"))
    train(recipe_from_dict(values), console=console)
    warned = [line for line in console.file.getvalue().splitlines() if line.startswith("warning: not validated")]
    assert warned == [
        "warning: not validated: segment: the validation split has no examples of the kind and question types "
        "that the stages train on"
    ]
