from dataclasses import replace

import torch

from mirasol.checkpoint import load_checkpoint
from mirasol.training.clip_cache import ClipCache
from mirasol.training.validation import Validation


def test_questions_without_a_type_are_untyped(recipe, examples, untrained, data_root, tmp_path):
    recipe = replace(recipe, validation_clips=1)
    loaded = load_checkpoint(untrained)
    cache = ClipCache(tmp_path, data_root, loaded.model.config.media_settings())
    validation = Validation(recipe, [replace(example, question_type="") for example in examples])
    found = validation.run(loaded.model, loaded.processor, cache, torch.device("cpu"))
    assert all(part["by_type"].keys() == {"untyped"} for part in found.values())
