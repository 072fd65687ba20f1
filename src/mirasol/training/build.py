"""What a run is made of before its first step: device, processor, model, and the checks that need them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# From the top of the package, which registers them with the Auto classes that the processor loads its parts through.
from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration, MirasolProcessor
from mirasol.checkpoint import Loaded, find_checkpoint, load_checkpoint, load_processor
from mirasol.config.parts import LossWeights
from mirasol.config.recipe import ModelRecipe, Recipe
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import Example
from mirasol.data.randomness import hash64
from mirasol.data.splits import tokenizer_texts
from mirasol.errors import UserError
from mirasol.media.tokenizer import train_tokenizer


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The recipe's device; of several GPUs of a machine the one for process `local_rank` there.

    Raises UserError for a GPU that is not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda: PyTorch finds no GPU here: use device: auto or cpu")
    return torch.device("cuda", local_rank) if available and name != "cpu" else torch.device("cpu")


def load_initial(recipe: Recipe) -> Loaded | None:
    """The checkpoint to go on from, with the frame size and number of chunks that the recipe asks for; None for none.

    Raises UserError for a checkpoint that cannot be used, or whose clips are cut by seconds where chunks are asked for.
    """
    settings = recipe.model
    if settings.init is None:
        return None
    initial = load_checkpoint(settings.init)
    config = initial.model.config
    if settings.image_size is not None and settings.image_size != config.video.image_size:
        initial.model.set_image_size(settings.image_size)
    with_media_size(config, settings)
    initial.processor.feature_extractor = MirasolFeatureExtractor.for_config(config)
    return initial


def with_media_size(config: MirasolConfig, settings: ModelRecipe) -> MirasolConfig:
    """The config, changed to the frame size and number of chunks that the recipe asks for beside `model.init`.

    Raises UserError where clips are cut by seconds and a number of chunks is asked for.
    """
    if settings.image_size is not None:
        config.video = replace(config.video, image_size=settings.image_size)
    if settings.num_chunks is not None:
        if config.chunking.num_chunks is None:
            raise UserError(
                f"model.num_chunks={settings.num_chunks}: {settings.init} cuts clips into chunks of "
                f"{config.chunking.chunk_seconds} s: leave it out"
            )
        most = max(config.chunking.max_chunks, settings.num_chunks)
        config.chunking = replace(config.chunking, num_chunks=settings.num_chunks, max_chunks=most)
    return config


def make_processor(
    recipe: Recipe, examples: list[Example], initial: Loaded | None, saved: Path | None
) -> MirasolProcessor:
    """The run's processor: as saved by an earlier part of the run, of the checkpoint it goes on from, or new with a
    tokenizer taken from a checkpoint or trained on the training texts."""
    if saved is not None and saved.is_dir():
        return MirasolProcessor.from_pretrained(saved)
    if initial is not None:
        return initial.processor
    config = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)
    if recipe.tokenizer.init is not None:
        tokenizer = load_processor(recipe.tokenizer.init).tokenizer
    else:
        tokenizer = train_tokenizer(tokenizer_texts(examples), recipe.tokenizer.vocab_size)
    return MirasolProcessor(MirasolFeatureExtractor.for_config(config), tokenizer, config.text.max_length)


def make_model(recipe: Recipe, processor: MirasolProcessor, initial: Loaded | None) -> MirasolForConditionalGeneration:
    """A new model from the preset, its vocabulary as large as the tokenizer's, or the checkpoint to go on from."""
    if initial is not None:
        return initial.model
    torch.manual_seed(hash64(recipe.seed, "weights") >> 1)
    return MirasolForConditionalGeneration(_new_config(recipe, processor))


def make_outline(recipe: Recipe, processor: MirasolProcessor) -> MirasolForConditionalGeneration:
    """The model of `make_model` without its weights, on the meta device: it gets them from another process."""
    if recipe.model.init is not None:
        config = MirasolConfig.from_pretrained(find_checkpoint(recipe.model.init))
        with_media_size(config, recipe.model)
    else:
        config = _new_config(recipe, processor)
    with torch.device("meta"):
        return MirasolForConditionalGeneration(config)


def _new_config(recipe: Recipe, processor: MirasolProcessor) -> MirasolConfig:
    config = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)
    config.vocab_size = len(processor.tokenizer)
    return config


def make_caches(
    recipe: Recipe, output: Path, settings: Mapping[str, Any], examples: Iterable[Example]
) -> tuple[ClipCache, ClipCache]:
    """Where the clips come from in training, and in validation.

    Decoded before the first step, both lie in one cache and windows are cut from whole clips. Decoded ahead, training
    keeps clips only where the recipe says so; validation's few, the same every time, are kept in any case.
    """
    data = recipe.data
    folder, root = Path(data.cache) if data.cache else output / "cache", data.folder
    if data.decode == "before":
        cache = ClipCache(folder, root, settings, {e.media for e in examples if e.start is None and e.end is None})
        return cache, cache
    limit = None if data.cache_limit is None else int(data.cache_limit * 1e9)
    return ClipCache(folder if data.cache else None, root, settings, limit=limit), ClipCache(folder, root, settings)


def check_loss_weights(recipe: Recipe, config: MirasolConfig) -> None:
    """Raises UserError for the weight of a loss that a stage does not have."""
    clips = {"contrastive": "clips have no contrastive loss, leave it out"}
    if not config.reconstruction.audio:
        clips["audio"] = "the model reconstructs no audio, set model.overrides.reconstruction.audio"
    images = dict.fromkeys(("latent", "video", "audio"), "objective image_text has no such loss, leave it out")
    for name, stage in recipe.stages.items():
        for loss, reason in (images if stage.objective == "image_text" else clips).items():
            weight = getattr(stage.loss_weights, loss)
            if weight != getattr(LossWeights, loss):
                raise UserError(f"stages.{name}.loss_weights.{loss}={weight} has no effect: {reason}")


def check_texts(processor: MirasolProcessor, examples: list[Example], rows_at_once: int = 1024) -> None:
    """Encodes every prompt and target once, so that one too long is refused before the run begins."""
    drawn = {(example.prompt, text) for example in examples if example.random_target for text in example.references}
    pairs = sorted({(example.prompt, example.target) for example in examples} | drawn)
    for first in range(0, len(pairs), rows_at_once):
        prompts, targets = zip(*pairs[first : first + rows_at_once], strict=True)
        processor.encode_text(list(prompts), list(targets))
