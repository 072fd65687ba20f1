"""How media files become tensors: frame size, chunk grid, spectrogram and pixel normalisation, in one frozen value."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mirasol.errors import UserError

Fit = Literal["pad", "crop", "stretch"]
FITS = get_args(Fit)


def check_channel_values(name: str, values: Any) -> float | tuple[float, float, float]:
    """Returns one number for all three colour channels, or a tuple of three. Raises UserError for anything else."""
    several = tuple(values) if isinstance(values, list | tuple) else (values,)
    if len(several) not in (1, 3) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in several):
        raise UserError(f"{name}={values!r} must be a number, or three for red, green and blue")
    if not all(math.isfinite(value) for value in several):
        raise UserError(f"{name}={values!r} must be finite")
    return tuple(float(value) for value in several) if len(several) == 3 else several[0]


def check_image_std(image_std: float | tuple[float, float, float]) -> None:
    """Raises UserError for a standard deviation that pixels cannot be divided by."""
    if min(image_std if isinstance(image_std, tuple) else (image_std,)) <= 0:
        raise UserError(f"image_std={image_std} must be positive")


@dataclass(frozen=True)
class MediaConfig:
    """The settings that `MirasolFeatureExtractor`, the clip cache and a model must agree on.

    image_size: side of the square frames, pixels
    frames_per_chunk: frames of a chunk (F)
    chunk_seconds, num_chunks, max_chunks: the chunk grid, see `mirasol.ChunkGrid`; exactly one of the first two is set
    sample_rate: of the waveform, Hz
    num_mel_bins: mel bands of the spectrogram (M)
    spectrogram_frames: time bands of the spectrogram per chunk (S)
    fit: how a frame becomes square: `pad` (black borders), `crop` (centre) or `stretch`
    image_mean, image_std: normalise pixel values from 0 to 1; a number, or three for red, green and blue; 0.5 and 0.5
        give [-1, 1]

    The defaults are those of the preset `tiny`.

    Raises:
        UserError: an impossible value. The chunk grid is checked by `ChunkGrid`.
    """

    image_size: int = 32
    frames_per_chunk: int = 4
    chunk_seconds: float | None = 0.5
    num_chunks: int | None = None
    max_chunks: int = 64
    sample_rate: int = 16_000
    num_mel_bins: int = 64
    spectrogram_frames: int = 16
    fit: str = "pad"
    image_mean: float | tuple[float, float, float] = 0.125
    image_std: float | tuple[float, float, float] = 0.25

    def __post_init__(self):
        for name in ("image_mean", "image_std"):  # JSON has lists where a config has tuples
            object.__setattr__(self, name, check_channel_values(name, getattr(self, name)))
        check_image_std(self.image_std)
        for name in ("image_size", "sample_rate", "num_mel_bins", "spectrogram_frames"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        if self.fit not in FITS:
            raise UserError(f"fit={self.fit!r}: choose {', '.join(FITS)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as `MirasolFeatureExtractor` takes them."""
        return dataclasses.asdict(self)


MEDIA_SETTINGS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(MediaConfig))
