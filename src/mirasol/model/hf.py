"""What every Mirasol model shares: initialisation, and how it is computed (attention, recomputation, compilation)."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.model.contrastive import ContrastiveSpace
from mirasol.model.execution import LAYERS, compile_layers, recompute
from mirasol.model.transformer import ATTENTION, Attention


def _check_attention(implementation: str | None) -> None:
    if implementation not in (None, *ATTENTION):
        raise UserError(
            f"attn_implementation={implementation!r}: choose one of {', '.join(ATTENTION)} "
            "(masks here are block causal, and flex_attention is what skips their hidden blocks on a GPU)"
        )


class MirasolPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by Mirasol models."""

    config_class = MirasolConfig
    base_model_prefix = ""
    main_input_name = "video"
    input_modalities = ("video", "audio", "text")
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules: ClassVar = [layer.__name__ for layer in LAYERS]
    supports_gradient_checkpointing = True
    # The Trainer would otherwise divide the loss by a number of tokens this model does not take.
    accepts_loss_kwargs = False

    def __init__(self, config: MirasolConfig):
        _check_attention(config._attn_implementation)
        super().__init__(config)

    def post_init(self) -> None:
        super().post_init()
        self.set_attn_implementation(self.config._attn_implementation)

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Has every attention of the model computed by `eager`, `sdpa` or `flex_attention`.

        Raises:
            UserError: another implementation.
        """
        given = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        _check_attention(given)
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for module in self.modules():
            if isinstance(module, Attention):
                module.implementation = self.config._attn_implementation

    def recompute_activations(self, what: str = "block") -> None:
        """What the backward pass computes again instead of having it kept: `block` (whole layers), `hidden` (the
        feed-forwards' hidden layers alone: half the memory for a tenth more work) or `none`. The result is the same,
        dropout included. transformers' own `gradient_checkpointing_enable` is `block`.

        Raises:
            UserError: another value.
        """
        recompute(self, what, partial(checkpoint, use_reentrant=False))

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        recompute(self, "block" if enable else "none", gradient_checkpointing_func, every_n_layers)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every Transformer layer in place with `torch.compile`; parameters keep their names."""
        compile_layers(self, backend)

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
        if isinstance(module, ContrastiveSpace):
            module.reset()
