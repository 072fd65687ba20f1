"""What the two processes of test_parallel.py do: `torchrun two_processes.py work.json results.json`."""

import copy
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.recipe import OptimizerRecipe, ParallelRecipe, Recipe
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import UserError
from mirasol.training.batches import MASKS, RankShare, count_share, make_batch_totals
from mirasol.training.distributed import ParallelModel, join_ranks
from mirasol.training.optim import Optimizer
from mirasol.training.trainer import train

KINDS = ("ddp", "fsdp")
STACK = {"depth": 1, "width": 16, "hidden": 16, "heads": 2, "head_width": 8, "dropout": 0.0}
CONFIG = {
    "vit": STACK,
    "audio": {"adapter": STACK},
    "combiner": {"stack": STACK},
    "latent": {"stack": STACK, "mask_ratio": 0.0},
    "reconstruction": {"stack": STACK, "audio": True},
    "text": {"stack": STACK},
    "contrastive": {"width": 8},
}


def model() -> MirasolForConditionalGeneration:
    torch.manual_seed(5)
    return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **CONFIG)).train()


def clips(config: MirasolConfig) -> dict[str, torch.Tensor]:
    """Four clips of which the last two, the second process's, are shorter and lack all audio; one lacks its video."""
    generator = torch.Generator().manual_seed(6)
    lengths, chunks = torch.tensor([4, 3, 2, 2]), 4
    chunk_mask = torch.arange(chunks) < lengths[:, None]
    video_mask, audio_mask = chunk_mask.clone(), chunk_mask.clone()
    video_mask[1], audio_mask[2:] = False, False
    labels = torch.randint(5, 60, (8, 7), generator=generator)
    ids = labels.clone()
    labels[:, :3] = -100
    labels[4:, 5:] = -100
    return {
        "video": torch.randn(4, chunks, *config.video.chunk_shape, generator=generator),
        "audio": torch.randn(4, chunks, *config.audio.chunk_shape, generator=generator),
        "chunk_mask": chunk_mask, "video_mask": video_mask, "audio_mask": audio_mask,
        "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids), "labels": labels,
    }  # fmt: skip


def images(config: MirasolConfig) -> dict[str, torch.Tensor]:
    whole = clips(config)
    ids = whole["decoder_input_ids"][:4]
    return {"images": whole["video"][:, 0, 0], "decoder_input_ids": ids, "labels": ids.clone()}


def of_rank(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """A half of the rows, and of the chunks no more than its own clips have."""
    half = {name: value.chunk(2)[rank] for name, value in tensors.items()}
    if "chunk_mask" in half:
        longest = int(half["chunk_mask"].sum(1).max())
        for name in ("video", "audio", *MASKS):
            half[name] = half[name][:, :longest]
    return half


def with_gradients(one: MirasolForConditionalGeneration, names: set[str]) -> None:
    for name, parameter in one.named_parameters():
        parameter.requires_grad_(name in names)


def compare(recipe: Recipe, ranks, kind: str, objective: str) -> float:
    """Largest difference in losses and gradients between one process with the whole batch and both with a half each."""
    device = torch.device("cpu")
    stage = dataclasses.replace(
        next(iter(recipe.stages.values())), objective=objective, questions_per_clip=1, clips_per_step=4,
        span="clip", drop_audio=0.0, drop_video=0.0,
    )  # fmt: skip
    alone = model()
    tensors = clips(alone.config) if objective == "clips" else images(alone.config)
    alone.config.loss_weights = stage.loss_weights
    expected = alone(**tensors) if objective == "clips" else alone.image_text(**tensors)
    expected.loss.backward()
    reached = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}

    shared = ParallelModel(model(), dataclasses.replace(recipe, parallel=ParallelRecipe(kind)), ranks, device)
    with_gradients(shared.model, set(reached))
    shared.model.config.loss_weights = stage.loss_weights
    shared.enter(stage)
    own = of_rank(tensors, ranks.rank)
    batch = type("Batch", (), {"replaced": ()})()
    shares: list[RankShare] = ranks.gather(count_share(batch, own))
    (totals,) = make_batch_totals(shares, 4, 1, alone.config, ranks)
    output = shared.backward(own, totals, is_last=True)
    differences = []
    for name, value in expected.items():
        if name.endswith("loss"):
            differences.append(float((ranks.sum_tensor(output[name].detach()) - value).abs()))
    for name, parameter in shared.model.named_parameters():
        assert (parameter.grad is None) == (name not in reached), f"{name}: a gradient is missing"
        if parameter.grad is not None:
            gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            differences.append(float((gradient - reached[name]).abs().max()))
    return max(differences)


def answers(recipe: Recipe, ranks) -> bool:
    """Whether each process's answers, to clips and at lengths of its own, are those of a model that is whole."""
    alone = model().eval()
    tensors = {name: value for name, value in clips(alone.config).items() if name != "labels"}
    own = of_rank(tensors, ranks.rank)
    # The first process has written all it was asked for long before the second.
    settings = {"max_new_tokens": 2 + 9 * ranks.rank, "do_sample": False, "eos_token_id": None}
    shared = ParallelModel(
        model().eval(), dataclasses.replace(recipe, parallel=ParallelRecipe("fsdp")), ranks, torch.device("cpu")
    )
    found = shared.model.generate(**own, **settings)
    return torch.equal(found, alone.generate(**own, **settings))


def step_of_muon(ranks) -> float:
    """Largest difference between what Muon makes of whole matrices and of shards, given gradients that are the same."""
    torch.manual_seed(7)
    alone = torch.nn.Sequential(torch.nn.Linear(12, 21, bias=False), torch.nn.Linear(21, 5, bias=False))
    shared = copy.deepcopy(alone)
    fully_shard(shared, mesh=init_device_mesh("cpu", (ranks.world_size,)))
    settings = OptimizerRecipe(name="muon", learning_rate=0.1, weight_decay=0.5)
    optimizers = Optimizer(alone, settings), Optimizer(shared, settings)
    for _ in range(3):
        for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = distribute_tensor(one.grad, other.device_mesh, other.placements)
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(alone.parameters(), shared.parameters(), strict=True)
    return max(float((one - other.full_tensor()).detach().abs().max()) for one, other in pairs)


def patience(ranks) -> list[bool]:
    """Whether each process waited for longer than the limit of a single wait, and the others worked after the first."""
    host, files = (dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=8)) for _ in range(2))
    hasty = dataclasses.replace(ranks, host=host, files=files)
    began = time.monotonic()

    def work() -> float:
        time.sleep(0 if ranks.rank else 12)
        return time.monotonic() - began

    seconds = hasty.run_first_then_rest(work)
    return ranks.gather(seconds > 11)


def run(values: dict, kind: str, resume: bool = False) -> None:
    output = f"{values['output']}-{kind}"
    recipe = recipe_from_dict({**values, "output": output, "parallel": {"kind": kind}})
    train(recipe, console=Console(quiet=True), resume=resume)


def check_parts(values: dict, results: dict) -> None:
    """What needs no training."""
    with join_ranks(recipe_from_dict({**values, "parallel": {"kind": "ddp"}})) as ranks:
        recipe = recipe_from_dict(values)
        for kind in KINDS:
            for objective in ("clips", "image_text"):
                results[f"{kind} {objective}"] = compare(recipe, ranks, kind, objective)
        results["answers"] = ranks.gather(answers(recipe, ranks))
        results["muon"] = step_of_muon(ranks)
        results["patience"] = patience(ranks)


def check_error(values: dict, results: dict) -> None:
    """Half of the folder's checks run in the first process alone: its error has to reach the other one."""
    try:
        run(values, "ddp")
    except UserError as error:
        results["error"] = str(error)
        results["report from rank zero"] = [None, None]
        dist.all_gather_object(results["report from rank zero"], error.report_from_rank_zero)


def main() -> None:
    work, results = json.loads(Path(sys.argv[1]).read_text()), {}
    dist.init_process_group("gloo")
    if work["checks"]:
        check_parts(work["runs"][0], results)
    for kind in KINDS:
        for values in work["runs"]:
            run(values, kind)
        for values in work["resumed"]:
            run(values, kind, resume=True)
    if work["checks"]:
        check_error(work["runs"][0], results)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
