"""What a stage asks of dropout, layer drop, label smoothing and augmentation, brought into effect."""

from torch import nn

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe, Stage


class Regularisers:
    """Sets a model's rates to those of a stage: in its modules, and in its config, so that a saved one tells the truth.

    What a stage leaves open is what the model's config said when the run began, whatever a stage before had set.
    """

    def __init__(self, model: nn.Module):
        self.model, self.stage = model, None
        self.own = {path: (stack.dropout, stack.layer_drop) for path, stack in model.config.stacks.items()}
        self.own_smoothing = model.config.text.label_smoothing

    def enter(self, stage: Stage) -> None:
        """Has the model drop and smooth as the stage says from now on."""
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
    """Raises UserError, naming the stage, for an augmentation that clips of this model cannot be given."""
    for name, stage in recipe.stages.items():
        stage.augment.check_fits(
            f"stages.{name}.", config.audio.num_mel_bins, config.video.frames_per_chunk,
            config.audio.spectrogram_frames, config.chunking.num_chunks or config.chunking.max_chunks,
        )  # fmt: skip
