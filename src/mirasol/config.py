"""What a Mirasol model is made of: typed parts, one `MirasolConfig`, and the presets.

Open points of the paper are fields here; the default is the reading this project chose (docs/model.md).
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

from mirasol.errors import UserError

CHECKPOINT_FORMAT = 1
FITS = ("pad", "crop", "stretch")


@dataclass
class StackConfig:
    """One pre-LN Transformer stack. `gated` picks a GEGLU feed-forward, `bias` puts biases on every linear."""

    depth: int
    width: int
    hidden: int
    heads: int
    head_width: int
    gated: bool = False
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("depth", "width", "hidden", "heads", "head_width"):
            if getattr(self, name) < 1:
                raise UserError(f"stack field {name}={getattr(self, name)} must be at least 1")
        if self.width % 2:
            raise UserError(f"stack field width={self.width} must be even: positions are pairs of sine and cosine")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie in [0, 1)")


@dataclass
class TubeConfig:
    """One kind of video tube: a 3D convolution without padding; sizes are (frames, pixels, pixels)."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        self.kernel, self.stride, self.offset = (
            tuple(self.kernel),
            tuple(self.stride),
            tuple(self.offset),
        )
        for name, least in (("kernel", 1), ("stride", 1), ("offset", 0)):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < least:
                raise UserError(f"tube {name}={list(getattr(self, name))}: give three numbers of {least} or more")

    def grid(self, frames: int, image_size: int) -> tuple[int, int, int]:
        """How many tubes fit along (time, height, width)."""
        extent = (frames, image_size, image_size)
        return tuple(
            (e - o - k) // s + 1 if e - o >= k else 0
            for e, o, k, s in zip(extent, self.offset, self.kernel, self.stride, strict=True)
        )


@dataclass
class VideoConfig:
    """The video of one chunk: `frames_per_chunk` square frames of `image_size` pixels, read by `tubes`."""

    image_size: int
    frames_per_chunk: int
    tubes: list[TubeConfig]

    def __post_init__(self):
        self.tubes = [_part(TubeConfig, tube) for tube in self.tubes]
        for tube in self.tubes:
            if 0 in tube.grid(self.frames_per_chunk, self.image_size):
                raise UserError(
                    f"tube kernel {tube.kernel} at offset {tube.offset} does not fit a chunk of "
                    f"{self.frames_per_chunk} frames x {self.image_size} pixels: make the tube smaller"
                )

    @property
    def tokens(self) -> int:
        """Video tokens per chunk."""
        total = 0
        for tube in self.tubes:
            t, h, w = tube.grid(self.frames_per_chunk, self.image_size)
            total += t * h * w
        return total


@dataclass
class AudioConfig:
    """The spectrogram of one chunk (`spectrogram_frames` x `num_mel_bins`) and audio's own weights."""

    num_mel_bins: int
    spectrogram_frames: int
    patch: tuple[int, int]
    adapter: StackConfig

    def __post_init__(self):
        self.patch = _patch(self.patch, 2)
        self.adapter = _part(StackConfig, self.adapter)
        if self.spectrogram_frames % self.patch[0] or self.num_mel_bins % self.patch[1]:
            raise UserError(
                f"audio patch {self.patch} must divide the spectrogram "
                f"{self.spectrogram_frames} frames x {self.num_mel_bins} mel bins"
            )

    @property
    def tokens(self) -> int:
        """Audio tokens per chunk."""
        return (self.spectrogram_frames // self.patch[0]) * (self.num_mel_bins // self.patch[1])


@dataclass
class CombinerConfig:
    """The Combiner: its stack, the `m` features it keeps of a chunk, and which tokens come last (facts: last m)."""

    stack: StackConfig
    m: int
    token_order: Literal["both_last", "audio_last", "video_last"] = "both_last"

    def __post_init__(self):
        self.stack = _part(StackConfig, self.stack)
        if self.m < 1:
            raise UserError(f"combiner.m={self.m} must be at least 1")
        if self.token_order not in ("both_last", "audio_last", "video_last"):
            raise UserError(f"token_order={self.token_order!r}: choose both_last, audio_last or video_last")


@dataclass
class LatentConfig:
    """The causal latent model. `mask_ratio` of x is hidden while training; `distance` is the next-latent loss."""

    stack: StackConfig
    mask_ratio: float = 0.15
    distance: Literal["cosine", "mse"] = "cosine"

    def __post_init__(self):
        self.stack = _part(StackConfig, self.stack)
        if self.distance not in ("cosine", "mse"):
            raise UserError(f"latent distance={self.distance!r}: choose cosine or mse")
        if not 0 <= self.mask_ratio < 1:
            raise UserError(f"mask_ratio={self.mask_ratio} must lie in [0, 1)")


@dataclass
class ReconstructionConfig:
    """Reconstruction of the next chunk's video at `image_size` pixels in patches of (frames, pixels, pixels)."""

    stack: StackConfig
    image_size: int
    patch: tuple[int, int, int]

    def __post_init__(self):
        self.stack = _part(StackConfig, self.stack)
        self.patch = _patch(self.patch, 3)
        if self.image_size % self.patch[1] or self.image_size % self.patch[2]:
            raise UserError(f"reconstruction patch {self.patch} must divide image_size={self.image_size}")


@dataclass
class TextConfig:
    """The text decoder: its stack, and a cross-attention block after every `cross_attention_every` layers."""

    stack: StackConfig
    vocab_size: int
    max_length: int = 64
    cross_attention_every: int = 2
    cross_attention_ffn: bool = False

    def __post_init__(self):
        self.stack = _part(StackConfig, self.stack)
        if not 1 <= self.cross_attention_every <= self.stack.depth:
            raise UserError(
                f"cross_attention_every={self.cross_attention_every} must lie between 1 and the decoder's "
                f"depth {self.stack.depth}"
            )


@dataclass
class ChunkingConfig:
    """How media becomes tensors: chunks of `chunk_seconds`, or `num_chunks` uniform chunks (exactly one is set); and
    the mean and standard deviation that pixel values (0 to 1) are normalised with."""

    chunk_seconds: float | None = None
    num_chunks: int | None = 16
    max_chunks: int = 64
    sample_rate: int = 16_000
    fit: Literal["pad", "crop", "stretch"] = "pad"
    image_mean: float = 0.5
    image_std: float = 0.5

    def __post_init__(self):
        if (self.chunk_seconds is None) == (self.num_chunks is None):
            raise UserError("chunking: set exactly one of chunk_seconds and num_chunks")
        for name in ("chunk_seconds", "num_chunks", "max_chunks", "sample_rate", "image_std"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"chunking.{name}={getattr(self, name)} must be positive")
        if self.fit not in FITS:
            raise UserError(f"chunking.fit={self.fit!r}: choose {', '.join(FITS)}")


@dataclass
class LossWeights:
    """Weights of the three losses (paper, Table 1b; pretraining 1/1/1, fine-tuning text 10)."""

    text: float = 1.0
    latent: float = 1.0
    video: float = 1.0


PARTS: dict[str, type] = {
    "chunking": ChunkingConfig,
    "video": VideoConfig,
    "audio": AudioConfig,
    "vit": StackConfig,
    "combiner": CombinerConfig,
    "latent": LatentConfig,
    "reconstruction": ReconstructionConfig,
    "text": TextConfig,
    "loss_weights": LossWeights,
}


def _part(kind: type, value: Any) -> Any:
    """Builds a typed part from a mapping, refusing unknown and missing keys and wrong types by name."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{kind.__name__} takes a mapping of its fields, got {value!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key, given in value.items():
        if key not in fields:
            raise UserError(f"unknown key {key!r} in {kind.__name__}{_nearest(key, list(fields))}")
        if not _fits(given, hints[key]):
            raise UserError(f"{kind.__name__}.{key}={given!r} must be {fields[key].type}")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{kind.__name__} lacks {name!r}")
    return kind(**value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand in a field of this type; parts and literals check themselves."""
    options = typing.get_args(hint) if isinstance(hint, typing.types.UnionType) else (hint,)
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is Literal:
        return True
    if typing.get_origin(hint) in (tuple, list):
        return isinstance(value, list | tuple)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return True
    return isinstance(value, options) and (bool in options or not isinstance(value, bool))


def _patch(sizes: Any, axes: int) -> tuple[int, ...]:
    if len(sizes) != axes or min(sizes) < 1:
        raise UserError(f"patch={list(sizes)}: give {axes} numbers of 1 or more")
    return tuple(sizes)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})"


class MirasolConfig(PreTrainedConfig):
    """Configuration of a Mirasol model. Each part is a dataclass of this module or a mapping with its fields, laid
    over those of the `tiny` preset.

    Raises:
        UserError: an unknown key, or parts that do not fit together, with both numbers and the field's name.
    """

    model_type = "mirasol"
    main_input_name = "video"

    def __init__(
        self,
        chunking: dict | ChunkingConfig | None = None,
        video: dict | VideoConfig | None = None,
        audio: dict | AudioConfig | None = None,
        vit: dict | StackConfig | None = None,
        combiner: dict | CombinerConfig | None = None,
        latent: dict | LatentConfig | None = None,
        reconstruction: dict | ReconstructionConfig | None = None,
        text: dict | TextConfig | None = None,
        loss_weights: dict | LossWeights | None = None,
        checkpoint_format: int = CHECKPOINT_FORMAT,
        pad_token_id: int = 0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        sep_token_id: int = 3,
        **kwargs: Any,
    ):
        given = {
            "chunking": chunking, "video": video, "audio": audio, "vit": vit, "combiner": combiner, "latent": latent,
            "reconstruction": reconstruction, "text": text, "loss_weights": loss_weights,
        }  # fmt: skip
        defaults = tiny_parts()
        for name, kind in PARTS.items():
            part = defaults[name] if given[name] is None else given[name]
            setattr(self, name, _part(kind, _merged(defaults[name], part) if isinstance(part, Mapping) else part))
        self.checkpoint_format = checkpoint_format
        self.pad_token_id, self.bos_token_id = pad_token_id, bos_token_id
        self.eos_token_id, self.sep_token_id = eos_token_id, sep_token_id
        _refuse_unknown(kwargs)
        kwargs.pop("is_encoder_decoder", None)
        super().__init__(is_encoder_decoder=True, **kwargs)
        self.decoder_start_token_id = bos_token_id
        self._check_parts_fit()

    def _check_parts_fit(self) -> None:
        tokens = self.video.tokens + self.audio.tokens
        if self.combiner.m > tokens:
            raise UserError(f"combiner.m={self.combiner.m} exceeds the {tokens} tokens of a chunk")
        if self.combiner.token_order == "both_last" and self.combiner.m % 2:
            raise UserError(f"combiner.m={self.combiner.m} must be even for token_order=both_last")
        frames = self.video.frames_per_chunk
        if frames % self.reconstruction.patch[0]:
            raise UserError(f"reconstruction.patch {self.reconstruction.patch} must divide {frames} frames per chunk")
        for name in ("latent", "reconstruction"):
            width = getattr(self, name).stack.width
            if width != self.combiner.stack.width:
                raise UserError(
                    f"{name}.stack.width={width} must equal combiner.stack.width={self.combiner.stack.width}"
                )

    # transformers sizes key/value caches from these names: they describe the text decoder.
    @property
    def num_hidden_layers(self) -> int:
        return self.text.stack.depth

    @property
    def num_attention_heads(self) -> int:
        return self.text.stack.heads

    @property
    def head_dim(self) -> int:
        return self.text.stack.head_width

    @property
    def hidden_size(self) -> int:
        return self.text.stack.width

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.text.vocab_size = size

    def to_dict(self) -> dict[str, Any]:
        """Plain data, parts as mappings."""
        output = super().to_dict()
        for name in PARTS:
            output[name] = dataclasses.asdict(getattr(self, name))
        return output

    def media_settings(self) -> dict[str, Any]:
        """The arguments of `MirasolFeatureExtractor` that give tensors of the shapes this model takes."""
        return {
            "image_size": self.video.image_size,
            "frames_per_chunk": self.video.frames_per_chunk,
            "chunk_seconds": self.chunking.chunk_seconds,
            "num_chunks": self.chunking.num_chunks,
            "max_chunks": self.chunking.max_chunks,
            "sample_rate": self.chunking.sample_rate,
            "num_mel_bins": self.audio.num_mel_bins,
            "spectrogram_frames": self.audio.spectrogram_frames,
            "fit": self.chunking.fit,
            "image_mean": self.chunking.image_mean,
            "image_std": self.chunking.image_std,
        }

    @classmethod
    def preset(cls, name: str, **parts: Any) -> "MirasolConfig":
        """A named configuration. `parts` replaces fields of parts: `preset("tiny", text={"vocab_size": 300})`."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}{_nearest(name, list(PRESETS))}")
        values = PRESETS[name]()
        for part, fields in parts.items():
            if part not in values:
                raise UserError(f"unknown part {part!r}{_nearest(part, list(values))}")
            values[part] = _merged(values[part], fields) if isinstance(fields, Mapping) else fields
        return cls(**values)


def _merged(base: Mapping, changes: Mapping) -> dict:
    """`base` with `changes` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if nested else value
    return merged


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    base = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    base |= {
        "model_type",
        "name_or_path",
        "attn_implementation",
        "decoder_start_token_id",
        "torch_dtype",
    }
    for key in kwargs:
        if key not in base and not key.startswith("_") and not hasattr(PreTrainedConfig, key):
            raise UserError(f"unknown key {key!r} in MirasolConfig{_nearest(key, [*PARTS])}")


def tiny_parts() -> dict[str, Any]:
    """About 1.5M weights: trains on two CPU cores in minutes. Plain mappings, so that overrides merge."""

    def stack(depth: int) -> dict[str, Any]:
        return {
            "depth": depth,
            "width": 96,
            "hidden": 384,
            "heads": 3,
            "head_width": 32,
        }

    return {
        "chunking": {"chunk_seconds": 0.5, "num_chunks": None, "image_mean": 0.125, "image_std": 0.25},
        "video": {
            "image_size": 32,
            "frames_per_chunk": 4,
            # Overlapping tubes see whole shapes in motion; the four 2D patches come last, so that "the last m" hold
            # the whole frame.
            "tubes": [
                {"kernel": (4, 16, 16), "stride": (4, 8, 8)},
                {"kernel": (1, 16, 16), "stride": (4, 16, 16)},
            ],
        },
        "audio": {
            "num_mel_bins": 64,
            "spectrogram_frames": 16,
            "patch": (8, 16),
            "adapter": stack(1),
        },
        "vit": stack(3),
        "combiner": {"stack": stack(2), "m": 8},
        "latent": {"stack": stack(2)},
        "reconstruction": {"stack": stack(1), "image_size": 32, "patch": (4, 8, 8)},
        "text": {"stack": stack(3), "vocab_size": 512, "cross_attention_every": 1},
        "loss_weights": {},
    }


PRESETS = {"tiny": tiny_parts}
