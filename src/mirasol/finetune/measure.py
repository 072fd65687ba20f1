"""What the machine has: memory for a batch, and the time that a step takes, measured."""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirasol.checkpoint import Loaded
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe, Stage
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.memory import FLOAT
from mirasol.cost.plan import plan_run
from mirasol.data.example import ClipExamples, Example
from mirasol.errors import BadClip, UserError
from mirasol.evaluation.answer import load_clip
from mirasol.finetune.duration import Pace
from mirasol.training.features import compute_features
from mirasol.training.optim import Optimizer
from mirasol.training.weights.stages import compute_stage_losses, find_trainable_component

MEMORY_SHARE = 0.6  # of what is free: other programs and the decoder need some too
OPTIMIZER_COPIES = 5  # weights, gradients, what the optimizer keeps, and one to spare
CACHE_SHARE = 0.5  # of the free disk
TIMED_STEPS = 3
SILENCE, DARKNESS = 1e-4, 2.0  # largest sample of a waveform, standard deviation of pixels


@dataclass(frozen=True)
class Decoded:
    """Some clips decoded: median seconds that one took, how many are silent, how many of one colour, and what is wrong
    with others."""

    tensors: tuple[dict[str, Tensor], ...]
    seconds: float
    silent: int
    dark: int
    failed: tuple[BadClip, ...] = ()

    def describe(self) -> Iterator[str]:
        """What the user should know of them."""
        count = len(self.tensors)
        if self.failed:
            tried = count + len(self.failed)
            yield f"{len(self.failed)} of {tried} clips that were tried cannot be decoded, the first: {self.failed[0]}"
        if count and self.silent == count:
            yield f"the sound of all {count} clips that were decoded is silence: the model learns from pictures alone"
        if count and self.dark == count:
            yield f"the pictures of all {count} clips that were decoded are of one colour: is this the right folder?"


def find_free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def find_cache_limit(folder: Path) -> float:
    """Gigabytes that a cache below the folder may take."""
    there = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    return round(max(0.1, CACHE_SHARE * shutil.disk_usage(there).free / 1e9), 1)


def bound_step_bytes(config: MirasolConfig, parameters: int, stage: Stage, chunks: int, tokens: int) -> int:
    """More bytes than a step of the whole batch can take: as if every row went through the widest layer of all stacks,
    and every layer kept all that it computes, attention weights included. For `tiny` ten times what a step takes.

    chunks, tokens: of the longest clip and text
    """
    stacks = config.stacks.values()
    layers, width = sum(stack.depth for stack in stacks), max(stack.width for stack in stacks)
    hidden, heads = max(stack.hidden for stack in stacks), max(stack.heads for stack in stacks)
    texts = stage.clips_per_step * stage.questions_per_clip * tokens
    rows = stage.clips_per_step * chunks * config.count_tokens() + texts
    keys = max(chunks * config.combiner.m, config.count_tokens(), tokens)
    floats = rows * layers * (16 * width + 4 * hidden + 2 * heads * keys) + 3 * texts * config.text.vocab_size
    return FLOAT * (floats + OPTIMIZER_COPIES * parameters)


def fit_memory(
    recipe: Recipe, free: int | None, chunks: int, tokens: int, bound: int | None = None
) -> tuple[Recipe, str]:
    """The recipe with so many microbatches (and, if one clip is too much, with recomputation) that a step fits into
    the free memory by `mirasol plan`, and what was found, in words.

    chunks, tokens: of the longest clip and text
    bound: bytes that a step takes at most, where that is known; planning is left out where they fit
    """
    if free is None:
        return recipe, "the free memory is unknown: batches are as the rules have them"
    room = MEMORY_SHARE * free
    if bound is not None and bound <= room:
        return recipe, f"a step takes less than {bound / 2**30:.2g} of {free / 2**30:.3g} GiB that are free"
    sizes = [stage.clips_per_step for stage in recipe.stages.values()]
    while True:
        plan = plan_run(recipe, Assumptions(chunks=chunks, text_length=tokens, peak_tflops=1.0, memory_alone=True))
        peak = max(stage.memory.peak for stage in plan.stages.values())
        words = f"a step takes {peak / 2**30:.2g} of {free / 2**30:.3g} GiB that are free"
        if recipe.accumulation > 1:
            words += f", in {recipe.accumulation} microbatches"
        if peak <= room:
            return recipe, words
        more = next((n for n in range(recipe.accumulation + 1, min(sizes) + 1) if not any(s % n for s in sizes)), None)
        if more is not None:
            recipe = replace(recipe, accumulation=more)
        elif recipe.recompute == "none":
            recipe = replace(recipe, recompute="block")
        else:
            return recipe, f"{words}: it may not fit; a checkpoint with fewer weights or shorter clips will"


def decode_some(loaded: Loaded, root: Path, clips: Sequence[ClipExamples], count: int = 8) -> Decoded:
    """Decodes some clips, evenly spaced."""
    chosen = [clips[place * len(clips) // count] for place in range(count)] if len(clips) > count else list(clips)
    tensors, seconds, silent, dark, failed = [], [], 0, 0, []
    for clip in chosen:
        began = time.perf_counter()
        try:
            found = load_clip(loaded.processor.feature_extractor, root, clip)
        except BadClip as error:  # left out when it comes up
            failed.append(error)
            continue
        seconds.append(time.perf_counter() - began)
        tensors.append(found)
        audio = found["audio"][found["audio_mask"]].float()
        inside = slice(found["video"].shape[-1] // 4, -(found["video"].shape[-1] // 4) or None)
        video = found["video"][found["video_mask"]][..., inside, inside].float()  # without the borders of padding
        silent += not audio.numel() or float(audio.max() - audio.min()) < SILENCE
        dark += bool(video.numel()) and float(video.std()) < DARKNESS
    return Decoded(tuple(tensors), statistics.median(seconds) if seconds else 0.0, silent, dark, tuple(failed))


def check_decodable(loaded: Loaded, root: Path, clips: Mapping[str, Sequence[ClipExamples]]) -> None:
    """Raises UserError for a split of which no clip can be decoded: headers may be whole where the rest is not."""
    for split, own in clips.items():
        errors = []
        for clip in own:
            try:
                load_clip(loaded.processor.feature_extractor, root, clip)
                break
            except BadClip as error:
                errors.append(error)
        else:
            raise UserError(f"{root}: none of {len(own)} {split} clips can be decoded, the first: {errors[0]}")


def measure_pace(
    recipe: Recipe, loaded: Loaded, examples: Sequence[Example], clip: dict[str, Tensor], device: torch.device
) -> Pace:
    """Times training steps of the recipe's only stage, on copies of one clip; changes the loaded model."""
    [stage] = recipe.stages.values()
    model = loaded.model.to(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.trains is None or find_trainable_component(name) in stage.trains)
    model.config.loss_weights = stage.loss_weights
    share = stage.clips_per_step // recipe.accumulation
    rows = [examples[place % len(examples)] for place in range(share * stage.questions_per_clip)]
    text = loaded.processor.encode_text([row.prompt for row in rows], [row.target for row in rows])
    media = loaded.processor.feature_extractor.collate([clip] * share)
    batch = {name: value.to(device) for name, value in {**media, **text}.items()}
    encoding = 0.0
    if recipe.data.feature_cache is not None:  # the encoders compute a clip once, not in every step
        compute_features(model, batch)  # the first time is longer
        features, seconds = _time(lambda: compute_features(model, batch), device)
        batch, encoding = batch | features, seconds / share
        del batch["video"], batch["audio"]
    optimizer = Optimizer(model, recipe.optimizer)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(recipe.accumulation):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = compute_stage_losses(model, stage, batch)["loss"]
            loss.backward()
        optimizer.clip_gradients()
        optimizer.step()

    seconds = [_time(step, device)[1] for _ in range(1 + TIMED_STEPS)]
    return Pace(statistics.median(seconds[1:]), encoding)


def _time(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a function returns, and how many seconds it takes."""
    began = time.perf_counter()
    found = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - began
