"""The recipe: everything that determines a training run, as typed, frozen data."""

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
from mirasol.config.lora import LoraRecipe
from mirasol.config.parts import LossWeights
from mirasol.config.recipe_changes import flatten, list_free_keys
from mirasol.errors import UserError

# A token of prompt and one of target, and the special ones.
SHORTEST_TEXT = 5


@dataclass(frozen=True)
class DatasetOptions:
    """Options of a data set. Each adapter names those that it reads; others are refused.

    annotations: folder of the annotation files, or one such file, if they are not below ROOT
    class_list: text file with one class name per line
    prompt: the prompt of examples without a question
    targets: for a clip with several labels: `all` their names joined by "; ", or `one` of them at random each time
    pattern: names of the media files without extension, e.g. "{id}_{start:06d}"; the data set's section in
        docs/datasets.md lists its fields
    """

    annotations: str | None = None
    class_list: str | None = None
    prompt: str | None = None
    targets: Literal["all", "one"] = "all"
    pattern: str | None = None

    def list_changed(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class DataSetRecipe:
    """One data set of `DataRecipe.mixture`, whose other fields are those of `DataRecipe`.

    weight: the data set's share of the clips, relative to the other data sets
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
    """The examples to train and validate on, and where their decoded clips are kept.

    root: the data set's folder; null with a `mixture`
    dataset: name of the data set in docs/datasets.md; `folder` is your own folder, as read by `read_examples`
    options: options of the data set
    validation_split: null trains without validation
    on_bad_clip: `error` stops at the first missing or unreadable clip and at the first bad row of the annotations,
        `skip` trains without them; both list the clips in the run's `bad_clips.jsonl`
    on_long_text: what becomes of texts over `max_text_length`: `error` refuses the first before anything is trained,
        `skip` leaves their examples out, `truncate` cuts them; the run's `long_texts.jsonl` lists them
    max_text_length: most tokens of a row of text, prompt, target and three special ones. null: the model's
        text.max_length. Only learned positions cannot be exceeded
    decode: `before` decodes every clip into the cache before the first step; `ahead` decodes the clips of the next
        steps in the loader's workers, each time they come up unless there is a `cache`
    cache: folder for decoded clips, which runs on the same data may share. null: `<output>/cache`, where `ahead` keeps
        only the clips of validation
    cache_limit: with `ahead`, the size limit of `cache` in gigabytes (10^9 bytes); null: no limit
    feature_cache: folder for what frozen encoders compute of each clip, which runs may share; stages that train neither
        vit, tubes nor audio, and do not augment, then compute it once. null: every step computes it
    feature_cache_limit: the size limit of `feature_cache` in gigabytes (10^9 bytes); null: no limit
    feature_cache_dtype: `fp32` keeps features as they were computed, `bf16` takes half of the disk
    mixture: several data sets by name, each with its own root, dataset, splits and options, which then replace these
    """

    root: str | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    on_bad_clip: Literal["error", "skip"] = "error"
    on_long_text: Literal["error", "skip", "truncate"] = "error"
    max_text_length: int | None = None
    decode: Literal["before", "ahead"] = "before"
    cache: str | None = None
    cache_limit: float | None = None
    feature_cache: str | None = None
    feature_cache_limit: float | None = None
    feature_cache_dtype: Literal["fp32", "bf16"] = "fp32"
    dataset: str = "folder"
    options: DatasetOptions = field(default_factory=DatasetOptions)
    mixture: dict[str, DataSetRecipe] = field(default_factory=dict)

    def __post_init__(self):
        if self.max_text_length is not None and self.max_text_length < SHORTEST_TEXT:
            raise UserError(
                f"data.max_text_length={self.max_text_length} must be at least {SHORTEST_TEXT}: 3 are special tokens"
            )
        if not self.mixture and self.root is None:
            raise UserError("missing key 'data.root' (str), or data.mixture with several data sets")
        single = {"root": None, "train_split": "train", "validation_split": "validation", "dataset": "folder"}
        for name, default in {**single, "options": DatasetOptions()}.items():
            if self.mixture and getattr(self, name) != default:
                raise UserError(f"data.{name} has no effect with data.mixture: set it for each data set there")

    @property
    def data_sets(self) -> dict[str, DataSetRecipe]:
        """All data sets by name; without a mixture the name is ""."""
        if self.mixture:
            return self.mixture
        assert self.root is not None
        return {"": DataSetRecipe(self.root, self.train_split, self.validation_split, self.dataset, self.options)}

    @property
    def folder(self) -> Path:
        """The folder that media paths are relative to: the root, or the deepest folder with all roots of a mixture."""
        if not self.mixture:
            return Path(self.root)
        return Path(os.path.commonpath([os.path.abspath(entry.root) for entry in self.mixture.values()]))


@dataclass(frozen=True)
class ModelRecipe:
    """A preset with overrides, or a checkpoint to continue from (`init`), whose config and tokenizer are kept.

    overrides: fields of the config that differ from the preset's, or from the checkpoint's: weights of the checkpoint
        that fit are kept, all others are new (docs/training.md)
    new: with `init`, components whose weights are drawn at random all the same (names: docs/training.md); null: none
    image_size, num_chunks: with `init`, another frame size in pixels and number of chunks per clip; null: unchanged
    """

    preset: str = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    new: list[str] | None = None
    image_size: int | None = None
    num_chunks: int | None = None


@dataclass(frozen=True)
class TokenizerRecipe:
    """The tokenizer of a new model.

    vocab_size: largest number of pieces, 256 to 256,000; small data may give fewer
    init: a checkpoint whose tokenizer is used instead, e.g. for a model that will be trained on other texts later
    """

    vocab_size: int = 512
    init: str | None = None

    def __post_init__(self):
        if self.init is not None and self.vocab_size != TokenizerRecipe.vocab_size:
            raise UserError(f"tokenizer.vocab_size={self.vocab_size} has no effect with tokenizer.init: leave it out")


@dataclass(frozen=True)
class Stage:
    """Some steps of training on one kind of batch.

    steps, epochs: its length, one of the two. An epoch shows every question of the stage's clips exactly once, so how
        many steps it takes is known once the data are read (`BatchPlan.recipe`)
    span: what an example covers: `clip` takes examples about whole clips, `segment` those with a start and an end (only
        that part of the file is decoded), `any` both
    questions_per_clip: text rows per clip; a clip with fewer questions repeats some, which is counted. With `epochs`:
        so many questions of a clip come in one batch; rows that are left over do not count in the loss
    question_types: the types to draw from; null: all
    type_weights: relative chance that a drawn question is of a type (1 for types not named); without it every question
        of the clip is equally likely, so types with more questions are drawn more often
    learning_rate_scale: multiplies the run's learning rate during this stage
    drop_video, drop_audio: share of clips shown without that modality (never without both), so that the model also
        learns to answer if one is missing
    shift_audio: share of clips whose sound is shifted against their picture by half their chunks
    dropout, layer_drop, label_smoothing: rates of this stage, in every stack of the model and in the text loss; null:
        those of the model's config
    augment: changes to the clips (docs/augmentation.md)
    trains: components that this stage trains, all others are frozen (names: docs/training.md); null: all that its
        losses reach
    allow_frozen_random: lets the stage freeze weights that no training has changed since they were drawn at random
    data_sets: names in `data.mixture` that this stage trains on; null: all
    objective: `clips` has text, latent and reconstruction losses; `image_text` has MaMMUT's contrastive and generative
        losses over images with one text each
    """

    steps: int | None = None
    epochs: int | None = None
    clips_per_step: int = 16
    questions_per_clip: int = 8
    question_types: list[str] | None = None
    span: Literal["clip", "segment", "any"] = "clip"
    loss_weights: LossWeights = field(default_factory=LossWeights)
    type_weights: dict[str, float] = field(default_factory=dict)
    learning_rate_scale: float = 1.0
    drop_video: float = 0.0
    drop_audio: float = 0.0
    shift_audio: float = 0.0
    dropout: float | None = None
    layer_drop: float | None = None
    label_smoothing: float | None = None
    augment: Augment = field(default_factory=Augment)
    trains: list[str] | None = None
    allow_frozen_random: bool = False
    objective: Literal["clips", "image_text"] = "clips"
    data_sets: list[str] | None = None

    def __post_init__(self):
        self._check_length()
        if self.trains is not None and not self.trains:
            raise UserError("trains=[] trains nothing: name components, or leave it out to train all of them")
        if self.objective == "image_text":
            self._check_images()
        if self.drop_video < 0 or self.drop_audio < 0 or self.drop_video + self.drop_audio > 1:
            raise UserError(
                f"drop_video={self.drop_video} and drop_audio={self.drop_audio} must be shares with a sum of at most 1"
            )
        if not 0 <= self.shift_audio <= 1:
            raise UserError(f"shift_audio={self.shift_audio} must be a share of the clips in [0, 1]")
        for name in ("clips_per_step", "questions_per_clip", "learning_rate_scale"):
            _check_positive(self, name)
        for name in ("dropout", "layer_drop", "label_smoothing"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise UserError(f"{name}={rate} must be in [0, 1)")
        if self.augment.mixup and self.clips_per_step < 2:
            raise UserError("augment.mixup needs another clip in the batch: set clips_per_step to 2 or more")
        for question_type, weight in self.type_weights.items():
            if weight <= 0:
                raise UserError(
                    f"type_weights.{question_type}={weight} must be positive: use question_types to exclude a type"
                )

    @property
    def rows_per_clip(self) -> int:
        """Text rows of each clip in a batch: a mixed clip also has those of its partner."""
        return self.questions_per_clip * (2 if self.augment.mixup else 1)

    def _check_length(self) -> None:
        """Refuses a stage without a length, or with two."""
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else f"both (steps={self.steps}, epochs={self.epochs})"
            raise UserError(f"steps, epochs: a stage has one of them, found {given}: set one, the other to null")
        _check_positive(self, "epochs" if self.steps is None else "steps")
        if self.epochs is not None and self.type_weights:
            raise UserError("type_weights has no effect with epochs, which show every question once: leave it out")

    def _check_images(self) -> None:
        """Refuses keys that have no effect on images, which have one text each, no sound and no time."""
        if self.questions_per_clip != 1:
            raise UserError(
                f"questions_per_clip={self.questions_per_clip}: objective image_text has one text for each image: set 1"
            )
        if self.span != "clip":
            raise UserError(
                f"span={self.span} has no effect with objective image_text: images have no time, leave it out"
            )
        if self.augment != Augment():
            raise UserError("augment has no effect with objective image_text: leave it out")
        for name in ("drop_video", "drop_audio", "shift_audio"):
            if getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)} has no effect with objective image_text: leave it out")


@dataclass(frozen=True)
class CountedStage(Stage):
    """A stage of `epochs` whose number of `steps` is known, for its data have been read."""

    def _check_length(self) -> None:
        assert self.steps and self.epochs


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer, and the learning rate over the run.

    name: AdamW, Adam (whose weight decay is part of the gradient), or Muon for the matrices of hidden layers with AdamW
        for everything else
    weight_decay: of the weights of linear and convolution layers only
    warmup_steps: steps over which the rate grows linearly; then `schedule` leads to `final_scale` times learning_rate;
        `plateau` stays at the peak and falls linearly over the last fifth of the run
    gradient_clip: largest gradient norm; null: no clipping
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
        _check_positive(self, "learning_rate")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps={self.warmup_steps} must not be negative")
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay={self.weight_decay} must not be negative")
        if not 0 <= self.final_scale <= 1:
            raise UserError(f"optimizer.final_scale={self.final_scale} must be in [0, 1]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must be in [0, 1)")
        if self.gradient_clip is not None:
            _check_positive(self, "gradient_clip")


@dataclass(frozen=True)
class ParallelRecipe:
    """How the processes that `torchrun` starts share a run. The result is the same up to rounding, except for the
    dropout that each process draws. A single process ignores it, and can resume a run of several.

    kind: `ddp` keeps the full model in every process, `fsdp` a shard of weights, gradients and optimizer state (FSDP2)
    reshard: with `fsdp`, weights gathered for a layer's forward pass are freed until its backward pass gathers them
        again: less memory, more communication
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
    stages: by name, in the order in which they run
    lora: adapters that train in place of some components' weights; null: none
    precision: `bf16` computes under autocast (with parallel.kind `fsdp`, in bf16 copies of the weights); weights,
        gradient sums and optimizer stay in fp32
    accumulation: number of microbatches that a step's clips are split into; their gradients add up
    recompute: activations that the backward pass computes again to save memory: none, the `hidden` layers of the
        feed-forwards, or those of every `block`
    compile: compiles every Transformer layer with torch.compile
    ema: decay per step of a moving average of the weights, which validation and the finished checkpoint use
    device: `auto` uses the GPU if there is one
    validate_every, checkpoint_every, log_every: in steps
    validation_clips, validation_batch: number of clips to validate on, and how many of them at once on every process;
        null: a microbatch of one process. Losses that compare clips (centred latents, contrastive) depend on it
    samples: number of validation questions that the model answers at each validation, for the log
    tracker: service that shows the run in addition to TensorBoard (pip install 'mirasol[wandb]')
    keep_last: number of newest checkpoints to keep
    keep_best: a validation metric, e.g. `clip.accuracy` or `clip.text_loss` (docs/training.md): the checkpoint of the
        step with its best value is kept too, and is also written between two `checkpoint_every`
    patience: the run ends after so many validations in a row without a better `keep_best`; null: with its last step
    threads: PyTorch's threads, 0: PyTorch's choice; a resumed run is bit-identical only with the same number
    workers: processes that load batches ahead (0: none); decoding uses at least one per core
    batch_seconds: timeout for one batch of the workers, or for one more decoded clip; the error names the clips being
        decoded
    process_seconds: timeout for another process of the run (it hangs, or its machine is lost); more than batch_seconds.
        null: twice batch_seconds
    """

    seed: int
    output: str
    data: DataRecipe
    stages: dict[str, Stage]
    model: ModelRecipe = field(default_factory=ModelRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    lora: LoraRecipe | None = None
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
    patience: int | None = None
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
            _check_positive(self, name)
        if self.samples < 0:
            raise UserError(f"samples={self.samples} must not be negative: set 0 for none")
        if self.validation_batch is not None:
            _check_positive(self, "validation_batch")
        _check_positive(self, "batch_seconds")
        if self.process_seconds is not None and self.process_seconds <= self.batch_seconds:
            raise UserError(
                f"process_seconds={self.process_seconds:g} must be more than batch_seconds={self.batch_seconds:g}, "
                "the time that a process may wait for its workers: raise it, or lower batch_seconds"
            )
        _check_positive(self, "accumulation")
        if self.patience is not None:
            _check_positive(self, "patience")
        for name, stage in self.stages.items():
            if stage.clips_per_step % self.accumulation:
                raise UserError(
                    f"stages.{name}.clips_per_step={stage.clips_per_step} is not a multiple of "
                    f"accumulation={self.accumulation}: microbatches must have the same number of clips"
                )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema={self.ema} must be in (0, 1)")
        _check_no_key_is_idle(self)
        _check_data_sets(self)

    @property
    def total_steps(self) -> int:
        """Steps of all stages together. Raises UserError where a stage has epochs that are not counted yet."""
        for name, stage in self.stages.items():
            if stage.steps is None:
                raise UserError(
                    f"stages.{name}.epochs={stage.epochs}: its number of steps is unknown before the data are read: "
                    "use BatchPlan(recipe, examples).recipe, or set steps"
                )
        return sum(stage.steps for stage in self.stages.values())

    def count_epochs(self, steps: Mapping[str, int]) -> "Recipe":
        """The same recipe with the number of steps of the stages that have epochs, by name."""
        counted = {
            name: stage if stage.epochs is None else CountedStage(**{**vars(stage), "steps": steps[name]})
            for name, stage in self.stages.items()
        }
        return dataclasses.replace(self, stages=counted)

    @property
    def process_limit(self) -> float:
        """Seconds after which a process that does not answer counts as lost."""
        return 2 * self.batch_seconds if self.process_seconds is None else self.process_seconds

    def find_stage(self, step: int) -> tuple[str, int]:
        """Name of the stage that step `step` (from 0) belongs to, and the step's number within it (from 0)."""
        assert 0 <= step < self.total_steps
        for name, stage in self.stages.items():
            if step < stage.steps:
                return name, step
            step -= stage.steps
        raise AssertionError(step)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and YAML. Steps that were counted from epochs are left out: the data tell them."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        for stage in values["stages"].values():
            if stage["epochs"] is not None:
                stage["steps"] = None
        return values

    def compute_fingerprint(self) -> str:
        """Hash of all keys that affect the weights: runs with equal fingerprints train the same weights."""
        values = self.to_dict()
        fixed = {key: value for key, value in flatten(values).items() if key not in list_free_keys(values)}
        # This key came later: runs that do not use it keep their fingerprint.
        if fixed["model.new"] is None:
            del fixed["model.new"]
        facts = [fixed, list(self.stages)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_no_key_is_idle(recipe: Recipe) -> None:
    """Refuses keys that another key makes ineffective, so that none is silently ignored."""
    if recipe.keep_best is not None and recipe.data.validation_split is None:
        raise UserError(f"keep_best={recipe.keep_best} has no effect without data.validation_split: leave it out")
    if recipe.patience is not None and recipe.keep_best is None:
        raise UserError(
            f"patience={recipe.patience} has no effect without keep_best, the metric it waits for: set it, e.g. to "
            "clip.accuracy, or leave patience out"
        )
    model = recipe.model
    if model.init is not None and model.preset != ModelRecipe.preset:
        raise UserError(
            f"model.preset={model.preset} has no effect with model.init: leave it out, or take it back with "
            f"--model.preset null (mirasol plan accepts --preset {model.preset} in place of a checkpoint that does "
            "not exist yet)"
        )
    if model.init is not None and recipe.tokenizer != TokenizerRecipe():
        tokenizer = recipe.tokenizer
        key = "tokenizer.vocab_size" if tokenizer.init is None else "tokenizer.init"
        value = tokenizer.vocab_size if tokenizer.init is None else tokenizer.init
        raise UserError(
            f"{key}={value} has no effect with model.init, which keeps the checkpoint's tokenizer: leave it out, or "
            f"take it back with --{key} null"
        )
    for name, part in (("image_size", "video"), ("num_chunks", "chunking")):
        value = getattr(model, name)
        if value is not None and value <= 0:
            raise UserError(f"model.{name}={value} must be positive")
        if value is not None and model.init is None:
            raise UserError(f"model.{name}={value} needs model.init: set model.overrides.{part}.{name} instead")
    if model.new is not None and model.init is None:
        raise UserError(f"model.new={model.new} has no effect without model.init: all weights are new, leave it out")
    _check_overrides(model)
    data = recipe.data
    if data.cache_limit is not None:
        _check_positive(data, "cache_limit")
        if data.decode == "before" or data.cache is None:
            raise UserError(
                f"data.cache_limit={data.cache_limit:g} has no effect without data.decode: ahead and a data.cache: "
                "leave it out, or set both"
            )
    _check_feature_cache(recipe)


def _check_feature_cache(recipe: Recipe) -> None:
    """Refuses settings of a feature cache that is off, and one that cannot work."""
    data = recipe.data
    for name in ("feature_cache_limit", "feature_cache_dtype"):
        value = getattr(data, name)
        if data.feature_cache is None and value != getattr(DataRecipe, name):
            raise UserError(f"data.{name}={value} has no effect without data.feature_cache: leave it out, or set both")
    if data.feature_cache is None:
        return
    if data.feature_cache_limit is not None:
        _check_positive(data, "feature_cache_limit")
    if data.cache is not None and os.path.abspath(data.cache) == os.path.abspath(data.feature_cache):
        raise UserError(f"data.feature_cache={data.feature_cache} is data.cache too: give each a folder of its own")
    if recipe.parallel.kind == "fsdp":
        raise UserError(
            f"data.feature_cache={data.feature_cache}: with parallel.kind=fsdp every process needs all others to "
            "encode a clip: use ddp, or leave the cache out"
        )


def _check_overrides(model: ModelRecipe) -> None:
    """Refuses overrides that have no effect, or that another key decides."""
    if "loss_weights" in model.overrides:
        raise UserError("model.overrides.loss_weights has no effect: set loss_weights of each stage instead")
    parts = {name: part for name, part in model.overrides.items() if isinstance(part, Mapping)}
    if "vocab_size" in parts.get("text", {}):
        instead = "set tokenizer.vocab_size instead" if model.init is None else "the checkpoint's tokenizer is kept"
        raise UserError(f"model.overrides.text.vocab_size has no effect: {instead}")
    if model.init is not None and "image_size" in parts.get("video", {}):
        raise UserError(
            "model.overrides.video.image_size: set model.image_size instead, which interpolates learned positions"
        )
    if model.num_chunks is not None and "chunking" in parts:
        raise UserError(
            f"model.num_chunks={model.num_chunks} and model.overrides.chunking: set model.overrides.chunking alone"
        )


def _check_data_sets(recipe: Recipe) -> None:
    """Refuses unknown data sets in stages, and data sets that no stage trains on."""
    known = recipe.data.mixture
    for name, stage in recipe.stages.items():
        if stage.data_sets is not None and not known:
            raise UserError(f"stages.{name}.data_sets={stage.data_sets} needs data.mixture: leave it out")
        for data_set in stage.data_sets or ():
            if data_set not in known:
                raise UserError(f"stages.{name}.data_sets: {data_set!r} is not in data.mixture: {', '.join(known)}")
        if stage.data_sets == []:
            raise UserError(f"stages.{name}.data_sets=[] is empty: leave it out to train on all")
    _check_weights_count(recipe)
    for data_set in known:
        if all(stage.data_sets is not None and data_set not in stage.data_sets for stage in recipe.stages.values()):
            raise UserError(f"data.mixture.{data_set}: no stage trains on it: leave it out")


def _check_weights_count(recipe: Recipe) -> None:
    """Refuses a weight of a data set that is drawn in epochs only, where the questions are the shares."""
    for name, data_set in recipe.data.mixture.items():
        stages = [stage for stage in recipe.stages.values() if name in (stage.data_sets or recipe.data.mixture)]
        if data_set.weight != DataSetRecipe.weight and stages and all(stage.epochs is not None for stage in stages):
            raise UserError(
                f"data.mixture.{name}.weight={data_set.weight:g} has no effect with epochs, which show every question "
                "once: leave it out, or give the stage steps"
            )


def _check_positive(part: Any, name: str) -> None:
    if getattr(part, name) <= 0:
        raise UserError(f"{name}={getattr(part, name)} must be positive")
