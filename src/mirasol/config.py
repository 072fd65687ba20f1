"""What a Mirasol model is made of: typed parts, one `MirasolConfig`, and the presets.

Open points of the paper are fields here; the default is the reading this project chose (docs/model.md).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from transformers import PreTrainedConfig

from mirasol.errors import UserError
from mirasol.presets import PRESETS, tiny_parts

CHECKPOINT_FORMAT = 1
Fit = Literal["pad", "crop", "stretch"]
FITS = get_args(Fit)


def _check_fields(part: Any, *positive: str) -> None:
    """Refuses values that are not of their field's type or choices, and numbers below 1 in the `positive` fields."""
    for field in dataclasses.fields(part):
        name, value = field.name, getattr(part, field.name)
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        if get_origin(field.type) is Literal:
            if value not in get_args(field.type):
                raise UserError(f"{name}={value!r}: choose one of {', '.join(get_args(field.type))}")
        elif value is not None or NoneType not in kinds:
            for kind, accepted in ((bool, bool), (int, int), (float, int | float)):
                wrong = not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool))
                if kind in kinds and wrong:
                    raise UserError(f"{name}={value!r} must be of type {kind.__name__}")
        if name in positive and value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")


def _sizes(name: str, sizes: Any, count: int, least: int = 1) -> tuple[int, ...]:
    """`count` whole numbers, none below `least`, as a tuple."""
    sizes = tuple(sizes) if isinstance(sizes, list | tuple) else sizes
    if not isinstance(sizes, tuple) or len(sizes) != count or any(type(size) is not int for size in sizes):
        raise UserError(f"{name}={sizes!r} must be {count} whole numbers")
    if min(sizes) < least:
        raise UserError(f"{name}={sizes} must hold no number below {least}")
    return sizes


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
        _check_fields(self, "depth", "width", "hidden", "heads", "head_width")
        if self.width % 2:
            raise UserError(f"width={self.width} must be even: positions are pairs of sine and cosine")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie in [0, 1)")


@dataclass
class TubeConfig:
    """One kind of video tube: a 3D convolution without padding; sizes are (frames, pixels, pixels)."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        self.kernel, self.stride = _sizes("kernel", self.kernel, 3), _sizes("stride", self.stride, 3)
        self.offset = _sizes("offset", self.offset, 3, least=0)

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
        _check_fields(self, "image_size", "frames_per_chunk")
        self.tubes = [_part(TubeConfig, tube, f"tubes[{index}]") for index, tube in enumerate(self.tubes)]
        if not self.tubes:
            raise UserError("tubes=[] must hold at least one tube")
        for tube in self.tubes:
            if 0 in tube.grid(self.frames_per_chunk, self.image_size):
                raise UserError(
                    f"tubes: tube kernel {tube.kernel} at offset {tube.offset} does not fit a chunk of "
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
    """The spectrogram of one chunk (`spectrogram_frames` x `num_mel_bins`) and audio's own weights.

    `shared_projection`: one linear takes both modalities from the ViT's width to the Combiner's, at which the adapter
    then works; otherwise each modality has its own linear into the Combiner, and audio one more into the adapter.
    """

    num_mel_bins: int
    spectrogram_frames: int
    patch: tuple[int, int]
    adapter: StackConfig
    shared_projection: bool = False

    def __post_init__(self):
        _check_fields(self, "num_mel_bins", "spectrogram_frames")
        self.patch = _sizes("patch", self.patch, 2)
        self.adapter = _part(StackConfig, self.adapter, "adapter")
        if self.spectrogram_frames % self.patch[0] or self.num_mel_bins % self.patch[1]:
            raise UserError(
                f"patch={self.patch} must divide the spectrogram "
                f"{self.spectrogram_frames} frames x {self.num_mel_bins} mel bins"
            )

    @property
    def tokens(self) -> int:
        """Audio tokens per chunk."""
        return (self.spectrogram_frames // self.patch[0]) * (self.num_mel_bins // self.patch[1])


@dataclass
class TokenTuringConfig:
    """The Token Turing Machine's sizes, in tokens and features; the defaults are the paper's, at width 1024.

    `depth`, `hidden`, `heads` and `head_width` are those of the Transformer that processes what was read; the heads'
    inner width is free to differ from the Combiner's. `learner_hidden` belongs to the TokenLearners that pick tokens.
    """

    read_tokens: int = 512
    memory_tokens: int = 256
    learner_hidden: int = 64
    depth: int = 2
    hidden: int = 128
    heads: int = 12
    head_width: int = 64

    def __post_init__(self):
        _check_fields(self, *(field.name for field in dataclasses.fields(self)))


@dataclass
class CombinerConfig:
    """The Combiner: its kind, its stack, and the `m` features it gives for a chunk.

    kind: `transformer` keeps the last m outputs of a chunk, `cls` those of m learned tokens, `perceiver` has m learned
        latents look at the features, `ttm` reads and writes a memory of constant size, `concat` keeps every token as
        it is (m is then the number of tokens, and there are no weights). `ttm` and `concat` use the stack's width only.
    scope: the features that x_t may depend on: all chunks up to t, or chunk t alone. `ttm` always has a past, in its
        memory; `concat` never has.
    token_order: which tokens come last, of meaning to `transformer` alone.
    """

    stack: StackConfig
    m: int
    token_order: Literal["both_last", "audio_last", "video_last"] = "both_last"
    kind: Literal["transformer", "cls", "perceiver", "ttm", "concat"] = "transformer"
    scope: Literal["past", "chunk"] = "past"
    ttm: TokenTuringConfig = dataclasses.field(default_factory=TokenTuringConfig)

    def __post_init__(self):
        _check_fields(self, "m")
        self.stack = _part(StackConfig, self.stack, "stack")
        self.ttm = _part(TokenTuringConfig, self.ttm, "ttm")
        if self.kind == "ttm" and self.scope == "chunk":
            raise UserError("scope='chunk' contradicts combiner.kind='ttm', whose memory is the past")


@dataclass
class LatentConfig:
    """The causal latent model. `mask_ratio` of x is hidden while training; `distance` is the next-latent loss."""

    stack: StackConfig
    mask_ratio: float = 0.15
    distance: Literal["cosine", "mse"] = "cosine"

    def __post_init__(self):
        _check_fields(self)
        self.stack = _part(StackConfig, self.stack, "stack")
        if not 0 <= self.mask_ratio < 1:
            raise UserError(f"mask_ratio={self.mask_ratio} must lie in [0, 1)")


@dataclass
class ReconstructionConfig:
    """Reconstruction of the next chunk's video at `image_size` pixels in patches of (frames, pixels, pixels)."""

    stack: StackConfig
    image_size: int
    patch: tuple[int, int, int]

    def __post_init__(self):
        _check_fields(self, "image_size")
        self.stack = _part(StackConfig, self.stack, "stack")
        self.patch = _sizes("patch", self.patch, 3)
        if self.image_size % self.patch[1] or self.image_size % self.patch[2]:
            raise UserError(f"patch={self.patch} must divide reconstruction.image_size={self.image_size}")


@dataclass
class TextConfig:
    """The text decoder: its stack, and a cross-attention block after every `cross_attention_every` layers.

    `cross_attention_ffn` gives each of them a feed-forward of its own.
    """

    stack: StackConfig
    vocab_size: int
    max_length: int = 64
    cross_attention_every: int = 2
    cross_attention_ffn: bool = False

    def __post_init__(self):
        _check_fields(self, "vocab_size", "max_length", "cross_attention_every")
        self.stack = _part(StackConfig, self.stack, "stack")
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
    fit: Fit = "pad"
    image_mean: float = 0.5
    image_std: float = 0.5

    def __post_init__(self):
        _check_fields(self, "num_chunks", "max_chunks", "sample_rate")
        if (self.chunk_seconds is None) == (self.num_chunks is None):
            both = f"chunk_seconds={self.chunk_seconds} and num_chunks={self.num_chunks}"
            raise UserError(f"{both}: set exactly one of chunk_seconds and num_chunks")
        for name in ("chunk_seconds", "image_std"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value} must be positive")


@dataclass
class LossWeights:
    """Weights of the three losses (paper, Table 1b; pretraining 1/1/1, fine-tuning text 10)."""

    text: float = 1.0
    latent: float = 1.0
    video: float = 1.0

    def __post_init__(self):
        _check_fields(self)
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < float("inf"):
                raise UserError(f"{name}={value} must be at least 0 and finite")


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


def _part(kind: type, value: Any, path: str) -> Any:
    """Builds a typed part from a mapping; unknown keys and impossible values are refused with the field's path."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{path}={value!r} must be a mapping with the fields of {kind.__name__}")
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    for key in value:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r} in {kind.__name__}{_nearest(key, known)}")
    for field in fields:
        if field.name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{field.name} is missing: {kind.__name__} needs it")
    try:
        return kind(**value)
    except UserError as error:
        raise UserError(f"{path}.{error}") from None


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
            part = _merged(defaults[name], part) if isinstance(part, Mapping) else part
            setattr(self, name, _part(kind, part, name))
        self.checkpoint_format = checkpoint_format
        self.pad_token_id, self.bos_token_id = pad_token_id, bos_token_id
        self.eos_token_id, self.sep_token_id = eos_token_id, sep_token_id
        _refuse_unknown(kwargs)
        kwargs.pop("is_encoder_decoder", None)
        super().__init__(is_encoder_decoder=True, **kwargs)
        self.decoder_start_token_id = bos_token_id
        self._check_parts_fit()

    def _check_parts_fit(self) -> None:
        self._check_widths()
        self._check_combiner()
        frames = self.video.frames_per_chunk
        if frames % self.reconstruction.patch[0]:
            raise UserError(
                f"reconstruction.patch={self.reconstruction.patch} must divide video.frames_per_chunk={frames}"
            )
        highest = max(self.pad_token_id, self.bos_token_id, self.eos_token_id, self.sep_token_id)
        if self.text.vocab_size <= highest:
            raise UserError(f"text.vocab_size={self.text.vocab_size} must exceed the special token id {highest}")

    def _check_widths(self) -> None:
        stacks = {
            "vit": self.vit, "audio.adapter": self.audio.adapter, "combiner.stack": self.combiner.stack,
            "latent.stack": self.latent.stack, "reconstruction.stack": self.reconstruction.stack,
            "text.stack": self.text.stack,
        }  # fmt: skip
        width = self.combiner.stack.width
        matching = ["latent.stack", "reconstruction.stack", *["audio.adapter"] * self.audio.shared_projection]
        for path in matching:
            if stacks[path].width != width:
                why = " with audio.shared_projection" if path == "audio.adapter" else ""
                raise UserError(f"{path}.width={stacks[path].width} must equal combiner.stack.width={width}{why}")
        for path, stack in stacks.items():
            if stack.width % stack.heads:
                raise UserError(f"{path}.heads={stack.heads} must divide {path}.width={stack.width}")
        if self.vit.width < 6:
            raise UserError(f"vit.width={self.vit.width} must be at least 6: positions are sin and cos of t, y, x")

    def _check_combiner(self) -> None:
        tokens, combiner = self.video.tokens + self.audio.tokens, self.combiner
        if combiner.m > tokens:
            raise UserError(f"combiner.m={combiner.m} exceeds the {tokens} tokens of a chunk")
        if combiner.kind == "concat" and combiner.m != tokens:
            raise UserError(f"combiner.m={combiner.m} must equal the {tokens} tokens of a chunk for kind=concat")
        if combiner.kind == "transformer" and combiner.token_order == "both_last" and combiner.m % 2:
            raise UserError(f"combiner.m={combiner.m} must be even for token_order=both_last")

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
