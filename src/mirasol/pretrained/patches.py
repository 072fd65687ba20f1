"""The weights at the input: patch kernels into tubes, learned positions onto other grids."""

import math
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import TubeConfig
from mirasol.errors import UserError
from mirasol.model.tubes import resize_grid
from mirasol.pretrained.weights import Copy, Fill, PretrainedWeights, fill_bias

TUBES = "chunk_encoder.tubes"


def find_flat_tube(config: MirasolConfig) -> int:
    """Index of the only tube that is a 2D patch. Raises UserError if there is none, or more than one."""
    flat = [index for index, tube in enumerate(config.video.tubes) if tube.flat]
    if len(flat) != 1:
        raise UserError(
            f"video.tubes has {len(flat)} tubes whose kernel is 1 frame long: an image model's patches need exactly one"
        )
    return flat[0]


def make_video_fields(config: MirasolConfig, patch: int, image_size: int | None, own: int | None = None) -> dict:
    """The `video` fields that patches of `patch` pixels with learned positions need.

    image_size: of the frames, pixels; None for the config's. own: the source's image size.

    Raises:
        UserError: an image size below one patch, or one given that patches do not divide and that is not the source's
            own (SigLIP has such).
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
    find_flat_tube(config)
    pixels = config.video.image_size if image_size is None else image_size
    if pixels < patch:
        raise UserError(f"frames of {pixels} pixels are smaller than the source's patches of {patch} pixels")
    if image_size is not None and pixels % patch and pixels != own:
        below = pixels // patch * patch
        raise UserError(
            f"patches of {patch} pixels leave {pixels % patch} of {pixels} pixels over: "
            f"choose --image-size {below} or {below + patch}"
        )
    return {"image_size": pixels, "tubes": tubes, "learned_positions": True}


def inflate_kernel(kernel: Float[Tensor, "width 3 patch patch"], tube: TubeConfig) -> Float[Tensor, "width 3 t y x"]:
    """A 2D patch kernel as a tube's: resized in space, repeated over time and divided by it (I3D, TubeViT).

    It is scaled and shifted so that the weights keep their sums: for a still clip of one colour, tube and patch give
    the same token.
    """
    frames, height, width = tube.kernel
    flat = F.interpolate(kernel, (height, width), mode="bicubic", align_corners=False, antialias=True)
    flat = flat * (kernel.shape[2] * kernel.shape[3] / (height * width))
    wanted, found = (weights.sum((2, 3), keepdim=True) for weights in (kernel, flat))
    flat = flat + (wanted - found) / (height * width)
    return flat[:, :, None].expand(-1, -1, frames, -1, -1) / frames


def plan_patches(
    source: PretrainedWeights, config: MirasolConfig, kernel: str, bias: str | None, inflate: bool
) -> Iterable[Copy | Fill]:
    """The 2D patches' convolution and, if `inflate`, those of the other tubes made from it."""
    side = source.shape(kernel)[-1]
    for index, tube in enumerate(config.video.tubes):
        target = f"{TUBES}.projections.{index}"
        if tube.flat:
            yield Copy(f"{target}.weight", (kernel,), lambda weights: weights[:, :, None])
        elif inflate:
            note = f"inflated from {side} x {side} to {' x '.join(map(str, tube.kernel))}"
            yield Copy(f"{target}.weight", (kernel,), lambda weights, tube=tube: inflate_kernel(weights, tube), note)
        else:
            continue
        yield fill_bias(target) if bias is None else Copy(f"{target}.bias", (bias,))


def plan_positions(
    source: PretrainedWeights, config: MirasolConfig, table: str, class_token: str | None
) -> Iterable[Copy | Fill]:
    """The learned positions, and the class token with its position added to it."""
    tube = config.video.tubes[find_flat_tube(config)]
    grid = tube.grid(config.video.frames_per_chunk, config.video.image_size)[1:]
    width = source.shape(table)[-1]
    first = 1 if class_token else 0
    count = math.prod(source.shape(table)) // width - first
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"{source.name}: {table} has {count} positions of patches, not a square grid")
    note = "" if (side, side) == grid else f"interpolated from {side} x {side} to {' x '.join(map(str, grid))}"
    yield Copy(
        f"{TUBES}.learned_position",
        (table,),
        lambda positions: resize_grid(positions.reshape(-1, width)[first:], (side, side), grid),
        note,
    )
    yield Fill(f"{TUBES}.position_gate", 0.0, "closed: training opens it and adds the fixed code")
    if class_token:
        yield Copy(
            "chunk_encoder.vit.class_token",
            (class_token, table),
            lambda token, positions: token.flatten() + positions.reshape(-1, width)[0],
            "with its position",
        )


def check_depth(source: PretrainedWeights, config: MirasolConfig, depth: int, first_of_layer: str, width: int) -> None:
    """Raises UserError for a source of another depth than the config's ViT, with a tensor that has no counterpart."""
    wanted = config.vit.depth
    if depth < wanted:
        raise UserError(
            f"{source.name}: has {depth} layers, vit.depth={wanted}: it has nothing for "
            f"chunk_encoder.vit.blocks.{depth}.attention_norm.weight [{config.vit.width}]"
        )
    if depth > wanted:
        raise UserError(
            f"{source.name}: has {depth} layers, vit.depth={wanted}: there is no place for "
            f"{first_of_layer.format(wanted)} [{width}]"
        )
