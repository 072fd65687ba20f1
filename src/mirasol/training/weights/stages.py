"""What a stage changes in a model: which components train, and its dropout, layer drop and label smoothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mirasol.checkpoint import Untrained
from mirasol.config.checks import suggest_nearest_name
from mirasol.config.components import COMPONENTS, find_component
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe, Stage
from mirasol.console import format_table
from mirasol.data.feature_cache import FEATURES
from mirasol.errors import UserError
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.model.losses import BatchTotals
from mirasol.model.outputs import MirasolChunkFeatures, MirasolImageTextOutput, MirasolOutput
from mirasol.training.weights.lora import get_plain_name, is_adapter

# `num_params` counts the contrastive pass's projections as text; in `trains` they have a name of their own.
TRAINABLE = (*COMPONENTS, "contrastive")


def find_trainable_component(name: str) -> str:
    """The name in `Stage.trains` that a parameter belongs to."""
    return "contrastive" if name.startswith("contrastive.") else find_component(name)


def compute_stage_losses(
    model: MirasolForConditionalGeneration,
    stage: Stage,
    tensors: Mapping[str, Tensor],
    batch_totals: BatchTotals | None = None,
) -> MirasolOutput | MirasolImageTextOutput:
    """The stage's pass over a batch of media, or of features in their place, with its losses; `batch_totals` describes
    the global batch it is a part of."""
    arguments: dict[str, Any] = dict(tensors)
    if batch_totals is not None:
        arguments["batch_totals"] = batch_totals
    if FEATURES[0] in tensors:
        parts = [arguments.pop(name, None) for name in FEATURES]
        arguments["features"] = MirasolChunkFeatures(*parts)
    return model.image_text(**arguments) if stage.objective == "image_text" else model(**arguments)


def loss_reaches(stage: Stage, name: str, config: MirasolConfig) -> bool:
    """Whether a loss of the stage depends on the parameter `name` of a model of `config`.

    For some clips, that is: those of a given batch may lack a modality or a second chunk.
    """
    if stage.objective == "image_text":
        return _image_loss_reaches(stage, name, config)
    weights, component = stage.loss_weights, find_trainable_component(name)
    mels = config.reconstruction.audio and weights.audio > 0
    pixels = weights.video > 0
    if component == "contrastive":
        return False
    if component in ("text", "cross_attention", "vocabulary"):
        return weights.text > 0
    if name.startswith("reconstruction.mels."):
        return mels
    if name.startswith("reconstruction.pixels."):
        return pixels
    if component == "reconstruction":
        return pixels or mels
    if name.startswith("latent.next_latent"):
        return weights.latent > 0
    if name == "latent.hidden_latent" and config.latent.mask_ratio == 0:
        return False
    return weights.text > 0 or weights.latent > 0 or pixels or mels


def _image_loss_reaches(stage: Stage, name: str, config: MirasolConfig) -> bool:
    """`loss_reaches` for `model.image_text`: 2D patches, the shared ViT and the text decoder."""
    contrastive, text = stage.loss_weights.contrastive > 0, stage.loss_weights.text > 0
    component = find_trainable_component(name)
    if component == "contrastive":
        return contrastive
    if component == "cross_attention" or name.startswith("text.output."):
        return text
    if component in ("text", "vocabulary"):
        return text or contrastive
    if name.startswith("chunk_encoder.tubes.projections."):
        number = int(name.split(".")[3])
        return config.video.tubes[number].flat and (text or contrastive)
    if name.startswith(("chunk_encoder.shared_output", "chunk_encoder.video_output")):
        return text  # the contrastive pass takes the output of the ViT
    return component in ("tubes", "vit") and name != "chunk_encoder.missing_video" and (text or contrastive)


@dataclass(frozen=True)
class ComponentRow:
    """A row of the table: a component, its parameters, and how many of them each stage trains."""

    component: str
    parameters: int
    trained: Mapping[str, int]


class StageWeights:
    """Which of a model's parameters each stage of the recipe trains; `enter` freezes all others.

    trained: names of the parameters by stage
    rows: by stage, of those the tables of which only the untrained last rows train, and the first such row: rows for
        special tokens that a frozen vocabulary did not have
    untrained: by stage, what is still as it was drawn at random when the stage is over
    frozen_random: by stage, parameters that its losses depend on, that it freezes, and that are still random

    Raises:
        UserError: an unknown component in `trains`, one that this model has no weights of, or one that no loss of the
            stage reaches; a stage that trains nothing; `image_text` with a model without a contrastive pass.
    """

    def __init__(self, recipe: Recipe, model: MirasolForConditionalGeneration, untrained: Untrained = Untrained()):  # noqa: B008
        self.model = model
        self.stages = recipe.stages
        self._adapted = frozenset() if recipe.lora is None else frozenset(recipe.lora.targets)
        self.trained = {name: self._find_trained(name, stage) for name, stage in recipe.stages.items()}
        self.rows: dict[str, dict[str, int]] = {}
        self.untrained: dict[str, Untrained] = {}
        self.frozen_random: dict[str, frozenset[str]] = {}
        self._entered: str | None = None
        for name, stage in recipe.stages.items():
            untrained = self._follow_untrained(name, stage, untrained)
        self._check_adapters_train()

    def _check_adapters_train(self) -> None:
        names = [name for names in self.trained.values() for name in names if is_adapter(name)]
        for target in sorted(self._adapted - {find_trainable_component(name) for name in names}):
            raise UserError(f"lora.targets: no stage trains {target!r}: leave it out, or name it in a stage's trains")

    def _follow_untrained(self, name: str, stage: Stage, before: Untrained) -> Untrained:
        """Finds what the stage freezes although it is random, lets untrained rows of frozen tables train, and returns
        what is untrained after the stage."""
        names = [n for n, _ in self.model.named_parameters() if not is_adapter(n)]
        reached = {get_plain_name(n) for n in names if loss_reaches(stage, n, self.model.config)}
        trained = frozenset(get_plain_name(n) for n in self.trained[name])
        self.rows[name] = {table: row for table, row in before.rows.items() if table in reached - trained}
        self.frozen_random[name] = frozenset((before.names & reached) - trained)
        self.trained[name] = self.trained[name].union(self.rows[name])
        rows = {table: row for table, row in before.rows.items() if table not in self.trained[name]}
        self.untrained[name] = Untrained(before.names - trained, rows)
        return self.untrained[name]

    def find_untrained(self, recipe: Recipe, step: int) -> Untrained:
        """What is untrained after `step` (at least 1) steps of the recipe."""
        return self.untrained[recipe.find_stage(step - 1)[0]]

    def describe_frozen_random(self) -> list[str]:
        """For each stage that may not freeze random weights and does: which, and what to do about it."""
        sizes = {get_plain_name(name): parameter.numel() for name, parameter in self.model.named_parameters()}
        lines = []
        for stage, names in self.frozen_random.items():
            counts: Counter[str] = Counter()
            for name in names:
                counts[find_trainable_component(name)] += sizes[name]
            if counts and not self.stages[stage].allow_frozen_random:
                found = ", ".join(f"{part} ({counts[part]:,} weights)" for part in TRAINABLE if counts[part])
                lines.append(
                    f"stages.{stage} freezes weights that are still random: {found}: train them (trains), "
                    f"start from a checkpoint that has them, or set stages.{stage}.allow_frozen_random: true"
                )
        return lines

    def raise_if_random_is_frozen(self) -> None:
        """Raises UserError for the first stage of `describe_frozen_random`."""
        for line in self.describe_frozen_random():
            raise UserError(line)

    def _find_trained(self, stage_name: str, stage: Stage) -> frozenset[str]:
        config, place = self.model.config, f"stages.{stage_name}"
        if stage.objective == "image_text" and config.contrastive is None:
            raise UserError(
                f"{place}.objective=image_text needs a model with a contrastive pass: "
                "set model.overrides.contrastive, e.g. {width: 64}"
            )
        names = [name for name, _ in self.model.named_parameters()]
        present = {find_trainable_component(name) for name in names}
        reached = [name for name in names if loss_reaches(stage, name, config)]
        chosen = set((self._adapted or present) if stage.trains is None else stage.trains)
        for component in stage.trains or ():
            if component not in TRAINABLE:
                raise UserError(
                    f"{place}.trains: unknown component {component!r}{suggest_nearest_name(component, list(TRAINABLE))}"
                )
            if component not in present:
                raise UserError(f"{place}.trains: this model has no weights of {component!r}: leave it out")
            if component not in {find_trainable_component(name) for name in reached}:
                raise UserError(
                    f"{place}.trains: no loss of this stage (objective {stage.objective}) reaches {component!r}: "
                    f"leave it out{_suggest_weight(stage)}"
                )
        # Of an adapted component the adapters alone.
        components = {name: find_trainable_component(name) for name in reached}
        trained = frozenset(
            name for name, own in components.items() if own in chosen and (own not in self._adapted or is_adapter(name))
        )
        if not trained:
            raise UserError(f"{place}: no loss reaches any weight that the stage trains{_suggest_weight(stage)}")
        return trained

    def enter(self, stage: str | None) -> None:
        """Lets only the weights that `stage` trains require gradients; None: those that any stage trains.

        Frozen weights keep their optimizer state for the next stage that trains them.
        """
        self._entered = stage
        names = frozenset().union(*self.trained.values()) if stage is None else self.trained[stage]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
            if name not in names:
                parameter.grad = None

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Takes the gradient from the rows that the stage entered last does not train, of tables of which it trains the
        others."""
        for name, first in self.rows.get(self._entered or "", {}).items():
            gradient = self.model.get_parameter(name).grad
            if isinstance(gradient, DTensor):
                mask = torch.arange(len(gradient), device=gradient.device)[:, None].ge(first).to(gradient.dtype)
                gradient.mul_(distribute_tensor(mask, gradient.device_mesh, gradient.placements, src_data_rank=None))
            elif gradient is not None:
                gradient[:first] = 0

    @property
    def partly_trained(self) -> frozenset[str]:
        """Tables of which some stage trains the last rows only: weight decay would change the others."""
        return frozenset(table for tables in self.rows.values() for table in tables)

    def _count_trained(self, stage: str, names: list[str], sizes: Mapping[str, int]) -> int:
        partly = {table: self.model.get_parameter(table) for table in self.rows[stage]}
        return sum(
            partly[name][self.rows[stage][name] :].numel() if name in partly else sizes[name]
            for name in names
            if name in self.trained[stage]
        )

    def component_rows(self) -> list[ComponentRow]:
        """The table: a row for each component of the model."""
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        rows = []
        for component in TRAINABLE:
            own = [name for name in sizes if find_trainable_component(name) == component]
            if own:
                trained = {stage: self._count_trained(stage, own, sizes) for stage in self.trained}
                rows.append(ComponentRow(component, sum(sizes[name] for name in own), trained))
        return rows

    def format_rows(self) -> str:
        """The table as text: components, their parameters, and which of them each stage trains."""
        rows = self.component_rows()
        total = ComponentRow(
            "total",
            sum(row.parameters for row in rows),
            {stage: sum(row.trained[stage] for row in rows) for stage in self.trained},
        )
        cells = [["component", "parameters", *(f"trains in {stage}" for stage in self.trained)]]
        for row in [*rows, total]:
            cells.append([row.component, f"{row.parameters:,}", *(_format_cell(row, stage) for stage in self.trained)])
        return format_table(cells)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Plain data, for run.json."""
        return {
            row.component: {"parameters": row.parameters, "trained": dict(row.trained)} for row in self.component_rows()
        }


def _format_cell(row: ComponentRow, stage: str) -> str:
    count = row.trained[stage]
    if row.component != "total" and count in (0, row.parameters):
        return "yes" if count else "no"
    return f"{count:,}"


def _suggest_weight(stage: Stage) -> str:
    weights = vars(stage.loss_weights)
    absent = [name for name, value in weights.items() if value == 0]
    return f", or raise loss_weights.{absent[0]}=0" if absent else ""


class Regularisers:
    """Sets a model's dropout, layer drop and label smoothing to those of a stage, in its modules and in its config, so
    that a saved config is right.

    A rate that the stage does not set is that of the model's config at the start of the run.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.stage: Stage | None = None
        self.own = {path: (stack.dropout, stack.layer_drop) for path, stack in model.config.stacks.items()}
        self.own_smoothing = model.config.text.label_smoothing

    def enter(self, stage: Stage) -> None:
        """Sets the rates of the stage."""
        if stage is self.stage:
            return
        self.stage = stage
        for path, stack in self.model.config.stacks.items():
            dropout, layer_drop = self.own[path]
            stack.dropout = dropout if stage.dropout is None else stage.dropout
            stack.layer_drop = layer_drop if stage.layer_drop is None else stage.layer_drop
        smoothing = self.own_smoothing if stage.label_smoothing is None else stage.label_smoothing
        self.model.config.text.label_smoothing = smoothing
        self.model.apply_dropout_rates()


def check_augmentation(recipe: Recipe, config: MirasolConfig) -> None:
    """Raises UserError, naming the stage, for an augmentation that does not fit this model's clips."""
    for name, stage in recipe.stages.items():
        stage.augment.check_fits(
            f"stages.{name}.", config.audio.num_mel_bins, config.video.frames_per_chunk,
            config.audio.spectrogram_frames, config.chunking.num_chunks or config.chunking.max_chunks,
        )  # fmt: skip
