"""Everything a run is made of, built once before its first step."""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

# From the top of the package, which registers them with the Auto classes that load the processor's parts.
from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration, MirasolProcessor
from mirasol.checkpoint import Loaded, find_checkpoint, load_processor, read_config
from mirasol.config.checks import merge_mappings
from mirasol.config.model import FORMAT_1_VALUES
from mirasol.config.parts import LossWeights, TextConfig
from mirasol.config.recipe import Recipe
from mirasol.console import Progress, print_line
from mirasol.data.clip_cache import BadWindow, ClipCache, UnreadableWindow, write_bad_clips
from mirasol.data.digest import ExamplesDigest, digest_examples
from mirasol.data.epochs import EpochOrder
from mirasol.data.example import Example
from mirasol.data.feature_cache import FeatureCache
from mirasol.data.loader import (
    BatchTexts,
    ClipAugment,
    RowsOfRank,
    StepBatches,
    StepLoader,
    compute_decoded_sizes,
    make_loader,
)
from mirasol.data.randomness import hash64
from mirasol.data.sampler import KINDS, BatchPlan
from mirasol.data.splits import collect_tokenizer_texts, read_data
from mirasol.data.text_lengths import LongText, TextLimit, write_long_texts
from mirasol.data.workers import WorkerStatus
from mirasol.errors import UserError
from mirasol.files import write_folder_atomically
from mirasol.media.tokenizer import train_tokenizer
from mirasol.training.batches import BatchStream
from mirasol.training.checkpoint import Checkpoints, Tensors
from mirasol.training.distributed import ParallelModel, Ranks
from mirasol.training.features import FeatureEncoder, hash_encoders, make_feature_cache
from mirasol.training.logging import BestStep, RunLog, check_metric, check_tracker, make_tracker, read_metrics
from mirasol.training.measures import Clock
from mirasol.training.optim import Optimizer, WeightAverage
from mirasol.training.run_folder import RunFolder
from mirasol.training.samples import Samples
from mirasol.training.signals import StopSignals
from mirasol.training.validation import Validation
from mirasol.training.weights.initial import change_config, find_initial_weights, load_initial
from mirasol.training.weights.lora import add_adapters
from mirasol.training.weights.stages import Regularisers, StageWeights, check_augmentation

if TYPE_CHECKING:
    from rich.console import Console


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The recipe's device; with several GPUs, the one of process `local_rank` of this machine.

    Raises UserError for `cuda` without a GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda: PyTorch finds no GPU: use device: auto or cpu")
    return torch.device("cuda", local_rank) if available and name != "cpu" else torch.device("cpu")


def make_processor(
    recipe: Recipe, examples: list[Example], initial: Loaded | None, saved: Path | None
) -> MirasolProcessor:
    """The run's processor: the `saved` one of a resumed run, that of `model.init`, or a new one, whose tokenizer comes
    from a checkpoint or is trained on the training texts."""
    if saved is not None and saved.is_dir():
        return MirasolProcessor.from_pretrained(saved)
    if initial is not None:
        return initial.processor
    config = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)
    if recipe.tokenizer.init is not None:
        tokenizer = load_processor(recipe.tokenizer.init).tokenizer
    else:
        tokenizer = train_tokenizer(collect_tokenizer_texts(examples), recipe.tokenizer.vocab_size)
    return MirasolProcessor(MirasolFeatureExtractor.for_config(config), tokenizer, config.text.longest_text)


def make_model(
    recipe: Recipe, processor: MirasolProcessor, initial: Loaded | None, facts: Mapping[str, Any] | None = None
) -> MirasolForConditionalGeneration:
    """The model of `model.init`, or a new one from the preset, with the tokenizer's vocabulary size.

    facts: the run.json of a resumed run, whose model has the config that is recorded there
    """
    if initial is not None:
        return initial.model
    torch.manual_seed(hash64(recipe.seed, "weights") >> 1)
    return MirasolForConditionalGeneration(_make_config(recipe, processor, facts))


def make_outline(
    recipe: Recipe, processor: MirasolProcessor, facts: Mapping[str, Any] | None = None
) -> MirasolForConditionalGeneration:
    """The model of `make_model` on the meta device: another process has its weights."""
    if recipe.model.init is not None:
        config = MirasolConfig.from_pretrained(find_checkpoint(recipe.model.init))
        config = change_config(config, recipe.model)
    else:
        config = _make_config(recipe, processor, facts)
    with torch.device("meta"):
        return MirasolForConditionalGeneration(config)


def _make_config(recipe: Recipe, processor: MirasolProcessor, facts: Mapping[str, Any] | None) -> MirasolConfig:
    if facts is not None:
        config = read_recorded_config(recipe, facts)
    else:
        config = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)
    config.vocab_size = len(processor.tokenizer)
    return config


def read_recorded_config(recipe: Recipe, facts: Mapping[str, Any]) -> MirasolConfig:
    """The config of a run's model, from its run.json: presets may have changed since the run began.

    Raises UserError for a config that cannot be read.
    """
    if facts.get("model_config"):
        return MirasolConfig(**facts["model_config"])
    # Runs of versions that did not record the config; their models are of format 1.
    if recipe.model.init is not None:
        return read_config(find_checkpoint(recipe.model.init))
    return MirasolConfig.preset(recipe.model.preset, **merge_mappings(FORMAT_1_VALUES, recipe.model.overrides))


def make_caches(
    recipe: Recipe, output: Path, settings: Mapping[str, object], examples: Iterable[Example]
) -> tuple[ClipCache, ClipCache]:
    """The clip caches of training and of validation.

    Clips decoded before the first step share one cache, and segments are cut out of whole clips. Clips decoded ahead
    are kept only if the recipe names a cache; validation's few clips, always the same, are always kept.
    """
    data = recipe.data
    folder, root = Path(data.cache) if data.cache else output / "cache", data.folder
    if data.decode == "before":
        cache = ClipCache(folder, root, settings, {e.media for e in examples if e.start is None and e.end is None})
        return cache, cache
    limit = None if data.cache_limit is None else int(data.cache_limit * 1e9)
    return ClipCache(folder if data.cache else None, root, settings, limit=limit), ClipCache(folder, root, settings)


def check_loss_weights(recipe: Recipe, config: MirasolConfig) -> None:
    """Raises UserError for a weight of a loss that a stage does not have."""
    clips = {"contrastive": "clips have no contrastive loss, leave it out"}
    if not config.reconstruction.audio:
        clips["audio"] = "the model reconstructs no audio, set model.overrides.reconstruction.audio"
    images = dict.fromkeys(("latent", "video", "audio"), "objective image_text has no such loss, leave it out")
    for name, stage in recipe.stages.items():
        if config.latent.kind == "none" and stage.objective == "clips" and stage.loss_weights.latent:
            raise UserError(
                f"stages.{name}.loss_weights.latent={stage.loss_weights.latent}: with latent.kind=none nothing "
                "predicts the next chunk's features, so there is no such loss: set it to 0"
            )
        for loss, reason in (images if stage.objective == "image_text" else clips).items():
            weight = getattr(stage.loss_weights, loss)
            if weight != getattr(LossWeights, loss):
                raise UserError(f"stages.{name}.loss_weights.{loss}={weight} has no effect: {reason}")


Interval = tuple[str, float | None, float | None]


@dataclass(frozen=True)
class RunExamples:
    """The examples of a run by data set.

    absent: what the annotations name and the data set lacks
    long: by part, the examples whose texts were too long: left out, or cut (`data.on_long_text`)
    """

    train: dict[str, list[Example]]
    validation: dict[str, list[Example]]
    absent: list[BadWindow]
    long: dict[str, list[LongText]] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: Recipe) -> "RunExamples":
        """Reads the training and validation splits. Raises UserError as `read_data`."""
        train, absent = read_data(recipe.data, "train")
        validation, also_absent = read_data(recipe.data, "validation")
        return cls(train, validation, absent + also_absent)

    @property
    def all_train(self) -> list[Example]:
        """The training examples of all data sets."""
        return list(itertools.chain.from_iterable(self.train.values()))

    @property
    def all_validation(self) -> list[Example]:
        """The validation examples of all data sets."""
        return list(itertools.chain.from_iterable(self.validation.values()))

    def limit_texts(self, limit: TextLimit, tokenizer: PreTrainedTokenizerBase | None) -> "RunExamples":
        """The examples with `limit` applied; without a tokenizer, to texts that are too long for any. Raises UserError
        as `TextLimit.apply`."""
        parts, long = {}, dict(self.long)
        for part in ("train", "validation"):
            parts[part], found = limit.apply(getattr(self, part), part, tokenizer)
            long[part] = [*long.get(part, ()), *found]
        return replace(self, **parts, long=long)

    def exclude_train_clips(self, bad: Collection[Interval]) -> dict[str, list[Example]]:
        """The training examples by data set, without those on bad clips."""
        return {
            name: [example for example in own if (example.media, example.start, example.end) not in bad]
            for name, own in self.train.items()
        }

    def compute_digests(self, root: Path) -> dict[str, ExamplesDigest]:
        """A digest of each split of each data set, by name."""
        return {
            f"{name}/{part} examples" if name else f"{part} examples": digest_examples(root, own)
            for part, by_name in (("train", self.train), ("validation", self.validation))
            for name, own in by_name.items()
        }


@dataclass(frozen=True)
class LocalParts:
    """The parts of a run that every process makes for itself, before the processes share the model.

    weights, regularisers: what each stage trains; its dropout, layer drop and label smoothing
    train_clips, validation_clips: caches of decoded clips; `samples` are taken from validation's
    features: cache of what frozen encoders compute, if the recipe has one
    plan: which examples each step trains on
    """

    processor: MirasolProcessor
    model: MirasolForConditionalGeneration
    weights: StageWeights
    regularisers: Regularisers
    train_clips: ClipCache
    validation_clips: ClipCache
    features: FeatureCache | None
    plan: BatchPlan
    validation: Validation
    samples: Samples


def make_local_parts(recipe: Recipe, folder: RunFolder, ranks: Ranks, console: "Console") -> LocalParts:
    """Reads the data, makes the model, decodes clips (`data.decode: before`) and begins the run's folder.

    Raises UserError for everything that can be found wrong before the first step.
    """
    check_tracker(recipe.tracker)
    read = examples = RunExamples.read(recipe)
    plan, validation = BatchPlan(recipe, examples.train), Validation(recipe, examples.validation)
    if recipe.model.init is None and recipe.tokenizer.init is None and not folder.holds_run:
        text = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides).text
        examples = examples.limit_texts(make_text_limit(recipe, text), None)
    processor, model = make_processor_and_model(recipe, folder, ranks, examples.all_train)
    if not (folder.holds_run and recipe.data.on_long_text == "error"):  # a resumed run has the same texts
        examples = examples.limit_texts(make_text_limit(recipe, model.config.text), processor.tokenizer)
    if any(examples.long.values()):
        plan, validation = BatchPlan(recipe, examples.train), Validation(recipe, examples.validation)
    check_loss_weights(recipe, model.config)
    check_augmentation(recipe, model.config)
    if recipe.keep_best is not None:
        check_metric(recipe.keep_best, validation.parts)
    initial = find_initial_weights(recipe, model.config)
    weights, regularisers = StageWeights(recipe, model, initial.untrained), Regularisers(model)
    if not folder.holds_run:
        weights.raise_if_random_is_frozen()
    settings, every_example = model.config.media_settings(), [*examples.all_train, *examples.all_validation]
    train_clips, validation_clips = make_caches(recipe, folder.path, settings, every_example)
    device = pick_device(recipe.device, ranks.local_rank)
    features = make_feature_cache(recipe, model, weights.trained, train_clips, device, console)
    bad = decode_clips(recipe, folder, plan, validation, processor, validation_clips, features, console)
    if bad:
        intervals = {(entry.media, entry.start, entry.end) for entry in bad}
        plan = BatchPlan(recipe, examples.exclude_train_clips(intervals))
        validation.leave_out(intervals)
    report_bad_clips(folder, examples, bad, console)
    digests = read.compute_digests(recipe.data.folder)
    steps = {name: stage.steps for name, stage in plan.recipe.stages.items()}
    facts = {"initial": initial.count_by_component(), "untrained": initial.untrained.to_dict()}
    folder.start([*examples.absent, *bad], weights.to_dict(), model.config.to_dict(), digests, steps, facts)
    report_long_texts(recipe, folder, examples, console)
    report_use_of_data(plan, validation, console)
    print_line(console, "\n\n".join(table for table in (initial.format_rows(), weights.format_rows()) if table))
    if not (folder.path / "processor").exists():
        write_folder_atomically(folder.path / "processor", processor.save_pretrained, replace=True)
    return LocalParts(
        processor, model, weights, regularisers, train_clips, validation_clips, features,
        plan.store(folder.path / "examples"),  # in files that the loading processes share
        validation, Samples(validation, recipe.samples),
    )  # fmt: skip


def make_processor_and_model(
    recipe: Recipe, folder: RunFolder, ranks: Ranks, train_examples: list[Example]
) -> tuple[MirasolProcessor, MirasolForConditionalGeneration]:
    """The run's processor and its model; with `fsdp` only the first process's model has weights."""
    saved = folder.path / "processor" if folder.holds_run else None
    facts = folder.read_facts() if folder.holds_run else None
    if recipe.parallel.kind == "fsdp" and not ranks.is_first:
        processor = make_processor(recipe, train_examples, None, saved)
        model = make_outline(recipe, processor, facts)
        add_adapters(model, recipe)
        return processor, model
    initial = load_initial(recipe)
    processor = make_processor(recipe, train_examples, initial, saved)
    model = make_model(recipe, processor, initial, facts)
    add_adapters(model, recipe)
    return processor, model


def decode_clips(
    recipe: Recipe,
    folder: RunFolder,
    plan: BatchPlan,
    validation: Validation,
    processor: MirasolProcessor,
    cache: ClipCache,
    features: FeatureCache | None,
    console: "Console",
) -> list[BadWindow]:
    """Decodes the clips of validation, and with `data.decode: before` those of training, into the cache; not those
    whose features are there in place of them.

    Returns the clips that cannot be read. Raises UnreadableWindow for the first one, with `on_bad_clip: error`.
    """
    sizes = compute_decoded_sizes(recipe, processor.feature_extractor) if recipe.data.decode == "before" else {}
    by_size = {
        size: plan.list_used_clips(name for name in sizes if sizes[name] == size)
        for size in dict.fromkeys(sizes.values())
    }
    own_size = cache.settings["image_size"]
    by_size[own_size] = list(dict.fromkeys([*by_size.get(own_size, []), *validation.list_windows()]))
    if features is not None and features.stages == recipe.stages.keys():
        by_size[own_size] = [window for window in by_size[own_size] if not features.has_if_readable(window)]
    workers, policy = max(os.cpu_count() or 1, recipe.workers), recipe.data.on_bad_clip
    with Progress(console, "Decoding clips", sum(map(len, by_size.values())), "clips") as progress:

        def report(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        try:
            bad: list[BadWindow] = []
            for size, clips in by_size.items():
                bad += cache.at_size(size).fill(clips, workers, policy, report, recipe.batch_seconds)
            return list(dict.fromkeys(bad))
        except UnreadableWindow as error:
            # A run to be resumed keeps its own list: what cannot be read today may be readable tomorrow.
            if not folder.holds_run:
                write_bad_clips(folder.path / "bad_clips.jsonl", [error.window])
            raise


def report_bad_clips(folder: RunFolder, examples: RunExamples, bad: list[BadWindow], console: "Console") -> None:
    """Prints how many clips cannot be read, and how many were missing from the start."""
    file = folder.path / "bad_clips.jsonl"
    if bad:
        usable = examples.exclude_train_clips({(entry.media, entry.start, entry.end) for entry in bad})
        lost = len(examples.all_train) - sum(map(len, usable.values()))
        print_line(console, f"{len(bad)} clips cannot be read and are left out ({lost} training examples): see {file}")
    if examples.absent:
        count = len(examples.absent)
        print_line(console, f"{count} problems of the annotations, such as missing clips, are skipped: see {file}")


def report_long_texts(recipe: Recipe, folder: RunFolder, examples: RunExamples, console: "Console") -> None:
    """Lists the examples whose texts are too long in the run's folder, and prints how many there are."""
    file = folder.path / "long_texts.jsonl"
    done = "left out" if recipe.data.on_long_text == "skip" else "cut"
    for part, found in examples.long.items():
        if found:
            most = max(text.tokens for text in found)
            text = f"{len(found)} {part} examples have too long texts (up to {most} tokens) and are {done}: see {file}"
            print_line(console, text)
    if folder.is_first and any(examples.long.values()):
        write_long_texts(file, examples.long)


def make_text_limit(recipe: Recipe, text: TextConfig) -> TextLimit:
    """The recipe's limit of texts. Raises UserError for one beyond the model's learned positions."""
    wanted = recipe.data.max_text_length
    if wanted is not None and wanted > text.longest_text:
        reason = f"the model has {text.max_length} learned positions" if text.learned_positions else "that is too long"
        raise UserError(f"data.max_text_length={wanted}: {reason}: set at most {text.longest_text}")
    return TextLimit(recipe.data, wanted or text.max_length, text.learned_positions)


def report_use_of_data(plan: BatchPlan, validation: Validation, console: "Console") -> None:
    """Warns of examples that no stage trains on or that validation lacks."""
    for kind, count in plan.unused.items():
        warn(console, f"{count} examples ({KINDS[kind]}) are of a kind that no stage trains on: see stages.NAME.span")
    if validation.absent:
        warn(
            console,
            f"not validated: {', '.join(validation.absent)}: the validation split has no examples of the kind and "
            "question types that the stages train on",
        )
    for name, order in plan.mixtures.items():
        if isinstance(order, EpochOrder):
            print_line(console, f"stages.{name}: {order.describe()}")


def warn(console: "Console", message: str) -> None:
    """Prints a warning on one line."""
    print_line(console, f"warning: {message}")


def build_loader(recipe: Recipe, parts: LocalParts, ranks: Ranks, status: WorkerStatus, steps: range,
                 device: torch.device) -> StepLoader:  # fmt: skip
    """Loads this process's rows of the batches of `steps`."""
    extractor = parts.processor.feature_extractor
    batches = StepBatches(
        parts.plan, parts.train_clips, extractor, status=status, on_bad=recipe.data.on_bad_clip,
        rows=RowsOfRank(recipe, ranks.rank, ranks.world_size) if ranks.world_size > 1 else None,
        augment=ClipAugment(recipe, extractor.image_size), texts=BatchTexts(parts.processor.text_rows),
        features=parts.features,
    )  # fmt: skip
    # Clips decoded ahead may be large, and prefetching more of them saves no time.
    prefetch = 4 if recipe.data.decode == "before" else 2
    return make_loader(batches, steps, recipe.workers, device.type == "cuda", recipe.batch_seconds, prefetch, device)


def collect_checkpoint_tensors(
    model: MirasolForConditionalGeneration, optimizer: Optimizer, average: WeightAverage | None
) -> Tensors:
    """All tensors of a checkpoint, by part."""
    averaged = {} if average is None else {"average": average.tensors()}
    return {"model": model.state_dict(), "optimizer": optimizer.tensors(), **averaged}


@dataclass(frozen=True, kw_only=True)
class Run(LocalParts):
    """Everything a run is made of. Built once by `build_run`; only the parts change, by their own methods.

    first_step: the step (from 0) that the run begins with: 0, or the step of the checkpoint it was resumed from
    parallel: the model as the processes compute it
    average: moving average of the weights, if the recipe has one
    batches: this process's batches, from `first_step` on
    encoder: gives batches and validations the features of frozen encoders, if the recipe keeps these
    status: what the loading processes are working on
    log: None on all processes but the first
    best: the best validation so far, if the recipe keeps the best checkpoint
    """

    recipe: Recipe
    folder: RunFolder
    ranks: Ranks
    signals: StopSignals
    console: "Console"
    device: torch.device
    first_step: int
    parallel: ParallelModel
    optimizer: Optimizer
    average: WeightAverage | None
    checkpoints: Checkpoints
    batches: BatchStream
    encoder: FeatureEncoder | None
    status: WorkerStatus
    log: RunLog | None
    best: BestStep | None
    clock: Clock

    def find_encoder(self, step: int) -> FeatureEncoder | None:
        """What gives the features of frozen encoders at a step; None where the model computes its own."""
        stage, _ = self.recipe.find_stage(step)
        return self.encoder if self.encoder is not None and self.encoder.serves(stage) else None

    def tensors(self) -> Tensors:
        """All tensors of a checkpoint."""
        return collect_checkpoint_tensors(self.model, self.optimizer, self.average)


def build_run(
    recipe: Recipe,
    folder: RunFolder,
    ranks: Ranks,
    signals: StopSignals,
    console: "Console",
    watch: Callable[[], None] | None = None,
) -> Run:
    """Builds a run, and loads its newest checkpoint if it has one. `watch` is called when a validation is logged.

    Raises UserError for everything that can be found wrong before the first step.
    """
    device = pick_device(recipe.device, ranks.local_rank)
    # The first process decodes the clips and makes the processor; the others then find both on disk.
    parts = ranks.run_first_then_rest(lambda: make_local_parts(recipe, folder, ranks, console))
    recipe = parts.plan.recipe  # its epochs are counted in steps
    parallel = ParallelModel(parts.model, recipe, ranks, device)
    parts.weights.enter(None)  # the optimizer needs all weights that some stage trains
    optimizer = Optimizer(parts.model, recipe.optimizer, parts.weights.partly_trained)
    average = None if recipe.ema is None else WeightAverage(parts.model, recipe.ema)
    checkpoints = Checkpoints(folder.path / "checkpoints", recipe.keep_last, ranks)
    tensors = collect_checkpoint_tensors(parts.model, optimizer, average)
    state = checkpoints.load_newest(tensors, recipe.compute_fingerprint(), partial(warn, console))
    folder.clear_error()
    first_step = state["step"]
    log = RunLog(folder.path, first_step, make_tracker(recipe), watch) if ranks.is_first else None
    logged = ranks.broadcast(read_metrics(log.file) if log is not None and recipe.keep_best else [])
    clock, status = Clock(state.get("seconds", 0.0)), WorkerStatus(recipe.workers)
    if parts.features is not None and first_step:  # the checkpoint in model.init may have changed meanwhile
        parts.features.computed_with = hash_encoders(parts.model, recipe.precision, device)
    encoder = None if parts.features is None else FeatureEncoder(parts.features, parallel, console)
    loader = build_loader(recipe, parts, ranks, status, range(first_step, recipe.total_steps), device)
    batches = BatchStream(
        recipe, loader, first_step, parts.model.config, device, ranks, folder, clock, status, signals, encoder
    )
    return Run(
        **vars(parts), recipe=recipe, folder=folder, ranks=ranks, signals=signals, console=console, device=device,
        first_step=first_step, parallel=parallel, optimizer=optimizer, average=average, checkpoints=checkpoints,
        batches=batches, encoder=encoder, status=status, log=log, clock=clock,
        best=BestStep(recipe.keep_best, logged) if recipe.keep_best else None,
    )  # fmt: skip
