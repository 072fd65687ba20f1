"""Bytes of a run: in the memory of each device, and on disk."""

from dataclasses import dataclass

from torch import nn

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import OptimizerRecipe, Recipe
from mirasol.cost.step import StepCost
from mirasol.media.augment import compute_decode_size
from mirasol.model.kernels import find_layers
from mirasol.training.optim import split_by_decay

FLOAT = 4  # bytes: weights, gradients and moments are float32


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    weights: those of the moving average (`ema`) included; with FSDP this process's share, as of gradients and optimizer
    gathered: FSDP only: weights and gradients of the layers in use, gathered from all processes
    activations: what the forward pass keeps for the backward pass of one microbatch
    peak: the most in use at a time: all of the above and intermediate results
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    peak: int


def compute_device_memory(recipe: Recipe, model: nn.Module, cost: StepCost, optimizer: int, processes: int) -> Memory:
    """Bytes on one of `processes` devices, in a stage that trains the model's weights with `requires_grad`; `optimizer`
    is the size of all moments.

    With FSDP two layers are gathered at a time, the current one and the next (all of them with `parallel.reshard:
    false`), and everything outside of the layers (embeddings, projections) all the time; a layer's gradients leave as
    soon as they are complete.
    """
    weights = count_weight_bytes(model)
    gradients = FLOAT * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    average = weights if recipe.ema is not None else 0
    if recipe.parallel.kind != "fsdp":
        # Gradients of earlier microbatches are there when a later one is computed.
        during = cost.peak_bytes + (gradients if recipe.accumulation > 1 else 0)
        peak = weights + average + optimizer + max(during, gradients)
        return Memory(weights + average, gradients, optimizer, 0, cost.saved_bytes, peak)
    size = 2 if recipe.precision == "bf16" else FLOAT
    inside = [sum(parameter.numel() for parameter in layer.parameters()) for layer in find_layers(model)]
    outside, largest = weights // FLOAT - sum(inside), max(inside, default=0)
    # Weights, and their gradients until they have left.
    gathered = size * (2 * outside + (3 * largest if recipe.parallel.reshard else sum(inside) + largest))
    shares = [-(-part // processes) for part in (weights + average, gradients, optimizer)]
    return Memory(*shares, gathered, cost.saved_bytes, sum(shares) + gathered + cost.peak_bytes)


def count_weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights."""
    return FLOAT * sum(parameter.numel() for parameter in model.parameters())


def count_optimizer_bytes(model: nn.Module, settings: OptimizerRecipe) -> int:
    """Bytes of the optimizer's moments: two for each trained weight, one for each weight of Muon's matrices."""
    decay, no_decay = split_by_decay(model)
    numbers = sum(parameter.numel() for parameter in [*decay.values(), *no_decay.values()])
    matrices = sum(parameter.numel() for parameter in decay.values() if parameter.ndim == 2)
    return FLOAT * (2 * numbers - (matrices if settings.name == "muon" else 0))


def count_clip_bytes(config: MirasolConfig, chunks: int, crop: float = 1.0) -> int:
    """Bytes of a decoded clip: uint8 pixels, more of them where crops are taken, and a float16 spectrogram."""
    video, audio = config.video, config.audio
    pixels = video.frames_per_chunk * 3 * compute_decode_size(video.image_size, crop) ** 2
    return chunks * (pixels + 2 * audio.spectrogram_frames * audio.num_mel_bins)


def count_kept_checkpoints(recipe: Recipe) -> int:
    """The most checkpoints on disk at a time: the newest, the best, and one that is being written."""
    return recipe.keep_last + 1 + (recipe.keep_best is not None)
