"""What changes the weights: learning rate, parameter groups, optimizers, and the moving average (EMA)."""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mirasol.config.recipe import OptimizerRecipe, Recipe

# Share of the run over which the schedule "plateau" falls.
COOLDOWN_SHARE = 0.2
# Numbers in matrices that Muon orthogonalises together; larger matrices come one by one, and keep a core busy alone.
LARGEST_STACK = 2**22


def compute_learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule over all stages together."""
    settings, total = recipe.optimizer, recipe.total_steps
    stage, _ = recipe.find_stage(step)
    peak = settings.learning_rate * recipe.stages[stage].learning_rate_scale
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, total - 1 - settings.warmup_steps)
    if settings.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * done)) / 2
    else:
        remaining = min(1.0, (1 - done) / (COOLDOWN_SHARE if settings.schedule == "plateau" else 1.0))
    return peak * (settings.final_scale + (1 - settings.final_scale) * remaining)


def split_by_decay(
    model: nn.Module, undecayed: Collection[str] = ()
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trainable parameters by name: with weight decay (weights of linear and convolution layers) and without (norms,
    biases, embeddings, learned positions and queries, and those named `undecayed`)."""
    decaying = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decay = {name: parameter for name, parameter in trainable.items() if name in decaying.difference(undecayed)}
    return decay, {name: parameter for name, parameter in trainable.items() if name not in decay}


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """Newton-Schulz: each matrix with its singular values brought near 1, in the precision of the input.

    matrices: [matrix, row, column], not more rows than columns
    """
    first, second, third = coefficients
    matrices = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(iterations):
        gram = matrices @ matrices.mT
        gram = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        matrices = torch.baddbmm(matrices, gram, matrices, beta=first)
    return matrices


def choose_product_dtype(device: torch.device) -> torch.dtype:
    """What Muon orthogonalises in: bf16, except on a CPU without AVX-512, for which PyTorch has no fast product of bf16
    (1.5 GFLOP/s against 24 in fp32, three fifths of a step of `tiny`: docs/lab-notebook.md)."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return torch.float32
    return torch.bfloat16


def group_by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Matrices that have the same shape or its transpose, at most `LARGEST_STACK` numbers in a group of several."""
    groups: dict[tuple[int, ...], list[list[Tensor]]] = {}
    for parameter in parameters:
        alike = groups.setdefault(tuple(sorted(parameter.shape)), [[]])
        if (len(alike[-1]) + 1) * parameter.numel() > LARGEST_STACK:
            alike.append([])
        alike[-1].append(parameter)
    return [group for alike in groups.values() for group in alike if group]


class Muon(torch.optim.Muon):
    """Muon that orthogonalises matrices of one shape together, and sharded matrices as a whole.

    One by one the small matrices of `tiny` took a fifth of a step (docs/lab-notebook.md). A matrix that is sharded over
    several processes is gathered first: Newton-Schulz over the shards would add its products in another order, and
    amplifies rounding in directions that the gradient hardly has to full size: steps differed by up to half their size.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Takes a step with the current gradients."""
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in group_by_shape(given):
                updates = torch.stack([self._compute_update(parameter, group) for parameter in parameters])
                updates = orthogonalise(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    change = (update if _is_wide(parameter) else update.mT).to(parameter.dtype)
                    if isinstance(parameter, DTensor):
                        change = DTensor.from_local(change, parameter.device_mesh, run_check=False)
                        change = change.redistribute(placements=parameter.placements)
                    # Updates as large as AdamW's, so that one learning rate suits both.
                    parameter.add_(change, alpha=-0.2 * group["lr"] * math.sqrt(max(parameter.shape)))

    def _compute_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The whole matrix of momentum and gradient, as it is orthogonalised, with no more rows than columns."""
        momentum = self.state[parameter]["momentum_buffer"]
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(momentum, group["momentum"]).to(choose_product_dtype(parameter.device))
        if isinstance(update, DTensor):
            update = update.full_tensor()
        return update if _is_wide(parameter) else update.mT


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


class Optimizer:
    """The optimizers of a run behind one `step`: Adam or AdamW, or Muon for hidden matrices and AdamW for the rest.

    undecayed: weights without weight decay, whatever they are
    """

    def __init__(self, model: nn.Module, settings: OptimizerRecipe, undecayed: Collection[str] = ()):
        decay, no_decay = split_by_decay(model, undecayed)
        by_name = {**decay, **no_decay}
        self.parameters = list(by_name.values())
        self.members: list[torch.optim.Optimizer] = []
        if settings.name == "muon":
            matrices = [parameter for parameter in decay.values() if parameter.ndim == 2]
            decay = {name: parameter for name, parameter in decay.items() if parameter.ndim != 2}
            if matrices:
                self.members.append(
                    Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay, momentum=0.95)
                )
        groups = [
            {"params": list(decay.values()), "weight_decay": settings.weight_decay},
            {"params": list(no_decay.values()), "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
        if groups:
            self.members.append(kind(groups, lr=settings.learning_rate, betas=settings.betas, eps=1e-8, fused=True))
        self.gradient_clip = settings.gradient_clip
        self.names = {parameter: name for name, parameter in by_name.items()}
        self._init_state()

    def set_learning_rate(self, rate: float) -> None:
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = rate

    def clip_gradients(self) -> float:
        """Scales gradients down to the norm `gradient_clip` if theirs is larger. Returns their norm before that."""
        limit = math.inf if self.gradient_clip is None else self.gradient_clip
        return float(nn.utils.clip_grad_norm_(self.parameters, limit))

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizers' state by name: moments and steps of every parameter, from the start of the run. Loading a
        checkpoint writes into these."""
        return {
            f"{name}.{part}": value
            for member in self.members
            for parameter, state in member.state.items()
            for name in [self.names[parameter]]
            for part, value in state.items()
        }

    def _init_state(self) -> None:
        """Makes the state that the optimizers would make at the first step: zeros."""
        for member in self.members:
            moments = ("momentum_buffer",) if isinstance(member, torch.optim.Muon) else ("exp_avg", "exp_avg_sq")
            for group in member.param_groups:
                for parameter in group["params"]:
                    state = member.state[parameter]
                    if "exp_avg" in moments:
                        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    for moment in moments:
                        state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _list_local_parts(values: list[Tensor]) -> list[Tensor]:
    """This process's parts of sharded tensors."""
    return [value.to_local() if hasattr(value, "to_local") else value for value in values]


class WeightAverage:
    """average ← decay · average + (1 - decay) · weights, after every step, in fp32.

    In the first steps the decay is smaller, (1 + n) / (10 + n) after n steps, so that the average forgets the random
    initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.values = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Adds the weights after `steps` steps to the average."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(
            _list_local_parts(list(self.values.values())), _list_local_parts(list(self.parameters.values())), 1 - decay
        )

    def tensors(self) -> dict[str, Tensor]:
        """The average by name, for checkpoints."""
        return self.values

    @contextlib.contextmanager
    def use_as_weights(self) -> Iterator[None]:
        """Gives the model the average as its weights while this is open."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        pairs = zip(
            _list_local_parts(list(self.parameters.values())),
            _list_local_parts(list(self.values.values())),
            strict=True,
        )
        for weight, average in pairs:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
