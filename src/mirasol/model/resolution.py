"""A model at another resolution: its learned tables of places are interpolated onto the new grid of tubes."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import VideoConfig
from mirasol.errors import UserError
from mirasol.model.combiner import order_tokens


def resized_grid(
    table: Float[Tensor, "patch width"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "new_patch width"]:
    """Learned positions of a grid of (rows, columns) on another, bicubic; the same grid comes back untouched."""
    if old == new:
        return table
    grid = table.T.unflatten(1, old)[None]
    return F.interpolate(grid, new, mode="bicubic", align_corners=False)[0].flatten(1).T


def resized_tokens(
    table: Float[Tensor, "token width"], old: VideoConfig, new: VideoConfig
) -> Float[Tensor, "new_token width"]:
    """A table over all video tokens of a chunk: every kind of tube is interpolated for itself, frame by frame."""
    tables, parts, start = [], zip(old.tubes, new.tubes, strict=True), 0
    for before, after in parts:
        grid = before.grid(old.frames_per_chunk, old.image_size)
        wanted = after.grid(new.frames_per_chunk, new.image_size)
        for _ in range(grid[0]):
            end = start + math.prod(grid[1:])
            tables.append(resized_grid(table[start:end], grid[1:], wanted[1:]))
            start = end
    return torch.cat(tables)


def set_image_size(model: nn.Module, image_size: int) -> None:
    """Makes a model take frames of `image_size` pixels: the tables of learned positions of the 2D patches, and of the
    tokens in the Combiner, are interpolated; all other weights stay. What optimizers know of the tables is void.

    Raises:
        UserError: tubes that do not fit such frames, or a Combiner that does not fit so many tokens.
    """
    config, old = model.config, model.config.video
    new = dataclasses.replace(old, image_size=image_size)
    config.video = new
    try:
        config.check_parts_fit()
    except UserError:
        config.video = old
        raise
    tubes, combiner = model.chunk_encoder.tubes, model.combiner
    tubes.video = new
    with torch.no_grad():
        if tubes.learned_position is not None:
            tube = next(tube for tube in new.tubes if tube.flat)
            grids = [tube.grid(video.frames_per_chunk, video.image_size)[1:] for video in (old, new)]
            _replace(tubes, "learned_position", resized_grid(tubes.learned_position, *grids))
        if hasattr(combiner, "token_position"):
            _replace(combiner, "token_position", _combined(combiner.token_position, config, old, new))
        if config.combiner.kind == "ttm":
            memory = config.combiner.ttm.memory_tokens
            for learner in (combiner.read, combiner.write):
                seen = learner.position[memory : memory + old.tokens]
                rest = learner.position[memory + old.tokens :]
                table = torch.cat([learner.position[:memory], resized_tokens(seen, old, new), rest])
                _replace(learner, "position", table)


def _replace(module: nn.Module, name: str, table: Tensor) -> None:
    """A new parameter under the name of an old one, frozen if that was."""
    trained = getattr(module, name).requires_grad
    setattr(module, name, nn.Parameter(table.contiguous(), requires_grad=trained))


def _combined(
    table: Float[Tensor, "token width"], config: MirasolConfig, old: VideoConfig, new: VideoConfig
) -> Float[Tensor, "new_token width"]:
    """The Combiner's table, whose rows stand in the order of its tokens."""
    before, after = (_places(config, video) for video in (old, new))
    by_modality = torch.empty_like(table)
    by_modality[before.to(table.device)] = table
    video, audio = by_modality.split([old.tokens, config.audio.tokens])
    return torch.cat([resized_tokens(video, old, new), audio])[after.to(table.device)]


def _places(config: MirasolConfig, video: VideoConfig) -> Tensor:
    """Which token, counted through video and then audio, stands at each place of the Combiner's sequence."""
    numbers = torch.arange(video.tokens + config.audio.tokens, dtype=torch.float32)[None, None, :, None]
    seen, heard = numbers.split([video.tokens, config.audio.tokens], dim=2)
    combiner = config.combiner
    order = combiner.token_order if combiner.kind == "transformer" else "audio_last"
    return order_tokens(seen, heard, order, combiner.m).flatten().long()
