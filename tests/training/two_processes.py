"""What the two processes of test_parallel.py do: `torchrun two_processes.py recipe.json results.json`."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.errors import UserError
from mirasol.training.parallel import MASKS, ParallelModel, Share, global_batches, joined_ranks, share_of
from mirasol.training.recipe import ParallelRecipe, Recipe, recipe_from_dict
from mirasol.training.trainer import train

STACK = {"depth": 2, "width": 16, "hidden": 16, "heads": 2, "head_width": 8, "dropout": 0.0}
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
        window="clip", drop_audio=0.0, drop_video=0.0,
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
    shares: list[Share] = ranks.gathered(share_of(batch, own))
    (whole,) = global_batches(shares, 4, 1, alone.config, ranks)
    output = shared.backward(own, whole, is_last=True)
    differences = []
    for name, value in expected.items():
        if name.endswith("loss"):
            differences.append(float((ranks.summed(output[name].detach()) - value).abs()))
    for name, parameter in shared.model.named_parameters():
        assert (parameter.grad is None) == (name not in reached), f"{name}: a gradient is missing"
        if parameter.grad is not None:
            gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            differences.append(float((gradient - reached[name]).abs().max()))
    return max(differences)


def main() -> None:
    values, results = json.loads(Path(sys.argv[1]).read_text()), {}
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    recipe = recipe_from_dict({**values, "parallel": {"kind": "ddp"}})
    with joined_ranks(recipe) as ranks:
        for kind in ("ddp", "fsdp"):
            for objective in ("clips", "image_text"):
                results[f"{kind} {objective}"] = compare(recipe, ranks, kind, objective)
    for kind in ("ddp", "fsdp"):
        output = f"{values['output']}-{kind}"
        train(recipe_from_dict({**values, "output": output, "parallel": {"kind": kind}}), console=Console(quiet=True))
    # Half of the folder's checks run in the first process alone: its error has to reach the other one.
    try:
        train(recipe_from_dict({**values, "output": output, "parallel": {"kind": kind}}), console=Console(quiet=True))
    except UserError as error:
        results["error"] = str(error)
        results["told by first"] = [None, None]
        dist.all_gather_object(results["told by first"], error.told_by_first)
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
