"""The moving average of the weights (EMA): kept beside the training, looked at in validation, and the run's result."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def _local(values: list[Tensor]) -> list[Tensor]:
    """The parts of sharded tensors that this process holds."""
    return [value.to_local() if hasattr(value, "to_local") else value for value in values]


class WeightAverage:
    """average ← decay · average + (1 - decay) · weights, after every step, in fp32.

    In the first steps the decay is smaller, (1 + n) / (10 + n) after n steps, lest the average remember the random
    start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.values = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Takes in the weights after `steps` steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(_local(list(self.values.values())), _local(list(self.parameters.values())), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """The average by name, as a checkpoint keeps it."""
        return self.values

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights while this is open."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        pairs = zip(_local(list(self.parameters.values())), _local(list(self.values.values())), strict=True)
        for weight, average in pairs:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
