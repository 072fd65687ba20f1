"""What a Mirasol model is made of: typed parts, one `MirasolConfig`, and the presets.

Every open point of the paper is a field here; the default is the reading this project chose.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

from mirasol.errors import UserError
from mirasol.presets import PRESETS, tiny_parts

CHECKPOINT_FORMAT = 1


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
        self.tubes = [tube if isinstance(tube, TubeConfig) else TubeConfig(**tube) for tube in self.tubes]
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
        self.patch = tuple(self.patch)
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
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"combiner.ttm.{field.name}={getattr(self, field.name)} must be at least 1")


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
        self.stack = _part(StackConfig, self.stack)
        self.ttm = _part(TokenTuringConfig, self.ttm)
        if self.m < 1:
            raise UserError(f"combiner.m={self.m} must be at least 1")
        if self.token_order not in ("both_last", "audio_last", "video_last"):
            raise UserError(f"token_order={self.token_order!r}: choose both_last, audio_last or video_last")
        if self.kind not in ("transformer", "cls", "perceiver", "ttm", "concat"):
            raise UserError(f"combiner.kind={self.kind!r}: choose transformer, cls, perceiver, ttm or concat")
        if self.scope not in ("past", "chunk"):
            raise UserError(f"combiner.scope={self.scope!r}: choose past or chunk")
        if self.kind == "ttm" and self.scope == "chunk":
            raise UserError("combiner.scope='chunk' contradicts combiner.kind='ttm', whose memory is the past")


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
        self.patch = tuple(self.patch)
        if self.image_size % self.patch[1] or self.image_size % self.patch[2]:
            raise UserError(f"reconstruction patch {self.patch} must divide image_size={self.image_size}")


@dataclass
class TextConfig:
    """The text decoder: its stack, and a cross-attention block after every `cross_attention_every` layers.

    `cross_attention_ffn` gives each of them a feed-forward of its own; `latent_projection` brings the latents to the
    decoder's width once, ahead of all of them.
    """

    stack: StackConfig
    vocab_size: int
    max_length: int = 64
    cross_attention_every: int = 2
    cross_attention_ffn: bool = False
    latent_projection: bool = False

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
    """Builds a typed part from a mapping, refusing unknown keys by name."""
    if isinstance(value, kind):
        return value
    known = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            raise UserError(f"unknown key {key!r} in {kind.__name__}{_nearest(key, known)}")
    return kind(**value)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})"


class MirasolConfig(PreTrainedConfig):
    """Configuration of a Mirasol model. Each part is a dataclass of this module or a mapping with its fields.

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
            setattr(
                self,
                name,
                _part(kind, defaults[name] if given[name] is None else given[name]),
            )
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
        if self.combiner.kind == "concat" and self.combiner.m != tokens:
            raise UserError(f"combiner.m={self.combiner.m} must equal the {tokens} tokens of a chunk for kind=concat")
        halved = self.combiner.kind == "transformer" and self.combiner.token_order == "both_last"
        if halved and self.combiner.m % 2:
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
        if self.audio.shared_projection and self.audio.adapter.width != self.combiner.stack.width:
            raise UserError(
                f"audio.adapter.width={self.audio.adapter.width} must equal combiner.stack.width="
                f"{self.combiner.stack.width} with audio.shared_projection"
            )
        if (self.chunking.chunk_seconds is None) == (self.chunking.num_chunks is None):
            raise UserError("chunking: set exactly one of chunk_seconds and num_chunks")

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
            values[part] = _merged(values[part], fields)
        return cls(**values)


def _merged(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
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
