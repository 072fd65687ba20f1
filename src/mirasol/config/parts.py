"""The typed parts of a model's configuration: each dataclass checks its own values.

Open points of the paper are fields here; the default is the reading this project chose (docs/model.md).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from mirasol.config.checks import check_fields, check_sizes, make_part
from mirasol.config.media import Fit, check_channel_values, check_image_std
from mirasol.errors import UserError

# Label of the tokens that the text loss ignores, as in transformers and `torch.nn.functional.cross_entropy`.
IGNORED_LABEL = -100

# Most tokens of a text where no table of positions limits it: attention over more takes gigabytes.
LONGEST_TEXT = 8192
# Deeper than any Transformer that was trained; each layer is a Python object before its sizes are known.
MOST_LAYERS = 1_000


@dataclass
class StackConfig:
    """One pre-LN Transformer stack.

    depth, width, hidden, heads, head_width: layers, features, the feed-forward's hidden features, heads, features of a
        head
    gated: a gated feed-forward (GEGLU with the default `activation`)
    bias: biases on every linear
    norm_eps: keeps the norms from dividing by zero
    attention_dropout: of the attention weights; None is the same as `dropout`
    layer_drop: rate at which training skips the last block's branches, see `LayerDrop`
    """

    depth: int
    width: int
    hidden: int
    heads: int
    head_width: int
    gated: bool = False
    bias: bool = True
    dropout: float = 0.0
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-5
    attention_dropout: float | None = None
    layer_drop: float = 0.0

    def __post_init__(self):
        check_fields(self, "depth", "width", "hidden", "heads", "head_width")
        if self.depth > MOST_LAYERS:
            raise UserError(f"depth={self.depth} must be at most {MOST_LAYERS}")
        if self.width % 2:
            raise UserError(f"width={self.width} must be even: positions are pairs of sine and cosine")
        for name in ("dropout", "attention_dropout", "layer_drop"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name}={value} must be in [0, 1)")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"norm_eps={self.norm_eps} must be in (0, 1)")

    @property
    def attention_rate(self) -> float:
        """Dropout of the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout


@dataclass
class ViTConfig(StackConfig):
    """The shared ViT: a stack, and what pretrained image models have in addition.

    class_token: a learned token before the others, dropped from the features.
    input_norm: a norm between the embeddings and the first layer (CLIP). final_norm: the one after the last.
    """

    class_token: bool = False
    input_norm: bool = False
    final_norm: bool = True


@dataclass
class TubeConfig:
    """One kind of video tube: a 3D convolution without padding; sizes are (frames, pixels, pixels)."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        self.kernel, self.stride = check_sizes("kernel", self.kernel, 3), check_sizes("stride", self.stride, 3)
        self.offset = check_sizes("offset", self.offset, 3, least=0)

    @property
    def flat(self) -> bool:
        """Whether this tube is a 2D patch: its kernel is one frame long, so that it applies to an image too."""
        return self.kernel[0] == 1

    def grid(self, frames: int, image_size: int) -> tuple[int, int, int]:
        """How many tubes fit along (time, height, width)."""
        extent = (frames, image_size, image_size)
        return tuple(
            (e - o - k) // s + 1 if e - o >= k else 0
            for e, o, k, s in zip(extent, self.offset, self.kernel, self.stride, strict=True)
        )


@dataclass
class VideoConfig:
    """The video of one chunk: `frames_per_chunk` square frames of `image_size` pixels, and the `tubes` they go through.

    learned_positions: the 2D patches have learned positions, to which the fixed code is added through a learned gate
        that starts at 0 (MaMMUT); the other tubes have the fixed code alone.
    """

    image_size: int
    frames_per_chunk: int
    tubes: list[TubeConfig]
    learned_positions: bool = False

    def __post_init__(self):
        check_fields(self, "image_size", "frames_per_chunk")
        if not isinstance(self.tubes, list | tuple):
            raise UserError(f"tubes={self.tubes!r} must be a list of tubes")
        self.tubes = [make_part(TubeConfig, tube, f"tubes[{index}]") for index, tube in enumerate(self.tubes)]
        if not self.tubes:
            raise UserError("tubes=[]: give at least one tube")
        for tube in self.tubes:
            if 0 in tube.grid(self.frames_per_chunk, self.image_size):
                raise UserError(
                    f"tubes: tube kernel {tube.kernel} at offset {tube.offset} does not fit a chunk of "
                    f"{self.frames_per_chunk} frames x {self.image_size} pixels: make the tube smaller"
                )
        flat = sum(tube.flat for tube in self.tubes)
        if self.learned_positions and flat != 1:
            raise UserError(f"learned_positions needs one tube whose kernel is 1 frame long, tubes has {flat}")

    @property
    def chunk_shape(self) -> tuple[int, int, int, int]:
        """Shape of one chunk's video: frames, colours, height, width."""
        return self.frames_per_chunk, 3, self.image_size, self.image_size

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
    `backbone`: with `shared` the patches go through the video's ViT and then the adapter; with `separate` they go
    through the adapter alone, which is then audio's own backbone.
    """

    num_mel_bins: int
    spectrogram_frames: int
    patch: tuple[int, int]
    adapter: StackConfig
    shared_projection: bool = False
    backbone: Literal["shared", "separate"] = "shared"

    def __post_init__(self):
        check_fields(self, "num_mel_bins", "spectrogram_frames")
        self.patch = check_sizes("patch", self.patch, 2)
        self.adapter = make_part(StackConfig, self.adapter, "adapter")
        if self.spectrogram_frames % self.patch[0] or self.num_mel_bins % self.patch[1]:
            raise UserError(
                f"patch={self.patch} must divide the spectrogram "
                f"{self.spectrogram_frames} frames x {self.num_mel_bins} mel bins"
            )

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Shape of one chunk's spectrogram: frames, mel bins."""
        return self.spectrogram_frames, self.num_mel_bins

    @property
    def tokens(self) -> int:
        """Audio tokens per chunk."""
        return (self.spectrogram_frames // self.patch[0]) * (self.num_mel_bins // self.patch[1])


@dataclass
class TokenTuringConfig:
    """The Token Turing Machine's sizes, in tokens and features; the defaults are the paper's, at width 1024.

    depth, hidden, heads, head_width: of the Transformer between reading and writing; the inner width of its heads may
        differ from the Combiner's
    learner_hidden: of the TokenLearners that read and write
    """

    read_tokens: int = 512
    memory_tokens: int = 256
    learner_hidden: int = 64
    depth: int = 2
    hidden: int = 128
    heads: int = 12
    head_width: int = 64

    def __post_init__(self):
        check_fields(self, *(field.name for field in dataclasses.fields(self)))


@dataclass
class CombinerConfig:
    """The Combiner: its kind, its stack, and the number `m` of features per chunk.

    kind: `transformer` keeps the last m outputs of a chunk, `cls` those of m learned tokens; in `perceiver` m learned
        latents attend to the features; `ttm` reads and writes a memory of constant size; `late` takes each modality by
        itself and keeps the last m/2 outputs of either; `concat` keeps every token
        (m is then the number of tokens, and need not be given; there are no weights). `ttm` uses the stack's width and
        dropout only, `concat` its width.
    scope: the features that x_t may depend on: `past` is all chunks up to t, `chunk` is chunk t alone. `ttm` always has
        a past, in its memory, `concat` never.
    window: number of chunks that each layer attends to, chunk t included; None is all up to t.
    token_order: which tokens come last in a chunk; for `transformer` only.
    """

    stack: StackConfig
    m: int
    token_order: Literal["both_last", "audio_last", "video_last"] = "both_last"
    kind: Literal["transformer", "cls", "perceiver", "ttm", "late", "concat"] = "transformer"
    scope: Literal["past", "chunk"] = "past"
    ttm: TokenTuringConfig = dataclasses.field(default_factory=TokenTuringConfig)
    window: int | None = None

    def __post_init__(self):
        check_fields(self, "m", "window")
        self.stack = make_part(StackConfig, self.stack, "stack")
        self.ttm = make_part(TokenTuringConfig, self.ttm, "ttm")
        if self.kind == "ttm" and self.scope == "chunk":
            raise UserError("scope='chunk' contradicts combiner.kind='ttm', whose memory is the past")
        if self.window is not None and (self.kind in ("ttm", "concat") or self.scope == "chunk"):
            raise UserError(
                f"window={self.window} needs a Combiner that looks at earlier chunks, not kind={self.kind!r} with "
                f"scope={self.scope!r}: leave it out"
            )


@dataclass
class LatentConfig:
    """The causal latent model.

    kind: `transformer` is the paper's; `none` has no layers: h_t is x_t with its position codes, normed, nothing
        predicts the next chunk's features, and there is no latent loss. With `concat` all features of every chunk then
        go straight to the text decoder. `none` uses the stack's width only.
    mask_ratio: share of x that training replaces by a learned vector
    window: number of chunks that each layer attends to, its own included; None is all up to its own
    distance: of the next-latent loss, between prediction and the next chunk's features
    target: the next chunk's features themselves (`plain`), a loss that constant features satisfy, or minus their mean
        over the clips of the batch (`centred`)
    """

    stack: StackConfig
    mask_ratio: float = 0.15
    distance: Literal["cosine", "mse"] = "cosine"
    window: int | None = None
    target: Literal["centred", "plain"] = "centred"
    kind: Literal["transformer", "none"] = "transformer"

    def __post_init__(self):
        check_fields(self, "window")
        self.stack = make_part(StackConfig, self.stack, "stack")
        if not 0 <= self.mask_ratio < 1:
            raise UserError(f"mask_ratio={self.mask_ratio} must be in [0, 1)")
        if self.kind == "none" and self.window is not None:
            raise UserError(f"window={self.window} needs a latent model that looks back, not kind='none': leave it out")


@dataclass
class ReconstructionConfig:
    """Reconstruction of a chunk's video, in patches of (frames, pixels, pixels), from the latents h.

    image_size, frames: size in pixels and frames to which the video is averaged for the target; None keeps all frames.
    distance: mean squared error, or cosine distance patch by patch.
    step: h_t gives the next chunk, t + 1, or the same chunk, t.
    audio: also reconstruct the chunk's log-mel spectrogram, in the patches of the encoder.
    """

    stack: StackConfig
    image_size: int
    patch: tuple[int, int, int]
    frames: int | None = None
    distance: Literal["mse", "cosine"] = "mse"
    step: Literal["next", "same"] = "next"
    audio: bool = False

    def __post_init__(self):
        check_fields(self, "image_size", "frames")
        self.stack = make_part(StackConfig, self.stack, "stack")
        self.patch = check_sizes("patch", self.patch, 3)
        if self.image_size % self.patch[1] or self.image_size % self.patch[2]:
            raise UserError(f"patch={self.patch} must divide reconstruction.image_size={self.image_size}")
        if self.frames is not None and self.frames % self.patch[0]:
            raise UserError(f"patch={self.patch} must divide reconstruction.frames={self.frames}")

    def grid(self, frames_per_chunk: int) -> tuple[int, int, int]:
        """Patches along (time, height, width) of a chunk of `frames_per_chunk` frames."""
        frames = frames_per_chunk if self.frames is None else self.frames
        return frames // self.patch[0], self.image_size // self.patch[1], self.image_size // self.patch[2]


@dataclass
class TextConfig:
    """The text decoder: its stack, and a cross-attention block after every `cross_attention_every` layers.

    cross_attention_ffn: each block has its own feed-forward.
    cross_attention_first: the layer, counted from 1, that the first block follows; None is `cross_attention_every`.
    cross_attention_latent_norm: each block norms the latents before it makes keys and values of them.
    scale_embedding: word embeddings are multiplied by the square root of their width where texts are read, not in the
        output, so that a word weighs about as much as the code of its position.
    max_length: tokens of a text row in training, special tokens included, unless the recipe says otherwise
    learned_positions: `max_length` learned positions in place of the fixed code, which goes on beyond it.
    tied: input and output embeddings are the same weights.
    label_smoothing: share of each target token's weight that the text loss spreads over the vocabulary in training.
    window: number of last chunks whose latents are attended to; None is all chunks of the clip.
    """

    stack: StackConfig
    vocab_size: int
    max_length: int = 64
    cross_attention_every: int = 2
    cross_attention_ffn: bool = False
    cross_attention_first: int | None = None
    cross_attention_latent_norm: bool = False
    scale_embedding: bool = True
    learned_positions: bool = False
    tied: bool = True
    label_smoothing: float = 0.0
    window: int | None = None

    def __post_init__(self):
        check_fields(self, "vocab_size", "max_length", "cross_attention_every", "cross_attention_first", "window")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        self.stack = make_part(StackConfig, self.stack, "stack")
        if not 1 <= self.cross_attention_every <= self.stack.depth:
            raise UserError(
                f"cross_attention_every={self.cross_attention_every} must be between 1 and the decoder's "
                f"depth {self.stack.depth}"
            )
        if not 1 <= (self.cross_attention_first or 1) <= self.cross_attention_every:
            raise UserError(
                f"cross_attention_first={self.cross_attention_first} must be between 1 and "
                f"cross_attention_every={self.cross_attention_every}"
            )

    @property
    def longest_text(self) -> int:
        """Most tokens of a text that the model takes: its learned positions, or many with the fixed code."""
        return self.max_length if self.learned_positions else max(self.max_length, LONGEST_TEXT)

    @property
    def cross_attention_layers(self) -> range:
        """Indices, from 0, of the layers with a cross-attention block."""
        first = self.cross_attention_first or self.cross_attention_every
        return range(first - 1, self.stack.depth, self.cross_attention_every)


@dataclass
class ContrastiveConfig:
    """MaMMUT's contrastive pass: images and texts as vectors of `width`, compared in a sigmoid focal loss.

    gamma: focus of the loss on pairs that are not separated yet; 0 is plain sigmoid cross-entropy (SigLIP).
    temperature: initial divisor of the cosines; it is learned.
    bias: initial addend of the scaled cosines, learned too (SigLIP: -10); None is no bias (MaMMUT, whose focal weight
        counters the many pairs that do not belong together instead).
    """

    width: int
    gamma: float = 2.0
    temperature: float = 0.07
    bias: float | None = None

    def __post_init__(self):
        check_fields(self, "width")
        if not 0 <= self.gamma < float("inf"):
            raise UserError(f"gamma={self.gamma} must be at least 0 and finite")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be above 0 and finite")
        if self.bias is not None and not math.isfinite(self.bias):
            raise UserError(f"bias={self.bias} must be finite")


@dataclass
class ChunkingConfig:
    """How media becomes tensors, see `mirasol.config.media.MediaConfig`: chunks of `chunk_seconds`, or `num_chunks`
    equal chunks (exactly one is set), and the normalisation of pixels, one number for all channels or one each."""

    chunk_seconds: float | None = None
    num_chunks: int | None = 16
    max_chunks: int = 64
    sample_rate: int = 16_000
    fit: Fit = "pad"
    image_mean: float | tuple[float, float, float] = 0.5
    image_std: float | tuple[float, float, float] = 0.5

    def __post_init__(self):
        self.image_mean = check_channel_values("image_mean", self.image_mean)
        self.image_std = check_channel_values("image_std", self.image_std)
        check_fields(self, "num_chunks", "max_chunks", "sample_rate")
        if (self.chunk_seconds is None) == (self.num_chunks is None):
            both = f"chunk_seconds={self.chunk_seconds} and num_chunks={self.num_chunks}"
            raise UserError(f"{both}: set exactly one of chunk_seconds and num_chunks")
        if self.chunk_seconds is not None and not 0 < self.chunk_seconds < float("inf"):
            raise UserError(f"chunk_seconds={self.chunk_seconds} must be positive and finite")
        check_image_std(self.image_std)


@dataclass
class LossWeights:
    """Weights of the losses (supplement, Table 1b: text, latent and video are 1/1/1; fine-tuning sets text to 10).

    `audio` applies with `reconstruction.audio`, `contrastive` in `image_text`, next to `text` (MaMMUT: 1/1).
    """

    text: float = 1.0
    latent: float = 1.0
    video: float = 1.0
    audio: float = 1.0
    contrastive: float = 1.0

    def __post_init__(self):
        check_fields(self)
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < float("inf"):
                raise UserError(f"{name}={value} must be at least 0 and finite")
