"""The processes of a run: how they agree with each other, and how they share its model.

A run has one process unless `torchrun` starts more.
"""

import contextlib
import datetime
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from mirasol.config.recipe import Recipe, Stage
from mirasol.errors import Stopped, UserError
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.model.kernels import compile_layers, find_layers
from mirasol.model.losses import BatchTotals
from mirasol.model.outputs import MirasolImageTextOutput, MirasolOutput
from mirasol.model.transformer import RowNoise
from mirasol.training.weights.stages import compute_stage_losses

# The model's outputs hold views (latents by chunk), and nothing changes them in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

Value = TypeVar("Value")
LossOutput = MirasolOutput | MirasolImageTextOutput

# Seconds between the heartbeats that processes exchange while one of them does long work.
HEARTBEAT_SECONDS = 1.0


class ProcessLost(UserError):
    """Another process of the run has ended or hangs. Every process that is left reports this itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. The defaults are a run of one process, which needs no process group.

    rank, world_size: number of this process, and how many there are
    local_rank: its number on this machine, which is also the number of its GPU
    host: group for objects and tensors in CPU memory
    files: another such group, for the thread that writes checkpoints while the main thread uses `host`
    seconds: timeout of these groups, named in error messages
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: dist.ProcessGroup | None = None
    files: dist.ProcessGroup | None = None
    seconds: float = 0.0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and reports for all."""
        return self.rank == 0

    def for_checkpoints(self) -> "Ranks":
        """The same processes, with the group of the thread that writes checkpoints."""
        return replace(self, host=self.files)

    def broadcast(self, value: Value) -> Value:
        """The first process's value, on every process."""
        if self.host is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        if self.host is None:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, on the tensor's device; the tensor itself in a run of one process."""
        if self.host is None:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.host if tensor.device.type == "cpu" else None)
        return total

    def run_and_gather(self, work: Callable[[], Value]) -> list[Value]:
        """The results of `work()` on every process, by rank. If it fails on any of them, it fails on all.

        Every process raises the error of the lowest rank that failed, so none waits for one that has ended. On all but
        the first process the error is marked `report_from_rank_zero`.
        """
        if self.host is None:
            return [work()]
        value, error = None, None
        try:
            value = work()
        except ProcessLost:
            raise  # the others cannot be reached any more, and find out by themselves
        except Exception as raised:
            error = raised
        outcomes = self.gather((value, _make_picklable(error)))
        failure = next((failed for _, failed in outcomes if failed is not None), None)
        if failure is None:
            return [value for value, _ in outcomes]
        failure = failure if error is None else error
        failure.report_from_rank_zero = not self.is_first
        raise failure

    def run_together(self, work: Callable[[], Value]) -> Value:
        """This process's result of `work()`; errors are shared as by `run_and_gather`."""
        if self.host is None:
            return work()
        results: list[Value] = []
        self.run_and_gather(lambda: results.append(work()))
        return results[0]

    def with_heartbeat(self, work: Callable[[], Value]) -> Value:
        """As `run_together`, for work of any length: meanwhile a thread sends heartbeats to the other processes."""
        if self.host is None:
            return work()
        results: list[Value] = []
        self.run_and_gather(lambda: results.append(self._send_heartbeats(work)))
        return results[0]

    def _send_heartbeats(self, work: Callable[[], Value]) -> Value:
        """This process's result of `work()`, returned once all processes have finished."""
        finished, errors, background = threading.Event(), [], self.for_checkpoints()

        def send() -> None:
            try:
                with background.raise_if_rank_lost():
                    while any(background.gather(not finished.wait(HEARTBEAT_SECONDS))):
                        pass
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=send, name="heartbeat", daemon=True)
        thread.start()
        result = None
        try:
            result = work()
        except Exception as error:
            errors.append(error)
        finished.set()
        while thread.is_alive():
            try:
                thread.join()
            except Stopped as stopped:  # a signal to this process alone: the others hear of it once they have finished
                errors.append(stopped)
        if errors:
            raise errors[0]
        return result

    def run_first_then_rest(self, work: Callable[[], Value]) -> Value:
        """`work()` on the first process, then on the others, which find on disk what it wrote. With heartbeats."""
        if self.is_first:
            result = self.with_heartbeat(work)
            self.with_heartbeat(lambda: None)
            return result
        self.with_heartbeat(lambda: None)
        return self.with_heartbeat(work)

    @contextlib.contextmanager
    def raise_if_rank_lost(self) -> Iterator[None]:
        """Raises ProcessLost in place of PyTorch's errors about another process that has ended or does not answer."""
        try:
            yield
        except RuntimeError as error:
            # gloo's errors have no type of their own, but all name its source file.
            if self.host is None or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise
            problem = "has ended: see its own output"
            if re.search("timed out|timeout", str(error), re.IGNORECASE):
                problem = f"gave no answer within process_seconds={self.seconds:g}: it hangs, or was stopped"
            raise ProcessLost(
                f"process {self.rank} of {self.world_size}: another process {problem}; continue with --resume"
            ) from error


def _make_picklable(error: Exception | None) -> Exception | None:
    """The error, or one with the same message if it cannot be pickled."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return (
            UserError(str(error)) if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
        )
    return error


@contextlib.contextmanager
def join_ranks(recipe: Recipe) -> Iterator[Ranks]:
    """Joins the processes that `torchrun` started for as long as the context is open; otherwise a run of one process.
    An existing process group is used and left open.

    Raises:
        UserError: several processes and a recipe with `parallel.kind: none`, or clips that cannot be split evenly.
        ProcessLost: another process has ended, or gives no answer for the recipe's `process_seconds`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or (world_size == 1 and recipe.parallel.kind == "none"):
        yield Ranks()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    _check_split(recipe, rank, world_size)
    on_gpu = torch.cuda.is_available() and recipe.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    limit = datetime.timedelta(seconds=recipe.process_limit)
    owns_group = not dist.is_initialized()
    if owns_group:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=limit)
    try:
        host, files = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        ranks = Ranks(rank, world_size, local_rank, host, files, recipe.process_limit)
        with ranks.raise_if_rank_lost():
            yield ranks
    except (UserError, Stopped) as error:
        # All processes raise these, so one reports for all; but each one reports a lost process.
        error.report_from_rank_zero = rank > 0 and not isinstance(error, ProcessLost)
        raise
    finally:
        if owns_group:
            dist.destroy_process_group()


def _check_split(recipe: Recipe, rank: int, world_size: int) -> None:
    """Raises UserError if the processes cannot share the recipe's batches."""
    error = None
    if recipe.parallel.kind == "none":
        error = UserError(f"torchrun started {world_size} processes: set parallel.kind to ddp or fsdp")
    for name, stage in recipe.stages.items():
        if stage.clips_per_step % (world_size * recipe.accumulation) and error is None:
            error = UserError(
                f"stages.{name}.clips_per_step={stage.clips_per_step} cannot be split over {world_size} processes "
                f"in {recipe.accumulation} microbatches: set a multiple of {world_size * recipe.accumulation}"
            )
    if error is not None:
        error.report_from_rank_zero = rank > 0
        raise error


def seed_noise(seed: int, device: torch.device) -> None:
    """Seeds torch's own generators of the CPU and of `device`, as `torch.manual_seed` does.

    Without a GPU `torch.manual_seed` (2.13) also formats the call stack, in case one appears later: 1 ms of every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def seed_rows(model: nn.Module, seeds: Tensor | None) -> None:
    """Gives the model's masking of x and its layer drop a seed for each clip of the next forward pass, int64 [clip], so
    that they do not depend on which process computes the clip; None: they draw from PyTorch's generators."""
    modules = [module for module in model.modules() if isinstance(module, RowNoise)]
    for number, module in enumerate(modules):
        module.seeds = None if seeds is None else seeds + (number << 32)


class _GatherRows(Function):
    """The rows of all processes, by rank. A process's gradient of its own rows is the sum over all processes."""

    @staticmethod
    def forward(ctx, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.first, ctx.rows = ranks, ranks.rank * len(rows), len(rows)
        gathered = torch.zeros(ranks.world_size * len(rows), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        gathered[ctx.first : ctx.first + ctx.rows] = rows
        return ranks.sum_tensor(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_tensor(gradient)[ctx.first : ctx.first + ctx.rows], None


@dataclass(frozen=True)
class RankPeers:
    """The run's processes as a model's losses see them: `mirasol.model.losses.Peers`."""

    ranks: Ranks

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.ranks.rank

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, without gradient."""
        return self.ranks.sum_tensor(tensor)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every process, by rank, with gradient."""
        return _GatherRows.apply(rows, self.ranks) if self.ranks.world_size > 1 else rows


class _StagePass(nn.Module):
    """One stage's forward pass as a module, for DDP to wrap: only the loss it returns has a gradient."""

    def __init__(self, model: MirasolForConditionalGeneration, stage: Stage):
        super().__init__()
        self.model, self.stage = model, stage

    def forward(
        self, tensors: Mapping[str, Tensor], batch_totals: BatchTotals | None
    ) -> tuple[Tensor, list[LossOutput]]:
        output = compute_stage_losses(self.model, self.stage, tensors, batch_totals)
        loss = output.loss
        for name, value in output.items():
            if isinstance(value, Tensor):
                output[name] = value.detach()
        return loss, [output]


class ParallelModel:
    """A model as the processes of a run compute it. `model` itself keeps its names and methods.

    With `fsdp` only the first process needs a model with weights; the others may pass one on the meta device.
    """

    def __init__(self, model: MirasolForConditionalGeneration, recipe: Recipe, ranks: Ranks, device: torch.device):
        self.model, self.recipe, self.ranks, self.device = model, recipe, ranks, device
        model.peers = RankPeers(ranks)
        self.kind = recipe.parallel.kind if ranks.host is not None else "none"
        if recipe.recompute != "none":
            model.recompute_activations(recipe.recompute)
        if self.kind == "fsdp":
            self._shard()
        else:
            model.to(device)
        if recipe.compile:
            compile_layers(model, forward_only=self.kind == "fsdp")
        self._ddp: DistributedDataParallel | None = None
        self._stage: Stage | None = None

    def _shard(self) -> None:
        # The initial weights are the first process's, so they do not depend on the number of processes.
        weights = self.model.state_dict() if self.ranks.is_first else {}
        self.model.to("meta")
        mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.recipe.precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in find_layers(self.model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=self.recipe.parallel.reshard)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        # A process that has all its answers continues until the others do: they need its shards.
        self.model.generate = partial(self.model.generate, synced_gpus=self.ranks.world_size > 1)
        for name in ("image_text", "encode", "generate", "score"):
            register_fsdp_forward_method(self.model, name)
        self.model.to_empty(device=self.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, weights, options=options)

    def use_precision(self) -> contextlib.AbstractContextManager[object]:
        """The recipe's arithmetic, for a pass of the model."""
        if self.recipe.precision == "bf16" and self.kind != "fsdp":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def enter(self, stage: Stage) -> None:
        """From now on `backward` computes this stage's losses, for the parameters that require gradients now."""
        self._stage = stage
        if self.kind == "ddp":
            device_ids = [self.device.index or self.ranks.local_rank] if self.device.type == "cuda" else None
            # Every trained parameter gets a gradient: zero where the batch lacks a modality or a second chunk.
            stage_pass = _StagePass(self.model, stage)
            self._ddp = DistributedDataParallel(stage_pass, device_ids=device_ids, gradient_as_bucket_view=True)

    def backward(self, tensors: Mapping[str, Tensor], batch_totals: BatchTotals | None, is_last: bool) -> LossOutput:
        """Forward and backward pass of one microbatch. Gradients add up; after the last microbatch they are those of
        the global batch, on every process. Returns the output; its losses have no gradient."""
        assert self._stage is not None
        if self._ddp is None:
            with self.use_precision():
                output = compute_stage_losses(self.model, self._stage, tensors, batch_totals)
            # FSDP and DDP take the mean over processes where a sum is needed.
            (output.loss * self.ranks.world_size).backward()
            return output
        with contextlib.nullcontext() if is_last else self._ddp.no_sync():
            with self.use_precision():
                loss, (output,) = self._ddp(tensors, batch_totals)
            (loss * self.ranks.world_size).backward()
        return output

    def reshard(self) -> None:
        """Frees weights that a pass without a backward pass left gathered, so that they may change."""
        if self.kind == "fsdp":
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def gather_weights(self) -> dict[str, Tensor]:
        """All weights in CPU memory on the first process; empty on the others."""
        if self.kind != "fsdp":
            return self.model.state_dict() if self.ranks.is_first else {}
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
