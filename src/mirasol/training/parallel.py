"""How the processes of a run share it: joining them, sharding the model, cutting a batch and adding up its losses."""

import contextlib
import datetime
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe, Stage
from mirasol.data.clip_cache import BadWindow
from mirasol.data.sampler import Batch
from mirasol.errors import Stopped, UserError
from mirasol.model.kernels import compile_layers, find_layers
from mirasol.model.losses import BatchTotals, count_loss_chunks, sum_text_weights
from mirasol.model.mirasol import MirasolForConditionalGeneration
from mirasol.training.ranks import ProcessLost, Ranks
from mirasol.training.stages import stage_losses

# The model's outputs hold views (latents by chunk), and nothing changes them in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

MASKS = ("chunk_mask", "video_mask", "audio_mask")


@contextlib.contextmanager
def joined_ranks(recipe: Recipe):
    """The processes that `torchrun` started, while the context is open; one process alone where it did not. A process
    group that is there already is used, and left as it is.

    Raises:
        UserError: several processes and a recipe with `parallel.kind: none`, or clips that cannot be shared evenly.
        ProcessLost: another process has gone, or gives no answer for the recipe's `process_seconds`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or (world_size == 1 and recipe.parallel.kind == "none"):
        yield Ranks()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    _check_shares(recipe, rank, world_size)
    on_gpu = torch.cuda.is_available() and recipe.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    limit = datetime.timedelta(seconds=recipe.process_limit)
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=limit)
    try:
        host, files = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        ranks = Ranks(rank, world_size, local_rank, host, files, recipe.process_limit)
        with ranks.losses_told():
            yield ranks
    except (UserError, Stopped) as error:
        # They come to all processes alike; one of them speaks for all. Unless that one is lost itself.
        error.told_by_first = rank > 0 and not isinstance(error, ProcessLost)
        raise
    finally:
        if joins:
            dist.destroy_process_group()


def _check_shares(recipe: Recipe, rank: int, world_size: int) -> None:
    error = None
    if recipe.parallel.kind == "none":
        error = UserError(f"torchrun started {world_size} processes: set parallel.kind to ddp or fsdp")
    for name, stage in recipe.stages.items():
        if stage.clips_per_step % (world_size * recipe.accumulation) and error is None:
            error = UserError(
                f"stages.{name}.clips_per_step={stage.clips_per_step} cannot be shared by {world_size} processes "
                f"in {recipe.accumulation} microbatches: set a multiple of {world_size * recipe.accumulation}"
            )
    if error is not None:
        error.told_by_first = rank > 0
        raise error


@dataclass(frozen=True)
class Share:
    """What the other processes must know of this one's part of a step's batch.

    text: weight of its target tokens
    masks: its chunk, video and audio masks, bool [3, clip, chunk]; None for images
    asked_to_stop: a signal that came to this process
    replaced: clips that it found to be bad and put others in place of
    """

    text: float
    masks: Tensor | None
    asked_to_stop: Signals | None = None
    replaced: tuple[BadWindow, ...] = ()


def share_of(batch: Batch, tensors: Mapping[str, Tensor], asked_to_stop: Signals | None = None) -> Share:
    """The share that a process's tensors of a step are."""
    masks = torch.stack([tensors[name] for name in MASKS]).cpu() if MASKS[0] in tensors else None
    return Share(sum_text_weights(tensors["labels"], tensors.get("row_weights")), masks, asked_to_stop, batch.replaced)


def make_batch_totals(
    shares: Sequence[Share], clips: int, accumulation: int, config: MirasolConfig, ranks: Ranks
) -> list[BatchTotals | None]:
    """For each microbatch the totals of the step's batch of `clips` clips; None for one that is the entire batch."""
    if accumulation == ranks.world_size == 1:
        return [None]
    totals = {"text": sum(share.text for share in shares), "images": float(clips)}
    longest = 0
    if shares[0].masks is not None:
        longest = max(share.masks.shape[2] for share in shares)
        padded = [F.pad(share.masks, (0, longest - share.masks.shape[2])).chunk(accumulation, 1) for share in shares]
        for parts in zip(*padded, strict=True):
            for name, total in count_loss_chunks(config, *torch.cat(parts, dim=1)).items():
                totals[name] = totals.get(name, 0.0) + total
    return [BatchTotals(**totals, chunks=longest)] * accumulation


def microbatches(tensors: Mapping[str, Tensor], accumulation: int) -> list[dict[str, Tensor]]:
    """A process's tensors of a step, cut into its microbatches along the first dimension."""
    parts = {name: value.split(len(value) // accumulation) for name, value in tensors.items()}
    return [{name: values[place] for name, values in parts.items()} for place in range(accumulation)]


def seed_noise(seed: int, device: torch.device) -> None:
    """Seeds torch's own generators of the CPU and of `device`, as `torch.manual_seed` does.

    Without a GPU that formats the whole call stack, for the day when there will be one: a millisecond of every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


class _GatheredRows(Function):
    """The rows of all processes, by rank; each process's gradient of its own rows is the sum over all of them."""

    @staticmethod
    def forward(ctx, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.first = ranks, ranks.rank * len(rows)
        ctx.rows = len(rows)
        gathered = torch.zeros(ranks.world_size * len(rows), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        gathered[ctx.first : ctx.first + ctx.rows] = rows
        return ranks.summed(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.summed(gradient)[ctx.first : ctx.first + ctx.rows], None


@dataclass(frozen=True)
class RankPeers:
    """The run's processes as a model's losses know them, see `mirasol.model.losses.Peers`."""

    ranks: Ranks

    @property
    def rank(self) -> int:
        return self.ranks.rank

    def sum(self, tensor: Tensor) -> Tensor:
        return self.ranks.summed(tensor)

    def gather(self, rows: Tensor) -> Tensor:
        return _GatheredRows.apply(rows, self.ranks) if self.ranks.world_size > 1 else rows


class _StagePass(nn.Module):
    """One stage's pass as a module, for DDP to wrap: whatever leaves it beside the loss has no gradient."""

    def __init__(self, model: MirasolForConditionalGeneration, stage: Stage):
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, tensors: Mapping[str, Tensor], batch_totals: BatchTotals | None) -> tuple[Tensor, Any]:
        output = stage_losses(self.model, self.stage, tensors, batch_totals)
        loss = output.loss
        for name, value in output.items():
            if isinstance(value, Tensor):
                output[name] = value.detach()
        return loss, [output]


class ParallelModel:
    """A model as the processes of a run compute it. `model` itself keeps its names and its methods.

    With `fsdp` only the first process needs weights in it; the others may pass a model on the meta device.
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
        self._pass: nn.Module | None = None
        self._stage: Stage | None = None

    def _shard(self) -> None:
        # The initial weights are the first process's, whatever the number of processes.
        weights = self.model.state_dict() if self.ranks.is_first else {}
        self.model.to("meta")
        mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.recipe.precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in find_layers(self.model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=self.recipe.parallel.reshard)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        # A process whose answers are all written goes on until every one's are: the others need its shards.
        self.model.generate = partial(self.model.generate, synced_gpus=self.ranks.world_size > 1)
        for name in ("image_text", "encode", "generate", "score"):
            register_fsdp_forward_method(self.model, name)
        self.model.to_empty(device=self.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, weights, options=options)

    def precision(self) -> contextlib.AbstractContextManager:
        """The arithmetic of the recipe, for a pass of the model."""
        if self.recipe.precision == "bf16" and self.kind != "fsdp":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def enter(self, stage: Stage) -> None:
        """From now on `losses` are this stage's, of the parameters that need gradients now."""
        self._stage = stage
        if self.kind == "ddp":
            on_gpu = [self.device.index or self.ranks.local_rank] if self.device.type == "cuda" else None
            # A batch reaches all that trains: what it lacks (a modality, a second chunk) has gradients of zero.
            self._pass = DistributedDataParallel(
                _StagePass(self.model, stage), device_ids=on_gpu,
                gradient_as_bucket_view=True,
            )  # fmt: skip

    def backward(self, tensors: Mapping[str, Tensor], batch_totals: BatchTotals | None, is_last: bool) -> Any:
        """One microbatch forward and backward. Gradients add up; after the last they are those of the whole batch, on
        every process. Returns the pass's output, its losses without gradient."""
        assert self._stage is not None
        if self._pass is None:
            with self.precision():
                output = stage_losses(self.model, self._stage, tensors, batch_totals)
            (output.loss * self.ranks.world_size).backward()
            return output
        with contextlib.nullcontext() if is_last else self._pass.no_sync():
            with self.precision():
                loss, (output,) = self._pass(tensors, batch_totals)
            # DDP, as FSDP, takes the mean over the processes of what is to be added up.
            (loss * self.ranks.world_size).backward()
        return output

    def rest(self) -> None:
        """Gives back weights that a pass without a backward pass left gathered: they may change now."""
        if self.kind == "fsdp":
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def full_weights(self) -> dict[str, Tensor]:
        """All weights in the CPU's memory of the first process (none on the others)."""
        if self.kind != "fsdp":
            return self.model.state_dict() if self.ranks.is_first else {}
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
