"""The weights that meet pixels: patch kernels into tubes, position tables onto other grids."""

import math
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import TubeConfig
from mirasol.errors import UserError
from mirasol.model.resolution import resized_grid
from mirasol.pretrained.weight_source import Copy, Fill, Source, no_bias

TUBES = "chunk_encoder.tubes"


def flat_tube(config: MirasolConfig) -> int:
    """Index of the one tube of a single frame; UserError if there is none, or more than one."""
    flat = [index for index, tube in enumerate(config.video.tubes) if tube.flat]
    if len(flat) != 1:
        raise UserError(
            f"video.tubes has {len(flat)} tubes whose kernel is 1 frame long: an image model's patches need exactly one"
        )
    return flat[0]


def video_parts(config: MirasolConfig, patch: int, resolution: int | None, own: int | None = None) -> dict:
    """The `video` fields that patches of `patch` pixels with learned positions need.

    A chosen resolution that the patches do not divide is refused, unless it is the source's own (SigLIP has such).
    """
    tubes = [
        {"kernel": tube.kernel, "stride": tube.stride, "offset": tube.offset}
        if not tube.flat
        else {
            "kernel": (1, patch, patch),
            "stride": (tube.stride[0], patch, patch),
            "offset": (tube.offset[0], 0, 0),
        }
        for tube in config.video.tubes
    ]
    flat_tube(config)
    image_size = config.video.image_size if resolution is None else resolution
    if image_size < patch:
        raise UserError(f"frames of {image_size} pixels are smaller than the source's patches of {patch} pixels")
    if resolution is not None and image_size % patch and image_size != own:
        below = image_size // patch * patch
        raise UserError(
            f"patches of {patch} pixels leave {image_size % patch} of {image_size} pixels over: "
            f"choose --resolution {below} or {below + patch}"
        )
    return {"image_size": image_size, "tubes": tubes, "learned_positions": True}


def inflated(kernel: Float[Tensor, "width 3 patch patch"], tube: TubeConfig) -> Float[Tensor, "width 3 t y x"]:
    """A 2D patch kernel as a tube's: resized in space, repeated over time and divided by it (I3D, TubeViT).

    It is scaled and shifted so that the weights keep their sums: a still clip of one colour gives the tube the same
    token as it gives the patch.
    """
    frames, height, width = tube.kernel
    flat = F.interpolate(kernel, (height, width), mode="bicubic", align_corners=False, antialias=True)
    flat = flat * (kernel.shape[2] * kernel.shape[3] / (height * width))
    wanted, found = (weights.sum((2, 3), keepdim=True) for weights in (kernel, flat))
    flat = flat + (wanted - found) / (height * width)
    return flat[:, :, None].expand(-1, -1, frames, -1, -1) / frames


def patch_steps(
    source: Source, config: MirasolConfig, kernel: str, bias: str | None, inflate: bool
) -> Iterable[Copy | Fill]:
    """The 2D patches' convolution and, if `inflate`, those of the other tubes made from it."""
    side = source.shape(kernel)[-1]
    for index, tube in enumerate(config.video.tubes):
        target = f"{TUBES}.projections.{index}"
        if tube.flat:
            yield Copy(f"{target}.weight", (kernel,), lambda weights: weights[:, :, None])
        elif inflate:
            note = f"inflated from {side} x {side} to {' x '.join(map(str, tube.kernel))}"
            yield Copy(f"{target}.weight", (kernel,), lambda weights, tube=tube: inflated(weights, tube), note)
        else:
            continue
        yield no_bias(target) if bias is None else Copy(f"{target}.bias", (bias,))


def position_steps(source: Source, config: MirasolConfig, table: str, class_token: str | None) -> Iterable[Copy | Fill]:
    """The learned positions, and the class token with its position added to it."""
    tube = config.video.tubes[flat_tube(config)]
    grid = tube.grid(config.video.frames_per_chunk, config.video.image_size)[1:]
    width = source.shape(table)[-1]
    first = 1 if class_token else 0
    count = math.prod(source.shape(table)) // width - first
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"{source.name}: {table} has {count} positions of patches, which are no square grid")
    note = "" if (side, side) == grid else f"interpolated from {side} x {side} to {' x '.join(map(str, grid))}"
    yield Copy(
        f"{TUBES}.learned_position",
        (table,),
        lambda positions: resized_grid(positions.reshape(-1, width)[first:], (side, side), grid),
        note,
    )
    yield Fill(f"{TUBES}.position_gate", 0.0, "closed: the fixed code comes in as training opens it")
    if class_token:
        yield Copy(
            "chunk_encoder.vit.class_token",
            (class_token, table),
            lambda token, positions: token.flatten() + positions.reshape(-1, width)[0],
            "with its position",
        )


def check_depth(source: Source, config: MirasolConfig, depth: int, first_of_layer: str, width: int) -> None:
    """Refuses a source of another depth than the config's ViT, naming the first tensor that has no partner."""
    wanted = config.vit.depth
    if depth < wanted:
        raise UserError(
            f"{source.name}: has {depth} layers, vit.depth={wanted}: nothing there for "
            f"chunk_encoder.vit.blocks.{depth}.attention_norm.weight [{config.vit.width}]"
        )
    if depth > wanted:
        raise UserError(
            f"{source.name}: has {depth} layers, vit.depth={wanted}: no place for "
            f"{first_of_layer.format(wanted)} [{width}]"
        )
