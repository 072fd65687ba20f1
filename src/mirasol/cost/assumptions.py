"""What a plan assumes where the recipe leaves something open."""

from dataclasses import dataclass

from mirasol.config.recipe import Recipe
from mirasol.errors import UserError


@dataclass(frozen=True)
class Assumptions:
    """What a recipe leaves open. None takes it from the data or, where the data cannot be read, from the model.

    processes: number of processes, one for each device
    mfu: share of the peak that is reached, counting the FLOPs that a step needs (without recomputation)
    peak_tflops: of one device; None is the data sheet's of the GPU here. Without a GPU it is an H100's for `device:
        cuda` and for recipes whose `parallel.kind` shares the work, otherwise the measured speed of a matrix product
    chunks: chunks of a clip
    text_length: tokens of a text row
    target_tokens: how many of them are target
    preset: used instead of the checkpoint in `model.init`
    memory_alone: counts bytes and no FLOPs, in half of the time; FLOPs and times are then 0
    """

    processes: int = 1
    mfu: float = 0.4
    peak_tflops: float | None = None
    chunks: int | None = None
    text_length: int | None = None
    target_tokens: int | None = None
    preset: str | None = None
    memory_alone: bool = False

    def check_against(self, recipe: Recipe) -> None:
        """Raises UserError if the clips of a step cannot be shared among that many processes."""
        if self.processes > 1 and recipe.parallel.kind == "none":
            raise UserError(f"--processes {self.processes}: set parallel.kind to ddp or fsdp")
        for name, stage in recipe.stages.items():
            if stage.clips_per_step % (recipe.accumulation * self.processes):
                raise UserError(
                    f"stages.{name}.clips_per_step={stage.clips_per_step} does not divide among {self.processes} "
                    f"processes x {recipe.accumulation} microbatches"
                )
