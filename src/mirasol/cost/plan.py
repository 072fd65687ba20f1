"""What a run costs, told before it begins: parameters, memory, FLOPs, time and disk, stage by stage."""

import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mirasol.checkpoint import find_checkpoint, load_processor, read_config
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import OptimizerRecipe, Recipe, Stage
from mirasol.cost.counting import StepCost, StepShape, step_cost
from mirasol.data.sampler import BatchPlan
from mirasol.data.splits import read_data
from mirasol.errors import UserError
from mirasol.media.augment import compute_decode_size
from mirasol.model.execution import layers
from mirasol.model.mirasol import MirasolForConditionalGeneration
from mirasol.model.regularisation import regularise, stack_configs
from mirasol.training.build import with_media_size
from mirasol.training.optim import decay_groups
from mirasol.training.regularisers import Regularisers
from mirasol.training.stages import StageWeights

# Dense bfloat16 TFLOP/s of the data sheets; the first name found in a device's own counts.
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
ASSUMED = "H100"
FLOAT = 4  # bytes: weights, gradients and moments are float32
SAMPLED_CLIPS = 32


@dataclass(frozen=True)
class Assumptions:
    """What a recipe leaves open. None takes it from the data, or from the model where there are none.

    processes: how many run together, one for each device
    mfu: share of the peak that is reached, of the FLOPs that a step needs (those of recomputation not counted)
    peak_tflops: of one device; None is the data sheet's of the GPU here. Without a GPU it is an H100's for `device:
        cuda` and for recipes whose `parallel.kind` shares the work, else what a matrix product reaches here
    chunks: chunks of a clip; text_length: tokens of a text row; target_tokens: those of them that are target
    preset: stands in for the checkpoint that `model.init` names
    """

    processes: int = 1
    mfu: float = 0.4
    peak_tflops: float | None = None
    chunks: int | None = None
    text_length: int | None = None
    target_tokens: int | None = None
    preset: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    weights: with FSDP this process's share, like gradients and optimizer; the moving average (`ema`) is among them
    gathered: FSDP only: weights and gradients of the layers at hand, brought together from all processes
    activations: what the forward pass keeps for the backward pass of one microbatch
    peak: the most that is held at a time: all of the above, passing results included
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    peak: int


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    shape: a microbatch of one process; `microbatches` of them, on every process, make a step
    step_flops: of all processes together for one step, recomputation not counted; `recomputed_flops` are its own
    clips: how many it draws from; None where the data are not there; `epochs` of them are seen
    """

    steps: int
    shape: StepShape
    microbatches: int
    trained: int
    cost: StepCost
    step_flops: int
    recomputed_flops: int
    memory: Memory
    step_seconds: float
    seconds: float
    clips: int | None
    epochs: float | None
    epoch_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    components: parameters by component, and how many of them each stage trains
    checkpoint_bytes: of one checkpoint with its optimizer; result_bytes: of the finished model
    clip_bytes: of one decoded clip in the cache
    notes: what was assumed
    """

    processes: int
    kind: str
    mfu: float
    peak_tflops: float
    peak_is: str
    components: dict[str, dict[str, Any]]
    parameters: int
    stages: dict[str, StagePlan]
    seconds: float
    checkpoint_bytes: int
    result_bytes: int
    disk_bytes: int
    clip_bytes: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def plan_run(recipe: Recipe, given: Assumptions) -> Plan:
    """Counts what the recipe costs; nothing of the model is allocated and nothing is written.

    Raises:
        UserError: a checkpoint in `model.init` that is not there (and no preset in its place), or clips of a step
            that do not divide among processes and microbatches.
    """
    if given.processes > 1 and recipe.parallel.kind == "none":
        raise UserError(f"--processes {given.processes}: set parallel.kind to ddp or fsdp")
    notes: list[str] = []
    if recipe.compile:
        notes.append("compile: counted as without it; compiled layers save less")
    config = planned_config(recipe, given.preset, notes)
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
    chosen = StageWeights(recipe, model)
    chosen.enter(None)
    optimizer = optimizer_bytes(model, recipe.optimizer)
    clips = clips_of_stages(recipe, notes)
    peak, source = peak_tflops(recipe, given)
    counted: dict[Any, StepCost] = {}
    stages = {}
    for name, stage in recipe.stages.items():
        shape, microbatches = stage_shape(recipe, name, config, given, clips.get(name), notes)
        chosen.enter(name)
        cost = _cost(recipe, model, stage, shape, microbatches, counted, chosen.trained[name])
        memory = device_memory(recipe, model, cost, shape, microbatches, optimizer, given.processes)
        every = microbatches * given.processes
        needed = every * (cost.forward_flops + cost.backward_flops)
        seconds = needed / (given.mfu * peak * 1e12 * given.processes)
        found = None if clips.get(name) is None else len(clips[name])
        stages[name] = StagePlan(
            stage.steps, shape, microbatches, sum(p.numel() for p in model.parameters() if p.requires_grad), cost,
            needed, every * cost.recomputed_flops, memory, seconds, seconds * stage.steps, found,
            None if found is None else stage.steps * stage.clips_per_step / found,
            None if found is None else seconds * found / stage.clips_per_step,
        )  # fmt: skip
    weights = FLOAT * sum(parameter.numel() for parameter in model.parameters())
    checkpoint = weights + optimizer + (weights if recipe.ema is not None else 0)
    return Plan(
        given.processes, recipe.parallel.kind, given.mfu, peak, source, chosen.to_dict(), weights // FLOAT,
        stages, sum(stage.seconds for stage in stages.values()), checkpoint, weights,
        kept_checkpoints(recipe) * checkpoint + weights,
        max(clip_bytes(config, stages[name].shape.chunks, stage.augment.crop) for name, stage in recipe.stages.items()),
        list(dict.fromkeys(notes)),
    )  # fmt: skip


def planned_config(recipe: Recipe, preset: str | None, notes: list[str]) -> MirasolConfig:
    """The config of the model that the recipe trains.

    Raises:
        UserError: `model.init` names a checkpoint that is not there, and no preset stands in for it.
    """
    if recipe.model.init is None:
        config = MirasolConfig.preset(preset or recipe.model.preset, **recipe.model.overrides)
        if recipe.tokenizer.init is not None:
            config.vocab_size = len(load_processor(recipe.tokenizer.init).tokenizer)
        elif config.vocab_size != recipe.tokenizer.vocab_size:
            config.vocab_size = recipe.tokenizer.vocab_size
            notes.append(f"vocabulary: the {config.vocab_size:,} pieces that tokenizer.vocab_size allows")
        return config
    if preset is not None:
        notes.append(f"model.init={recipe.model.init}: counted as a model of the preset {preset}")
        return with_media_size(MirasolConfig.preset(preset, **recipe.model.overrides), recipe.model)
    try:
        return with_media_size(read_config(find_checkpoint(recipe.model.init)), recipe.model)
    except UserError as error:
        raise UserError(f"model.init: {error}, or plan with --preset, e.g. --preset 3b") from error


def clips_of_stages(recipe: Recipe, notes: list[str]) -> dict[str, Sequence[Any]]:
    """The clips that each stage draws from; nothing where the data cannot be read, which a note says."""
    try:
        examples, _ = read_data(recipe.data, "train")
        return dict(BatchPlan(recipe, examples).clips)
    except (UserError, OSError) as error:
        notes.append(f"epochs are not told, for the data cannot be read: {error}")
        return {}


def stage_shape(
    recipe: Recipe,
    name: str,
    config: MirasolConfig,
    given: Assumptions,
    clips: Sequence[Any] | None,
    notes: list[str],
) -> tuple[StepShape, int]:
    """A microbatch of one process in the stage, and how many of them a process takes for a step."""
    stage, microbatches = recipe.stages[name], recipe.accumulation
    share, left = divmod(stage.clips_per_step, microbatches * given.processes)
    if left:
        raise UserError(
            f"stages.{name}.clips_per_step={stage.clips_per_step} does not divide among {given.processes} processes "
            f"x {microbatches} microbatches"
        )
    length = given.text_length or config.text.max_length
    if given.text_length is None:
        notes.append(f"text rows are counted with text.max_length={length} tokens, the most there can be")
    targets = length - 1 if given.target_tokens is None else min(given.target_tokens, length - 1)
    images = stage.objective == "image_text"
    chunks = 1 if images else given.chunks or chunks_of(config, recipe, clips, notes)
    return StepShape(share, chunks, stage.rows_per_clip, length, targets, stage.objective), microbatches


def chunks_of(config: MirasolConfig, recipe: Recipe, clips: Sequence[Any] | None, notes: list[str]) -> int:
    """Chunks of the longest among some clips; of any clip, where none can be looked at."""
    from mirasol.data.check import media_facts
    from mirasol.media.timeline import cut_into_chunks

    chunking = config.chunking
    if chunking.num_chunks is not None:
        return chunking.num_chunks
    grid = _grid(config)
    found = []
    some = [] if not clips else [clips[place] for place in range(0, len(clips), max(1, len(clips) // SAMPLED_CLIPS))]
    for clip in some[:SAMPLED_CLIPS]:
        end = clip.end
        if end is None:
            end = media_facts(recipe.data.folder, clip.media).seconds
        if end is not None:
            found.append(cut_into_chunks(clip.start or 0.0, end, grid).num_chunks)
    if found:
        notes.append(f"chunks of a clip: the most among {len(found)} clips looked at")
        return max(found)
    notes.append(f"chunks of a clip: chunking.max_chunks={chunking.max_chunks}, the most there can be (--chunks)")
    return chunking.max_chunks


def _grid(config: MirasolConfig) -> Any:
    from mirasol.media.timeline import ChunkGrid

    chunking = config.chunking
    return ChunkGrid(config.video.frames_per_chunk, chunking.chunk_seconds, chunking.num_chunks, chunking.max_chunks)


def _cost(
    recipe: Recipe,
    model: MirasolForConditionalGeneration,
    stage: Stage,
    shape: StepShape,
    microbatches: int,
    counted: dict[Any, StepCost],
    trained: frozenset[str],
) -> StepCost:
    """The stage's microbatch, counted once for all stages that are alike."""
    sharded = recipe.parallel.kind == "fsdp"
    precision = "bf16 weights" if sharded and recipe.precision == "bf16" else recipe.precision
    rates = (stage.dropout, stage.layer_drop, stage.label_smoothing)
    key = (shape, str(stage.loss_weights), rates, trained)
    if key not in counted:
        model = copy.deepcopy(model)
        model.config.loss_weights = stage.loss_weights
        Regularisers(model).enter(stage)
        if not _runs_on_processor(recipe) and not torch.cuda.is_available():
            # A GPU's kernels drop weights of attention without keeping any; a processor's, asked here, keep them all.
            for stack in stack_configs(model.config).values():
                stack.attention_dropout = 0.0
            regularise(model)
        counted[key] = step_cost(
            model, shape, precision, recipe.recompute, keep_gradients=not sharded, device=_rules(recipe)
        )
    return counted[key]


def _rules(recipe: Recipe) -> str:
    return "cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu"


def device_memory(
    recipe: Recipe,
    model: nn.Module,
    cost: StepCost,
    shape: StepShape,
    microbatches: int,
    optimizer: int,
    processes: int,
) -> Memory:
    """Bytes on one device, of `processes`, in a stage whose weights are frozen or not as the model's are.

    With FSDP two layers are there at a time, the one at hand and the next (all of them with `parallel.reshard: false`),
    and whatever lies outside of all layers (embeddings, projections) all the time; gradients leave as soon as a layer
    has them.
    """
    weights = FLOAT * sum(parameter.numel() for parameter in model.parameters())
    gradients = FLOAT * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    average = weights if recipe.ema is not None else 0
    if recipe.parallel.kind != "fsdp":
        # Gradients of earlier microbatches are there when a later one is computed.
        during = cost.peak_bytes + (gradients if microbatches > 1 else 0)
        peak = weights + average + optimizer + max(during, gradients)
        return Memory(weights + average, gradients, optimizer, 0, cost.saved_bytes, peak)
    size = 2 if recipe.precision == "bf16" else FLOAT
    inside = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers(model)]
    outside, largest = weights // FLOAT - sum(inside), max(inside, default=0)
    # Weights, and their gradients until they have left.
    gathered = size * (2 * outside + (3 * largest if recipe.parallel.reshard else sum(inside) + largest))
    shares = [-(-part // processes) for part in (weights + average, gradients, optimizer)]
    return Memory(*shares, gathered, cost.saved_bytes, sum(shares) + gathered + cost.peak_bytes)


def optimizer_bytes(model: nn.Module, settings: OptimizerRecipe) -> int:
    """Bytes of the optimizer's moments: two for a trainable weight, one for a matrix that Muon has."""
    decay, no_decay = decay_groups(model)
    numbers = sum(parameter.numel() for parameter in [*decay.values(), *no_decay.values()])
    matrices = sum(parameter.numel() for parameter in decay.values() if parameter.ndim == 2)
    return FLOAT * (2 * numbers - (matrices if settings.name == "muon" else 0))


def clip_bytes(config: MirasolConfig, chunks: int, crop: float = 1.0) -> int:
    """Bytes of a decoded clip: uint8 pixels, more of them where crops are taken, and a float16 spectrogram."""
    video, audio = config.video, config.audio
    pixels = video.frames_per_chunk * 3 * compute_decode_size(video.image_size, crop) ** 2
    return chunks * (pixels + 2 * audio.spectrogram_frames * audio.num_mel_bins)


def peak_tflops(recipe: Recipe, given: Assumptions) -> tuple[float, str]:
    """TFLOP/s of one device, and where the figure is from."""
    if given.peak_tflops is not None:
        return given.peak_tflops, "as given"
    if _runs_on_processor(recipe):
        return _measured_tflops(), "a matrix product in float32, measured here"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ASSUMED
    for known, peak in PEAKS.items():
        if known in name:
            return peak, f"data sheet of {known}, dense bfloat16"
    raise UserError(f"--peak-tflops: the peak of {name} is not known here: give it")


def _runs_on_processor(recipe: Recipe) -> bool:
    """A recipe for several devices is planned on a laptop and runs elsewhere; another one would run right here."""
    here = torch.cuda.is_available()
    return recipe.device == "cpu" or (recipe.device == "auto" and recipe.parallel.kind == "none" and not here)


def _measured_tflops(size: int = 1024) -> float:
    left, seconds = torch.ones(size, size), []
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def kept_checkpoints(recipe: Recipe) -> int:
    """The most checkpoints on disk at a time: the newest, the best, and one that is being written."""
    return recipe.keep_last + 1 + (recipe.keep_best is not None)
