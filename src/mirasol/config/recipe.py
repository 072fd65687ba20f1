"""The recipe: everything that decides a training run, as typed, frozen data."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mirasol.config.augment import Augment
from mirasol.config.parts import LossWeights
from mirasol.errors import UserError


@dataclass(frozen=True)
class DatasetOptions:
    """What a user may choose about a data set. Each adapter names the ones it reads; others are refused.

    annotations: folder of the annotation files, or one such file, where they do not lie below ROOT
    class_list: text file with one class name per line
    prompt: the prompt of examples that have no question of their own
    targets: of a clip with several labels, `all` of their names joined with "; ", or `one` at random each time
    pattern: how media files are called, without extension, e.g. "{id}_{start:06d}"; see the data set's section in
        docs/datasets.md for the fields it has
    """

    annotations: str | None = None
    class_list: str | None = None
    prompt: str | None = None
    targets: Literal["all", "one"] = "all"
    pattern: str | None = None

    def chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class DataSetRecipe:
    """One data set of a run; the fields that `DataRecipe` has too mean the same.

    weight: how many of the clips are of this data set, relative to the others
    """

    root: str
    train_split: str = "train"
    validation_split: str | None = "validation"
    dataset: str = "folder"
    options: DatasetOptions = field(default_factory=DatasetOptions)
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise UserError(f"weight={self.weight} must be positive and finite")


@dataclass(frozen=True)
class DataRecipe:
    """Which examples to train and validate on, and where their decoded clips are kept.

    root: the data set's folder; null where `mixture` names several
    dataset: which one it is, a name of docs/datasets.md; `folder` is your own, as `read_examples` takes it
    options: what can be chosen about the data set
    validation_split: null trains without validation
    on_bad_clip: `error` stops at the first clip that is missing or cannot be read and at the first bad row of the
        annotations, `skip` trains without them; both list clips in the run's `bad_clips.jsonl`
    decode: `before` decodes every clip into the cache before the first step; `ahead` decodes what the next steps need
        in the loader's workers, each clip anew every time it comes up unless there is a `cache`
    cache: folder for decoded clips. Runs on the same data may share one. null is `<output>/cache`, or with `ahead`
        none but for validation's clips, in that place
    cache_limit: with `ahead`, the most gigabytes (10^9 bytes) that `cache` may take; null is any number
    mixture: several data sets by name, each with its own root, dataset, splits and options, in place of those here
    """

    root: str | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    on_bad_clip: Literal["error", "skip"] = "error"
    decode: Literal["before", "ahead"] = "before"
    cache: str | None = None
    cache_limit: float | None = None
    dataset: str = "folder"
    options: DatasetOptions = field(default_factory=DatasetOptions)
    mixture: dict[str, DataSetRecipe] = field(default_factory=dict)

    def __post_init__(self):
        if not self.mixture and self.root is None:
            raise UserError("missing key 'data.root' (str), or data.mixture with several data sets")
        single = {"root": None, "train_split": "train", "validation_split": "validation", "dataset": "folder"}
        for name, default in {**single, "options": DatasetOptions()}.items():
            if self.mixture and getattr(self, name) != default:
                raise UserError(f"data.{name} has no effect beside data.mixture: set it for each data set there")

    @property
    def data_sets(self) -> dict[str, DataSetRecipe]:
        """All data sets by name; a single one has the name ""."""
        if self.mixture:
            return self.mixture
        assert self.root is not None
        return {"": DataSetRecipe(self.root, self.train_split, self.validation_split, self.dataset, self.options)}

    @property
    def folder(self) -> Path:
        """What the media of all examples are relative to: the root, of several the deepest folder that holds all."""
        if not self.mixture:
            return Path(self.root)
        return Path(os.path.commonpath([os.path.abspath(entry.root) for entry in self.mixture.values()]))


@dataclass(frozen=True)
class ModelRecipe:
    """A preset with parts laid over it, or a checkpoint to go on from (its config and tokenizer are kept).

    image_size, num_chunks: frame side in pixels and chunks per clip that a checkpoint is gone on with; null: its own
    """

    preset: str = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    image_size: int | None = None
    num_chunks: int | None = None


@dataclass(frozen=True)
class TokenizerRecipe:
    """vocab_size: the largest number of pieces, 256 to 256,000; small data may give fewer
    init: a checkpoint whose tokenizer is taken instead, for a model that is to learn other texts later
    """

    vocab_size: int = 512
    init: str | None = None

    def __post_init__(self):
        if self.init is not None and self.vocab_size != TokenizerRecipe.vocab_size:
            raise UserError(f"tokenizer.vocab_size={self.vocab_size} has no effect beside tokenizer.init: leave it out")


@dataclass(frozen=True)
class Stage:
    """Some steps of training on one kind of batch.

    span: what an example covers: `clip` takes examples about whole clips, `segment` those with a start and an end (only
        that part of the file is decoded), `any` both
    questions_per_clip: text rows per clip; a clip with fewer questions repeats some, which is counted
    question_types: the types drawn from; null is all there are
    type_weights: relative chance that a drawn question is of this type (1 for a type not named); without it every
        question of the clip is equally likely, so types with more questions come more often
    learning_rate_scale: multiplies the run's learning rate during this stage
    drop_video, drop_audio: share of clips that are shown without that modality (never without both), so that the
        model also learns to answer where one is missing
    dropout, layer_drop, label_smoothing: rates of this stage in every stack of the model (in the text loss); null
        leaves what the model's config says
    augment: how clips are changed (docs/augmentation.md)
    trains: components that this stage trains, all others are frozen (names: docs/training.md); null trains all that
        its losses reach
    data_sets: names in `data.mixture` that this stage trains on; null is all
    objective: `clips` has text, latent and reconstruction losses, `image_text` MaMMUT's contrastive and generative
        passes over images with one text each
    """

    steps: int
    clips_per_step: int = 16
    questions_per_clip: int = 8
    question_types: list[str] | None = None
    span: Literal["clip", "segment", "any"] = "clip"
    loss_weights: LossWeights = field(default_factory=LossWeights)
    type_weights: dict[str, float] = field(default_factory=dict)
    learning_rate_scale: float = 1.0
    drop_video: float = 0.0
    drop_audio: float = 0.0
    dropout: float | None = None
    layer_drop: float | None = None
    label_smoothing: float | None = None
    augment: Augment = field(default_factory=Augment)
    trains: list[str] | None = None
    objective: Literal["clips", "image_text"] = "clips"
    data_sets: list[str] | None = None

    def __post_init__(self):
        if self.trains is not None and not self.trains:
            raise UserError("trains=[] trains nothing: name components, or leave it out to train all")
        if self.objective == "image_text":
            self._check_images()
        if self.drop_video < 0 or self.drop_audio < 0 or self.drop_video + self.drop_audio > 1:
            raise UserError(
                f"drop_video={self.drop_video} and drop_audio={self.drop_audio} must be shares that add up to 1 at most"
            )
        for name in ("steps", "clips_per_step", "questions_per_clip", "learning_rate_scale"):
            _positive(self, name)
        for name in ("dropout", "layer_drop", "label_smoothing"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise UserError(f"{name}={rate} must lie in [0, 1)")
        if self.augment.mixup and self.clips_per_step < 2:
            raise UserError("augment.mixup needs another clip in the batch: set clips_per_step to 2 or more")
        for question_type, weight in self.type_weights.items():
            if weight <= 0:
                raise UserError(
                    f"type_weights.{question_type}={weight} must be positive: use question_types to leave it out"
                )

    @property
    def rows_per_clip(self) -> int:
        """Text rows of each clip in a batch: mixed clips have those of their partner too."""
        return self.questions_per_clip * (2 if self.augment.mixup else 1)

    def _check_images(self) -> None:
        """Refuses what has no meaning for images: each has one text, and neither sound nor time."""
        if self.questions_per_clip != 1:
            raise UserError(
                f"questions_per_clip={self.questions_per_clip}: objective image_text has one text an image: set 1"
            )
        if self.span != "clip":
            raise UserError(
                f"span={self.span} has no effect with objective image_text: images have no time, leave it out"
            )
        if self.augment != Augment():
            raise UserError("augment has no effect with objective image_text: images stay as they are, leave it out")
        for name in ("drop_video", "drop_audio"):
            if getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)} has no effect with objective image_text: leave it out")


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW, or Adam, whose weight decay is a part of the gradient, or Muon for the matrices of hidden layers with
    AdamW for all else; and the learning rate over the run.

    weight_decay: on the weights of linear and convolution layers only
    warmup_steps: the rate grows linearly over these; then `schedule` leads to `final_scale` times learning_rate;
        `plateau` stays at the peak and comes down linearly over the last fifth of the run
    gradient_clip: largest gradient norm; null leaves gradients as they are
    """

    name: Literal["adam", "adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_steps: int = 100
    schedule: Literal["cosine", "linear", "plateau", "constant"] = "cosine"
    final_scale: float = 0.05
    gradient_clip: float | None = 1.0

    def __post_init__(self):
        _positive(self, "learning_rate")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps={self.warmup_steps} must not be negative")
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay={self.weight_decay} must not be negative")
        if not 0 <= self.final_scale <= 1:
            raise UserError(f"optimizer.final_scale={self.final_scale} must lie in [0, 1]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must lie in [0, 1)")
        if self.gradient_clip is not None:
            _positive(self, "gradient_clip")


@dataclass(frozen=True)
class ParallelRecipe:
    """How the processes that `torchrun` starts share a run. The result is the same up to rounding, save for what noise
    (dropout, masking of x) each process draws; a process alone ignores it, so that it can resume what many began.

    kind: `ddp` keeps the whole model in every process, `fsdp` a share of weights, gradients and optimizer state (FSDP2)
    reshard: with `fsdp`, weights gathered for a layer's forward pass are given back before its backward pass gathers
        them again: less memory for more communication
    """

    kind: Literal["none", "ddp", "fsdp"] = "none"
    reshard: bool = True

    def __post_init__(self):
        if not self.reshard and self.kind != "fsdp":
            raise UserError(f"parallel.reshard=false has no effect with parallel.kind={self.kind}: leave it out")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    output: the run's folder
    stages: by name, run in the order they are written
    precision: `bf16` computes under autocast (with parallel.kind `fsdp` in bf16 copies of the weights); weights, their
        sums of gradients and the optimizer stay fp32
    accumulation: microbatches that a step's clips are computed in, one after the other; gradients add up
    recompute: activations that the backward pass computes again: none, the feed-forwards' `hidden` layers, or every
        `block`
    compile: compiles every Transformer layer with torch.compile
    ema: decay per step of a moving average of the weights; validation and the finished checkpoint are the average's
    device: `auto` takes the GPU where there is one
    validate_every, checkpoint_every, log_every: in steps; validation looks at `validation_clips` clips,
        `validation_batch` of them at once, on every process; null is as many as a microbatch of one process alone has.
        The losses that compare clips, centred latents and contrastive, depend on it
    samples: how many questions of the validation the model answers in its own words at each validation; 0: none
    tracker: where the run can be watched beside TensorBoard (packages of their own: pip install 'mirasol[wandb]')
    keep_last: how many of the newest checkpoints stay on disk
    keep_best: a number of the validation, e.g. `clip.accuracy` or `clip.text_loss` (docs/training.md): the checkpoint
        of the step where it was best stays too, and is written even between two `checkpoint_every`
    threads: PyTorch's threads, 0 leaves its choice; a resumed run is bit-identical only with as many
    workers: processes that load batches ahead (0: none); decoding uses at least one per core
    batch_seconds: how long the run waits for one batch of its workers, or for one more decoded clip, before it ends
        with an error that names the clips they are at
    process_seconds: of several processes, how long the others wait for one that gives no answer (it hangs, its machine
        is gone) before they end with an error; more than batch_seconds. null is twice batch_seconds
    """

    seed: int
    output: str
    data: DataRecipe
    stages: dict[str, Stage]
    model: ModelRecipe = field(default_factory=ModelRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = 1
    recompute: Literal["none", "hidden", "block"] = "none"
    compile: bool = False
    ema: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 10
    validate_every: int = 200
    validation_clips: int = 64
    validation_batch: int | None = None
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: str | None = None
    samples: int = 4
    tracker: Literal["none", "wandb", "trackio"] = "none"
    threads: int = 0
    workers: int = 0
    batch_seconds: float = 600.0
    process_seconds: float | None = None

    def __post_init__(self):
        if not self.stages:
            raise UserError("stages: a recipe needs at least one stage")
        for name in ("log_every", "validate_every", "validation_clips", "checkpoint_every", "keep_last"):
            _positive(self, name)
        if self.samples < 0:
            raise UserError(f"samples={self.samples} must not be negative: 0 takes none")
        if self.validation_batch is not None:
            _positive(self, "validation_batch")
        _positive(self, "batch_seconds")
        if self.process_seconds is not None and self.process_seconds <= self.batch_seconds:
            raise UserError(
                f"process_seconds={self.process_seconds:g} must be more than batch_seconds={self.batch_seconds:g}, for "
                "which a process may wait for its workers: raise it, or lower batch_seconds"
            )
        _positive(self, "accumulation")
        for name, stage in self.stages.items():
            if stage.clips_per_step % self.accumulation:
                raise UserError(
                    f"stages.{name}.clips_per_step={stage.clips_per_step} is no multiple of "
                    f"accumulation={self.accumulation}: every microbatch must have as many clips"
                )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema={self.ema} must lie in (0, 1)")
        _check_no_key_is_idle(self)
        _check_data_sets(self)

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages.values())

    @property
    def process_limit(self) -> float:
        """Seconds after which the other processes give up one that gives no answer."""
        return 2 * self.batch_seconds if self.process_seconds is None else self.process_seconds

    def stage_at(self, step: int) -> tuple[str, int]:
        """Name of the stage that step `step` (from 0) belongs to, and the step's number within it (from 0)."""
        assert 0 <= step < self.total_steps
        for name, stage in self.stages.items():
            if step < stage.steps:
                return name, step
            step -= stage.steps
        raise AssertionError(step)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON and YAML keep it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprint(self) -> str:
        """Hash of all that decides the result: equal fingerprints train the same weights."""
        decisive = {key: value for key, value in flat(self.to_dict()).items() if key not in UNDECISIVE}
        facts = [decisive, list(self.stages)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# What may change between an interrupted run and its resumption: none of it alters the weights (beyond their rounding,
# where another number of processes adds up gradients in another order).
UNDECISIVE = frozenset(
    [
        "parallel.kind",
        "parallel.reshard",
        "recompute",
        "output",
        "data.cache",
        "data.cache_limit",
        "log_every",
        "validate_every",
        "validation_clips",
        "validation_batch",
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "samples",
        "tracker",
        "workers",
        "batch_seconds",
        "process_seconds",
    ]
)


def _check_no_key_is_idle(recipe: Recipe) -> None:
    """Refuses keys that something else in the recipe decides, so that none is ignored in silence."""
    if recipe.keep_best is not None and recipe.data.validation_split is None:
        raise UserError(f"keep_best={recipe.keep_best} has no effect without data.validation_split: leave it out")
    model = recipe.model
    if model.init is not None and model.overrides:
        raise UserError("model.overrides must be empty when model.init names a checkpoint: its config is kept")
    if model.init is not None and model.preset != ModelRecipe.preset:
        raise UserError(
            f"model.preset={model.preset} has no effect beside model.init: leave it out (mirasol plan takes "
            f"--preset {model.preset} in place of a checkpoint that is not there yet)"
        )
    if model.init is not None and recipe.tokenizer != TokenizerRecipe():
        tokenizer = recipe.tokenizer
        key = "tokenizer.vocab_size" if tokenizer.init is None else "tokenizer.init"
        value = tokenizer.vocab_size if tokenizer.init is None else tokenizer.init
        raise UserError(
            f"{key}={value} has no effect beside model.init: the checkpoint's tokenizer is kept: leave it out"
        )
    for name, part in (("image_size", "video"), ("num_chunks", "chunking")):
        value = getattr(model, name)
        if value is not None and value <= 0:
            raise UserError(f"model.{name}={value} must be positive")
        if value is not None and model.init is None:
            raise UserError(f"model.{name}={value} belongs to model.init: set model.overrides.{part}.{name} instead")
    data = recipe.data
    if data.cache_limit is not None:
        _positive(data, "cache_limit")
        if data.decode == "before" or data.cache is None:
            raise UserError(
                f"data.cache_limit={data.cache_limit:g} has no effect without data.decode: ahead and a data.cache: "
                "leave it out, or set both"
            )
    if "loss_weights" in model.overrides:
        raise UserError("model.overrides.loss_weights has no effect: set loss_weights of each stage instead")
    text = model.overrides.get("text")
    if isinstance(text, Mapping) and "vocab_size" in text:
        raise UserError("model.overrides.text.vocab_size has no effect: set tokenizer.vocab_size instead")


def _check_data_sets(recipe: Recipe) -> None:
    """Refuses stages that name unknown data sets, and data sets that no stage trains on."""
    known = recipe.data.mixture
    for name, stage in recipe.stages.items():
        if stage.data_sets is not None and not known:
            raise UserError(f"stages.{name}.data_sets={stage.data_sets} needs data.mixture: leave it out")
        for data_set in stage.data_sets or ():
            if data_set not in known:
                raise UserError(f"stages.{name}.data_sets: {data_set!r} is not in data.mixture: {', '.join(known)}")
        if stage.data_sets == []:
            raise UserError(f"stages.{name}.data_sets=[] names none: leave it out to train on all")
    for data_set in known:
        if all(stage.data_sets is not None and data_set not in stage.data_sets for stage in recipe.stages.values()):
            raise UserError(f"data.mixture.{data_set}: no stage trains on it: leave it out")


def _positive(part: Any, name: str) -> None:
    if getattr(part, name) <= 0:
        raise UserError(f"{name}={getattr(part, name)} must be positive")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        result.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return result


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which two recipes (as `to_dict` gives them) differ such that the weights would differ."""
    old, new = flat(before), flat(after)
    differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    changed = sorted(differing - UNDECISIVE)
    # Stages run in the order they are written, which a mapping's equality does not see.
    if not changed and list(before["stages"]) != list(after["stages"]):
        changed = ["stages (their order)"]
    return changed
