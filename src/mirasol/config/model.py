"""The configuration of a Mirasol model: one `MirasolConfig` of the typed parts in `mirasol.config.parts`."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

from mirasol.config.checks import find_nearest_name, make_part, merge_mappings, suggest_nearest_name
from mirasol.config.media import MEDIA_SETTINGS, MediaConfig
from mirasol.config.parts import (
    AudioConfig,
    ChunkingConfig,
    CombinerConfig,
    ContrastiveConfig,
    LatentConfig,
    LossWeights,
    ReconstructionConfig,
    StackConfig,
    TextConfig,
    VideoConfig,
    ViTConfig,
)
from mirasol.config.presets import PRESETS, check_preset, make_tiny_parts
from mirasol.errors import UserError

CHECKPOINT_FORMAT = 2
# What a config.json of format 1 means where it does not name a field that came later.
FORMAT_1_VALUES: dict[str, dict[str, Any]] = {"text": {"scale_embedding": False}}

# What transformers writes into a config in addition to the fields of `PreTrainedConfig`: its trainers, its quantizers,
# its export of code, and earlier versions of it.
TRANSFORMERS_KEYS = frozenset((
    "add_cross_attention", "attn_implementation", "auto_map", "custom_pipelines", "decoder_start_token_id",
    "experts_implementation", "finetuning_task", "is_decoder", "model_type", "prefix", "processor_class",
    "quantization_config", "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class",
    "torchscript", "transformers_weights", "use_bfloat16", "use_cache",
))  # fmt: skip

PARTS: dict[str, type] = {
    "chunking": ChunkingConfig,
    "video": VideoConfig,
    "audio": AudioConfig,
    "vit": ViTConfig,
    "combiner": CombinerConfig,
    "latent": LatentConfig,
    "reconstruction": ReconstructionConfig,
    "text": TextConfig,
    "contrastive": ContrastiveConfig,
    "loss_weights": LossWeights,
}


class MirasolConfig(PreTrainedConfig):
    """Configuration of a Mirasol model.

    Each part is a dataclass of `mirasol.config.parts` or a mapping with some of its fields; the others are those of the
    preset `tiny`. Without the part `contrastive` (None) the model has no contrastive pass.

    Other keys are kept as attributes, as in every config of transformers: what its trainers write is loaded again. A
    key that neither Mirasol nor transformers knows is reported by a warning with the nearest name.

    checkpoint_format: of the config.json that the values come from. One of format 1 gets the values of that time for
        the fields that it does not name, so that an old checkpoint computes what it did; the config is then of the
        present format.

    Raises:
        UserError: an unknown key of a part, a key that is a method of the config or a number that follows from the
            parts, or parts that do not fit together, with both numbers and the field's name.
    """

    model_type = "mirasol"
    main_input_name = "video"
    # What transformers' Trainer leaves out of predictions, so that `compute_metrics` gets the logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "text_loss", "latent_loss", "video_loss", "audio_loss", "latents", "combined", "reconstruction",
        "audio_reconstruction", "decoder_attentions", "cross_attentions", "decoder_hidden_states", "past_key_values",
        "cache", "encoder_last_hidden_state",
    ]  # fmt: skip

    def __init__(
        self,
        chunking: dict | ChunkingConfig | None = None,
        video: dict | VideoConfig | None = None,
        audio: dict | AudioConfig | None = None,
        vit: dict | ViTConfig | None = None,
        combiner: dict | CombinerConfig | None = None,
        latent: dict | LatentConfig | None = None,
        reconstruction: dict | ReconstructionConfig | None = None,
        text: dict | TextConfig | None = None,
        contrastive: dict | ContrastiveConfig | None = None,
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
            "reconstruction": reconstruction, "text": text, "contrastive": contrastive, "loss_weights": loss_weights,
        }  # fmt: skip
        defaults = make_tiny_parts()
        if checkpoint_format == 1:
            defaults, checkpoint_format = merge_mappings(defaults, FORMAT_1_VALUES), CHECKPOINT_FORMAT
        for name, kind in PARTS.items():
            part = defaults[name] if given[name] is None else given[name]
            if isinstance(part, Mapping):
                if name == "combiner" and part.get("kind") == "concat":
                    part = {"m": self.count_tokens(), **part}
                part = merge_mappings(defaults[name] or {}, part)
            setattr(self, name, part if part is None else make_part(kind, part, name))
        self.checkpoint_format = checkpoint_format
        self.pad_token_id, self.bos_token_id = pad_token_id, bos_token_id
        self.eos_token_id, self.sep_token_id = eos_token_id, sep_token_id
        kwargs = {key: value for key, value in kwargs.items() if self._is_kept(key, value)}
        kwargs.pop("is_encoder_decoder", None)
        super().__init__(is_encoder_decoder=True, **kwargs)
        if "use_cache" in kwargs:  # which transformers' Trainer sets, and transformers 5 takes for one of `generate`'s
            self.use_cache = kwargs["use_cache"]
        self.decoder_start_token_id = bos_token_id
        self.check_parts_fit()

    def check_parts_fit(self) -> None:
        """Raises UserError with both numbers where parts do not fit together; every new config is checked."""
        self._check_widths()
        self._check_combiner()
        frames, target = self.video.frames_per_chunk, self.reconstruction.frames
        if target is not None and frames % target:
            raise UserError(f"reconstruction.frames={target} must divide video.frames_per_chunk={frames}")
        if target is None and frames % self.reconstruction.patch[0]:
            raise UserError(
                f"reconstruction.patch={self.reconstruction.patch} must divide video.frames_per_chunk={frames}"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < self.text.vocab_size:
                raise UserError(
                    f"{name}={value!r} must be a whole number from 0 to below text.vocab_size={self.text.vocab_size}"
                )

    def set_image_size(self, image_size: int) -> None:
        """Changes `video.image_size`, and `combiner.m` of the kind `concat`, which is the number of tokens.

        Raises UserError, and changes nothing, where tubes or Combiner do not fit such frames.
        """
        video, combiner = self.video, self.combiner
        self.video = dataclasses.replace(video, image_size=image_size)
        if combiner.kind == "concat":
            self.combiner = dataclasses.replace(combiner, m=self.count_tokens())
        try:
            self.check_parts_fit()
        except UserError:
            self.video, self.combiner = video, combiner
            raise

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """Every Transformer stack by its path in the config."""
        return {
            "vit": self.vit, "audio.adapter": self.audio.adapter, "combiner.stack": self.combiner.stack,
            "latent.stack": self.latent.stack, "reconstruction.stack": self.reconstruction.stack,
            "text.stack": self.text.stack,
        }  # fmt: skip

    def _check_widths(self) -> None:
        stacks = self.stacks
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

    def count_tokens(self) -> int:
        """Tokens of a chunk, of both modalities."""
        return self.video.tokens + self.audio.tokens

    def _check_combiner(self) -> None:
        tokens, combiner = self.count_tokens(), self.combiner
        if combiner.m > tokens:
            raise UserError(f"combiner.m={combiner.m} exceeds the {tokens} tokens of a chunk")
        if combiner.kind == "concat" and combiner.m != tokens:
            raise UserError(f"combiner.m={combiner.m} must equal the {tokens} tokens of a chunk for kind=concat")
        if combiner.kind == "late" and (combiner.m % 2 or combiner.m // 2 > min(self.video.tokens, self.audio.tokens)):
            raise UserError(
                f"combiner.m={combiner.m} must be even for kind=late, and half of it at most the "
                f"{min(self.video.tokens, self.audio.tokens)} tokens of a chunk's smaller modality"
            )
        if combiner.kind == "transformer" and combiner.token_order == "both_last" and combiner.m % 2:
            raise UserError(f"combiner.m={combiner.m} must be even for token_order=both_last")

    # transformers sizes key/value caches by these names: they describe the text decoder.
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
            part = getattr(self, name)
            output[name] = part if part is None else dataclasses.asdict(part)
        return output

    @property
    def media(self) -> MediaConfig:
        """How media must be read for the tensors to have the shapes and units that this model takes."""
        parts = (self.chunking, self.audio, self.video)  # the settings by name, whichever part has them
        settings = {name: getattr(part, name) for name in MEDIA_SETTINGS for part in parts if hasattr(part, name)}
        return MediaConfig(**settings)

    def media_settings(self) -> dict[str, Any]:
        """`media` as a mapping: the arguments of `MirasolFeatureExtractor`."""
        return self.media.to_dict()

    def _is_kept(self, key: str, value: Any) -> bool:
        """Whether a key that is no part becomes an attribute. Warns about those that have no effect."""
        if key == "tie_word_embeddings" and value is not None and value != self.text.tied:
            warnings.warn(f"{key}={value!r} has no effect: text.tied={self.text.tied} decides", stacklevel=3)
        if key in TRANSFORMERS_KEYS or key in {field.name for field in dataclasses.fields(PreTrainedConfig)}:
            return True
        own = inspect.getattr_static(type(self), key, None)
        if key in ("num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size", "vocab_size"):
            if value != getattr(self, key):
                raise UserError(f"{key}={value!r}, but the parts give {key}={getattr(self, key)}: leave it out")
            return False
        if own is not None and getattr(own, "fset", None) is None:
            raise UserError(f"key {key!r} is a name that MirasolConfig uses itself: rename it")
        if own is not None or key.startswith("_"):
            return True
        if hasattr(GenerationConfig(), key):
            warnings.warn(f"{key!r} in the config has no effect: set it in generation_config", stacklevel=3)
            return False
        nearest = find_nearest_name(key, [*PARTS])
        hint = f": did you mean {nearest!r}?" if nearest else ""
        warnings.warn(f"unknown key {key!r} in the config, kept but not read{hint}", stacklevel=3)
        return True

    @classmethod
    def preset(cls, name: str, **parts: Any) -> "MirasolConfig":
        """A named configuration. `parts` replaces fields of parts: `preset("tiny", text={"vocab_size": 300})`."""
        check_preset(name)
        values = PRESETS[name]()
        for part, fields in parts.items():
            if part not in values:
                raise UserError(f"unknown part {part!r}{suggest_nearest_name(part, list(values))}")
            if fields is None and part != "contrastive":
                raise UserError(f"{part}=None: only the part contrastive may be missing")
            values[part] = merge_mappings(values[part] or {}, fields) if isinstance(fields, Mapping) else fields
            if (
                part == "combiner"
                and isinstance(fields, Mapping)
                and fields.get("kind") == "concat"
                and "m" not in fields
            ):
                del values[part]["m"]  # not the preset's, but what a chunk has
        return cls(**values)
