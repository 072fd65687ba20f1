"""What a stage changes in a model: which components train, and its dropout, layer drop and label smoothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mirasol.config.checks import suggest_nearest_name
from mirasol.config.components import COMPONENTS, find_component
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe, Stage
from mirasol.console import format_table
from mirasol.errors import UserError
from mirasol.model.losses import BatchTotals
from mirasol.model.mirasol import MirasolForConditionalGeneration
from mirasol.model.outputs import MirasolImageTextOutput, MirasolOutput

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
    """The stage's pass over a batch, with its losses; `batch_totals` describes the global batch it is a part of."""
    arguments = dict(tensors) if batch_totals is None else {**tensors, "batch_totals": batch_totals}
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

    Raises:
        UserError: an unknown component in `trains`, one that this model has no weights of, or one that no loss of the
            stage reaches; a stage that trains nothing; `image_text` with a model without a contrastive pass.
    """

    def __init__(self, recipe: Recipe, model: MirasolForConditionalGeneration):
        self.model = model
        self.stages = recipe.stages
        self.trained = {name: self._find_trained(name, stage) for name, stage in recipe.stages.items()}

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
        chosen = set(present if stage.trains is None else stage.trains)
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
        trained = frozenset(name for name in reached if find_trainable_component(name) in chosen)
        if not trained:
            raise UserError(f"{place}: no loss reaches any weight that the stage trains{_suggest_weight(stage)}")
        return trained

    def enter(self, stage: str | None) -> None:
        """Lets only the weights that `stage` trains require gradients; None: those that any stage trains.

        Frozen weights keep their optimizer state for the next stage that trains them.
        """
        names = frozenset().union(*self.trained.values()) if stage is None else self.trained[stage]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
            if name not in names:
                parameter.grad = None

    def rows(self) -> list[ComponentRow]:
        """The table: a row for each component of the model."""
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        rows = []
        for component in TRAINABLE:
            own = [name for name in sizes if find_trainable_component(name) == component]
            if own:
                trained = {stage: sum(sizes[n] for n in own if n in names) for stage, names in self.trained.items()}
                rows.append(ComponentRow(component, sum(sizes[name] for name in own), trained))
        return rows

    def format_rows(self) -> str:
        """The table as text: components, their parameters, and which of them each stage trains."""
        rows = self.rows()
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
        return {row.component: {"parameters": row.parameters, "trained": dict(row.trained)} for row in self.rows()}


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
