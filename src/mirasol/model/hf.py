"""What transformers asks of a model: loading, initialisation, arguments, caches, attention, gradient checkpointing."""

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.model.combiner import ClsCombiner, PerceiverCombiner
from mirasol.model.contrastive import ContrastiveSpace
from mirasol.model.kernels import ATTENTION, compile_layers, recompute_activations
from mirasol.model.mirasol import MirasolNetwork
from mirasol.model.outputs import MirasolEncoderOutput, check_rows, find_missing
from mirasol.model.transformer import Attention

# The arguments of `encode`, by the names that `MirasolProcessor` gives them.
MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")


def check_attention(implementation: str | None) -> None:
    """Raises UserError for an `attn_implementation` that cannot compute this model's masks."""
    if implementation not in (None, *ATTENTION):
        raise UserError(
            f'Specified `attn_implementation="{implementation}"` is not supported: '
            f"choose one of {', '.join(ATTENTION)} "
            "(masks here are block causal, and flex_attention is what skips their hidden blocks on a GPU)"
        )


def take_prompts(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` with the prompts, where a batch has them, in place of its complete rows and labels.

    Raises:
        UserError: no prompts, or only rows that contain their targets.
    """
    arguments = dict(arguments)
    labels, ids = arguments.pop("labels", None), arguments.pop("prompt_input_ids", None)
    mask = arguments.pop("prompt_attention_mask", None)
    if ids is not None:
        return arguments | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    if labels is not None:  # Seq2SeqTrainer takes the rows away where they have the shape of the labels
        raise UserError(
            "generate was given labels, but no prompts without them: give prompt_input_ids and prompt_attention_mask "
            "(processor(clips, prompts, targets, return_prompts=True)), or leave the labels out"
        )
    if arguments.get("decoder_input_ids") is None:
        raise UserError("generate needs decoder_input_ids: prompts as MirasolProcessor gives them")
    return arguments


class MirasolPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model; the mathematics is in `MirasolNetwork`."""

    config_class = MirasolConfig
    base_model_prefix = ""
    main_input_name = "video"
    input_modalities = ("video", "audio", "text")
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules: ClassVar = ["Block", "PerceiverBlock", "TextBlock"]
    supports_gradient_checkpointing = True
    # The Trainer would otherwise divide the loss by a number of tokens this model does not take.
    accepts_loss_kwargs = False

    def __init__(self, config: MirasolConfig):
        check_attention(config._attn_implementation)
        super().__init__(config)

    def post_init(self) -> None:
        super().post_init()
        self.set_attn_implementation(self.config._attn_implementation)

    @property
    def device(self) -> torch.device:
        """Where the model computes. Weights that accelerate offloads are on the meta device between their calls."""
        found = next(parameter.device for parameter in self.parameters())
        hook = getattr(self, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            device = getattr(each, "execution_device", None)
            if found.type == "meta" and device is not None:
                return torch.device(device)
        return found

    # Initialisation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fan-in scaled normal weights, zero biases."""
        init = nn.init
        if isinstance(module, nn.Linear | nn.Conv3d):
            fan_in = module.weight[0].numel()
            init.trunc_normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        for parameter in module.parameters(recurse=False):
            if type(module).__module__.startswith("mirasol."):
                init.normal_(parameter, std=0.02)
        if getattr(module, "position_gate", None) is not None:
            init.zeros_(module.position_gate)
        if isinstance(module, ContrastiveSpace | ClsCombiner | PerceiverCombiner):
            module.reset()

    # Embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text.embedding

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.text.embedding = embedding

    def get_output_embeddings(self) -> nn.Linear | None:
        """The output embedding where it is not the input embedding (`text.tied: false`)."""
        return self.text.output

    def set_output_embeddings(self, embedding: nn.Linear) -> None:
        self.text.output = embedding

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.chunk_encoder

    # Loading

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike | None, *args: Any, use_safetensors: bool | None = True, **kwargs: Any
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """As in transformers, from a folder or from `org/name` on the hub, but of safetensors only unless
        `use_safetensors` says otherwise: other weight files can run code when they are opened.

        Raises:
            OSError: no such weights.
        """
        try:
            return super().from_pretrained(name, *args, use_safetensors=use_safetensors, **kwargs)
        except OSError as error:
            if use_safetensors is not True:
                raise
            raise OSError(f"{name}: no weights as safetensors, the only ones that are read: {error}") from error

    # How layers are computed

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Computes every attention of the model with `eager`, `sdpa` or `flex_attention`.

        Raises:
            UserError: another implementation.
        """
        given = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        check_attention(given)
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for module in self.modules():
            if isinstance(module, Attention):
                module.implementation = self.config._attn_implementation

    def recompute_activations(self, what: str = "block") -> None:
        """Chooses what the backward pass computes again instead of keeping it: `block` (whole layers), `hidden` (the
        feed-forwards' hidden layers: half the memory for a tenth more work) or `none`. Results do not change, dropout
        included. transformers' own `gradient_checkpointing_enable` is `block`.

        Raises:
            UserError: another value.
        """
        recompute_activations(self, what, partial(checkpoint, use_reentrant=False))

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        recompute_activations(self, "block" if enable else "none", gradient_checkpointing_func, every_n_layers)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every Transformer layer in place with `torch.compile`; parameters keep their names."""
        compile_layers(self, backend)


class MirasolGenerationMixin(GenerationMixin):
    """`generate` for media in place of encoder inputs."""

    @staticmethod
    def create_masks_for_generate(config: MirasolConfig, **arguments: Any) -> Tensor | None:
        """The text's mask for a static cache, dense whatever the implementation: it differs from row to row, so that
        flex attention would have nothing to skip."""
        dense = copy.copy(config)
        dense._attn_implementation = "sdpa"
        return create_masks_for_generate(config=dense, **arguments)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Tensor | ModelOutput:
        """Answers as token ids, prompt included. Takes what `MirasolProcessor` gives, or `encoder_outputs` of `encode`
        in place of the media. Several prompts per clip share its latents.

        With `prompt_input_ids` and `prompt_attention_mask` a batch may have `labels` and complete rows of text too:
        they are ignored, so that a trainer can generate from the batches that it computes losses of.

        Raises:
            UserError: media or prompts are missing, text rows that are not a multiple of the clips, rows that contain
                their targets, or a method of decoding that reads several tokens at a time.
        """
        kwargs = take_prompts(kwargs)
        media = {name: kwargs.pop(name, None) for name in MEDIA}
        media["video"] = inputs if inputs is not None else media["video"]
        for helper in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(helper) is not None:
                raise UserError(f"{helper} is not supported: leave it out, decoding takes one token at a time")
        encoded = kwargs.pop("encoder_outputs", None)
        if encoded is None:
            if missing := find_missing(media):
                raise UserError(f"{missing} missing: give all that MirasolProcessor gives, or encoder_outputs")
            encoded = self.encode(**media)
        rows, clips = len(kwargs["decoder_input_ids"]), len(encoded.last_hidden_state)
        check_rows(rows, clips, "prompts")
        if rows != clips:
            encoded = MirasolEncoderOutput(**{k: v.repeat_interleave(rows // clips, 0) for k, v in encoded.items()})
        return super().generate(encoder_outputs=encoded, **kwargs)


class MirasolForConditionalGeneration(MirasolNetwork, MirasolPreTrainedModel, MirasolGenerationMixin):
    """Mirasol as a model of transformers: `MirasolNetwork` with `from_pretrained`, `generate` and so on.

    `from_parts` builds a model from pretrained weights of other models (`mirasol.pretrained.assemble`); `mirasol.auto`
    adds it to this class.
    """

    def __init__(self, config: MirasolConfig):
        MirasolPreTrainedModel.__init__(self, config)
        self.make_parts(config)
        self.post_init()
