"""What a run will cost: parameters, memory, FLOPs, time and disk, stage by stage, before it starts."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mirasol.checkpoint import Untrained, find_checkpoint, load_processor, read_config
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe, Stage
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.counting import build_on_meta
from mirasol.cost.devices import find_peak_tflops, runs_on_processor
from mirasol.cost.features import FeatureCosts, FeaturePlan
from mirasol.cost.memory import (
    FLOAT,
    Memory,
    compute_device_memory,
    count_clip_bytes,
    count_kept_checkpoints,
    count_optimizer_bytes,
    count_weight_bytes,
)
from mirasol.cost.step import StepCost, StepShape, count_step_cost
from mirasol.data.check import check_media_file
from mirasol.data.datasets.registry import find_published
from mirasol.data.epochs import EpochOrder
from mirasol.data.example import ClipExamples
from mirasol.data.sampler import BatchPlan
from mirasol.data.splits import read_data
from mirasol.errors import UserError
from mirasol.media.timeline import ChunkGrid, cut_into_chunks
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.training.weights.initial import InitialWeights, change_config, find_initial_weights
from mirasol.training.weights.lora import add_adapters, is_adapter
from mirasol.training.weights.stages import Regularisers, StageWeights

SAMPLED_CLIPS = 32


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    shape: a microbatch of one process; a step is `microbatches` of them in every process
    step_flops: of all processes together for one step, without recomputation, which `recomputed_flops` counts
    clips: number of clips to draw from, None if the data cannot be read
    epochs: passes over the clips, or over their questions where the recipe gives epochs
    epoch_seconds: of the first epoch
    features: what a feature cache changes, None without one: then `cost`, `step_flops` and `step_seconds` are those of
        steps that find all features
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
    features: FeaturePlan | None = None


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    kind: `parallel.kind`; peak_is: the source of peak_tflops
    components: for each component its `parameters` and, by stage, how many of them are `trained`
    initial: for each component how many weights are `loaded` from `model.init`, of these `untrained`, `new`, `unused`
    checkpoint_bytes: of one checkpoint with its optimizer; result_bytes: of the finished model
    clip_bytes: of one decoded clip in the cache
    feature_bytes: of all clips in the feature cache; None without one, or where the number of clips is unknown
    notes: what was assumed
    """

    processes: int
    kind: str
    mfu: float
    peak_tflops: float
    peak_is: str
    components: dict[str, dict[str, Any]]
    initial: dict[str, dict[str, int]]
    parameters: int
    stages: dict[str, StagePlan]
    seconds: float
    checkpoint_bytes: int
    result_bytes: int
    disk_bytes: int
    clip_bytes: int
    feature_bytes: int | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def plan_run(recipe: Recipe, given: Assumptions) -> Plan:
    """Counts what the recipe costs; nothing of the model is allocated and nothing is written.

    Raises:
        UserError: a missing checkpoint in `model.init` (and no preset to use instead), or clips of a step that do not
            divide among processes and microbatches.
    """
    given.check_against(recipe)
    notes = ["compile: counted as if the compiler kept everything for backward"] if recipe.compile else []
    config = find_planned_config(recipe, given.preset, notes)
    model = build_on_meta(config).train()
    add_adapters(model, recipe)
    adapters = FLOAT * sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name))
    initial = find_planned_weights(recipe, config, given.preset, notes)
    chosen = StageWeights(recipe, model, initial.untrained)
    notes += [f"mirasol train refuses this: {line}" for line in chosen.describe_frozen_random()]
    chosen.enter(None)
    weights, optimizer = count_weight_bytes(model), count_optimizer_bytes(model, recipe.optimizer)
    recipe, clips = read_clips_of_stages(recipe, notes)
    peak, source = find_peak_tflops(recipe, given.peak_tflops)
    counted: dict[Any, StepCost] = {}
    stages, features = {}, FeatureCosts(recipe, config, chosen, notes)
    for name, stage in recipe.stages.items():
        shape = find_step_shape(recipe, name, config, given, clips.get(name), notes)
        shape = dataclasses.replace(shape, features=name in features.stages)
        chosen.enter(name)
        cost = _count_stage_cost(recipe, model, stage, shape, counted, chosen.trained[name], given.memory_alone)
        memory = compute_device_memory(recipe, model, cost, optimizer, given.processes)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        stages[name] = _plan_stage(recipe, name, given, shape, trained, cost, memory, peak, clips.get(name))
        if shape.features:
            stages[name] = _add_features(stages[name], recipe, name, given, features, model, clips.get(name), peak)
    checkpoint = weights + optimizer + (weights if recipe.ema is not None else 0)
    return Plan(
        processes=given.processes,
        kind=recipe.parallel.kind,
        mfu=given.mfu,
        peak_tflops=peak,
        peak_is=source,
        components=chosen.to_dict(),
        initial=initial.count_by_component(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        stages=stages,
        seconds=sum(stage.seconds for stage in stages.values()),
        checkpoint_bytes=checkpoint,
        result_bytes=weights - adapters,  # merged
        disk_bytes=count_kept_checkpoints(recipe) * checkpoint + weights - adapters,
        clip_bytes=max(
            count_clip_bytes(config, stages[name].shape.chunks, stage.augment.crop)
            for name, stage in recipe.stages.items()
        ),
        feature_bytes=features.count_kept_bytes(),
        notes=list(dict.fromkeys(notes)),
    )


def _plan_stage(
    recipe: Recipe,
    name: str,
    given: Assumptions,
    shape: StepShape,
    trained: int,
    cost: StepCost,
    memory: Memory,
    peak_tflops: float,
    clips: Sequence[ClipExamples] | None,
) -> StagePlan:
    stage, parallel = recipe.stages[name], recipe.accumulation * given.processes
    step_flops = parallel * (cost.forward_flops + cost.backward_flops)
    seconds = step_flops / (given.mfu * peak_tflops * 1e12 * given.processes)
    epochs = stage.epochs
    if epochs is None and clips is not None:
        epochs = stage.steps * stage.clips_per_step / len(clips)
    return StagePlan(
        steps=stage.steps,
        shape=shape,
        microbatches=recipe.accumulation,
        trained=trained,
        cost=cost,
        step_flops=step_flops,
        recomputed_flops=parallel * cost.recomputed_flops,
        memory=memory,
        step_seconds=seconds,
        seconds=seconds * stage.steps,
        clips=None if clips is None else len(clips),
        epochs=epochs,
        epoch_seconds=None if epochs is None else seconds * stage.steps / epochs,
    )


def _add_features(
    plan: StagePlan,
    recipe: Recipe,
    name: str,
    given: Assumptions,
    features: FeatureCosts,
    model: MirasolForConditionalGeneration,
    clips: Sequence[ClipExamples] | None,
    peak_tflops: float,
) -> StagePlan:
    """The plan of a stage of steps over features, with the time and the memory that computing these takes."""
    encoding = features.find_encoding(model, plan.shape.chunks)
    size = features.count_clip_bytes(encoding)
    found = features.count_computed(name, clips, size)
    seconds = encoding.flops / (given.mfu * peak_tflops * 1e12 * given.processes)
    # The features of all microbatches are there from the start, those of a clip are computed before the step.
    held = plan.shape.clips * encoding.feature_bytes
    before = plan.memory.weights + plan.memory.optimizer
    peak = max(
        plan.memory.peak + (plan.microbatches - 1) * held,
        before + plan.microbatches * held + encoding.peak_bytes,
    )
    epoch, stage = plan.epoch_seconds, recipe.stages[name]
    first = later = None
    if epoch is not None and clips is not None:
        shown = min(len(clips), stage.steps * stage.clips_per_step)
        first, later = epoch + seconds * min(found.new, shown), epoch + seconds * min(found.left, shown)
    return dataclasses.replace(
        plan,
        memory=dataclasses.replace(plan.memory, peak=peak),
        seconds=plan.seconds + seconds * found.computed,
        epoch_seconds=first,
        features=FeaturePlan(encoding.flops, size, None if clips is None else found.kept * size, found.computed, later),
    )


def find_planned_config(recipe: Recipe, preset: str | None, notes: list[str]) -> MirasolConfig:
    """The config of the model that the recipe trains; adds to `notes` what had to be assumed.

    Raises:
        UserError: `model.init` names a missing checkpoint, and there is no preset to use instead.
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
        return change_config(MirasolConfig.preset(preset), recipe.model)
    try:
        return change_config(read_config(find_checkpoint(recipe.model.init)), recipe.model)
    except UserError as error:
        raise UserError(f"model.init: {error}, or plan with --preset, e.g. --preset 3b") from error


def find_planned_weights(recipe: Recipe, config: MirasolConfig, preset: str | None, notes: list[str]) -> InitialWeights:
    """Where the weights come from; all unknown, with a note, where a preset stands in for the checkpoint."""
    if recipe.model.init is None or preset is None:
        return find_initial_weights(recipe, config)
    notes.append("which weights are random at the start is not known without the checkpoint")
    return InitialWeights({}, {}, {}, Untrained())


def read_clips_of_stages(recipe: Recipe, notes: list[str]) -> tuple[Recipe, dict[str, Sequence[ClipExamples]]]:
    """The recipe with its epochs counted in steps, and the clips that each stage draws from; no clips, with a note, if
    the data cannot be read.

    Raises UserError for epochs of data that cannot be read and whose number of questions is not published.
    """
    try:
        examples, _ = read_data(recipe.data, "train")
        plan = BatchPlan(recipe, examples)
        orders = {name: order for name, order in plan.mixtures.items() if isinstance(order, EpochOrder)}
        notes += [f"steps of {name}: {order.describe()}" for name, order in orders.items()]
        return plan.recipe, dict(plan.clips)
    except (UserError, OSError) as error:
        notes.append(f"epochs unknown: the data cannot be read: {error}")
        steps = {
            name: _count_published_steps(recipe, name, str(error), notes)
            for name, stage in recipe.stages.items()
            if stage.epochs is not None
        }
        return recipe.count_epochs(steps), {}


def _count_published_steps(recipe: Recipe, name: str, problem: str, notes: list[str]) -> int:
    """The steps of a stage's epochs over as many questions as its data set publishes, with a note."""
    stage, total = recipe.stages[name], 0
    for data_set in stage.data_sets or recipe.data.data_sets:
        data = recipe.data.data_sets[data_set]
        published = find_published(data.dataset, data.train_split).examples
        if published is None or stage.questions_per_clip > 1 or stage.question_types is not None:
            raise UserError(
                f"stages.{name}.epochs={stage.epochs}: its number of steps is unknown, for the data cannot be read "
                f"({problem}): set stages.{name}.epochs to null and stages.{name}.steps to plan without them"
            )
        total += published
    notes.append(f"steps of {name}: {stage.epochs} epochs of the {total:,} published training examples")
    return -(-stage.epochs * total // stage.clips_per_step)


def find_step_shape(
    recipe: Recipe,
    name: str,
    config: MirasolConfig,
    given: Assumptions,
    clips: Sequence[ClipExamples] | None,
    notes: list[str],
) -> StepShape:
    """A microbatch of one process in the stage; adds to `notes` what had to be assumed."""
    stage = recipe.stages[name]
    share = stage.clips_per_step // (recipe.accumulation * given.processes)
    length = given.text_length or recipe.data.max_text_length or config.text.max_length
    if given.text_length is None:
        key = "text.max_length" if recipe.data.max_text_length is None else "data.max_text_length"
        notes.append(f"text rows are counted with {key}={length} tokens, the longest possible")
    targets = length - 1 if given.target_tokens is None else min(given.target_tokens, length - 1)
    images = stage.objective == "image_text"
    chunks = 1 if images else given.chunks or find_chunks(config, recipe, clips, notes)
    return StepShape(share, chunks, stage.rows_per_clip, length, targets, stage.objective)


def find_chunks(config: MirasolConfig, recipe: Recipe, clips: Sequence[ClipExamples] | None, notes: list[str]) -> int:
    """Chunks of the longest of some clips; without clips, the most that the model takes."""
    chunking = config.chunking
    if chunking.num_chunks is not None:
        return chunking.num_chunks
    grid = ChunkGrid(config.video.frames_per_chunk, chunking.chunk_seconds, chunking.num_chunks, chunking.max_chunks)
    found = []
    some = [] if not clips else [clips[place] for place in range(0, len(clips), max(1, len(clips) // SAMPLED_CLIPS))]
    for clip in some[:SAMPLED_CLIPS]:
        end = clip.end
        if end is None:
            end = check_media_file(recipe.data.folder, clip.media).seconds
        if end is not None:
            found.append(cut_into_chunks(clip.start or 0.0, end, grid).num_chunks)
    if found:
        notes.append(f"chunks of a clip: the most among {len(found)} sampled clips")
        return max(found)
    longest = f"{chunking.max_chunks} chunks (chunking.max_chunks), {chunking.max_chunks * chunking.chunk_seconds:g} s"
    notes.append(
        f"time and memory are at most these: without the data every clip is counted with {longest}; shorter clips take "
        f"less: --chunks N counts N chunks of {chunking.chunk_seconds:g} s"
    )
    return chunking.max_chunks


def _count_stage_cost(
    recipe: Recipe,
    model: MirasolForConditionalGeneration,
    stage: Stage,
    shape: StepShape,
    counted: dict[Any, StepCost],
    trained: frozenset[str],
    memory_alone: bool,
) -> StepCost:
    """The cost of a microbatch; stages that are alike are counted once and kept in `counted`."""
    sharded = recipe.parallel.kind == "fsdp"
    precision = "bf16 weights" if sharded and recipe.precision == "bf16" else recipe.precision
    rates = (stage.dropout, stage.layer_drop, stage.label_smoothing)
    key = (shape, str(stage.loss_weights), rates, trained)
    if key not in counted:
        model = copy.deepcopy(model)
        model.config.loss_weights = stage.loss_weights
        Regularisers(model).enter(stage)
        if not runs_on_processor(recipe) and not torch.cuda.is_available():
            # A GPU's kernels drop attention weights without storing them; a processor's, used here, store them all.
            for stack in model.config.stacks.values():
                stack.attention_dropout = 0.0
            model.apply_dropout_rates()
        device = "cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu"
        counted[key] = count_step_cost(
            model, shape, precision, recipe.recompute, not sharded, device, recipe.compile, memory_alone
        )
    return counted[key]
