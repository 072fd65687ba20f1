"""FLOPs of a model that is not in memory, counted by PyTorch on tensors without contents.

The model really runs, on the `meta` device or on fake tensors: shapes, dtypes and autograd are those of a real run, but
nothing is computed or allocated. So every option of the model, frozen weights and recomputation are counted as they
are. A multiplication and an addition are two FLOPs; masked attention counts, because a dense kernel computes it.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mirasol.config.components import COMPONENTS, find_component
from mirasol.config.model import MirasolConfig
from mirasol.model.hf import MirasolForConditionalGeneration

# What one more chunk of a stream is computed by; the others run when a question is asked, or in training only.
STREAMED = ("vit", "tubes", "audio", "combiner", "latent")


def count_flops(config: MirasolConfig, chunks: int, text_length: int) -> dict[str, int]:
    """Forward FLOPs by component for one clip of `chunks` chunks and one text row of `text_length` tokens.

    Everything that the losses need is included: the predicted next latents, the reconstruction, and logits for every
    token. Attention over all chunks makes the Combiner and the latent model grow with chunks².
    """
    model = build_on_meta(config)
    video, audio = config.video, config.audio
    present = torch.ones(1, chunks, dtype=torch.bool, device="meta")
    tokens = torch.ones(1, text_length, dtype=torch.long, device="meta")

    def run() -> None:
        output = model(
            torch.empty(1, chunks, *video.chunk_shape, device="meta"),
            torch.empty(1, chunks, *audio.chunk_shape, device="meta"),
            chunk_mask=present,
            video_mask=present,
            audio_mask=present,
            decoder_input_ids=tokens,
        )
        model.reconstruction(output.latents)
        model.latent.predict_next(output.latents)

    return _count_by_component(model, run)


def count_stream_flops(config: MirasolConfig, chunks: int, window: int | None = None) -> list[dict[str, int]]:
    """FLOPs by component of each of the first `chunks` chunks of a stream with that window.

    The work on the chunk alone is the same each time; attention to earlier chunks grows with their number, up to the
    window.
    """
    model = build_on_meta(config)
    stream = model.stream(1, window)
    video = torch.empty(1, *config.video.chunk_shape, device="meta")
    audio = torch.empty(1, *config.audio.chunk_shape, device="meta")
    counts = [_count_by_component(model, lambda: stream.append(video, audio)) for _ in range(chunks)]
    return [{component: of_chunk[component] for component in STREAMED} for of_chunk in counts]


def build_on_meta(config: MirasolConfig) -> MirasolForConditionalGeneration:
    """The config's model in evaluation mode, with weights that take no memory.

    Attention is PyTorch's own whatever the config says: flex attention runs on real devices only.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return MirasolForConditionalGeneration(config).eval()


@contextlib.contextmanager
def count_products() -> Iterator[FlopCounterMode]:
    """Counts the FLOPs of all matrix products and convolutions in its block (`get_total_flops`).

    Attention is split into its matrix products: PyTorch counts no FLOPs for the fused kernels of some devices.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _count_by_component(model: nn.Module, run: Callable[[], None]) -> dict[str, int]:
    """FLOPs of `run` by component. Each operation belongs to the innermost of the model's modules it runs in."""
    counts: Counter[str] = Counter()
    # The tied output layer is computed by the model itself, outside of all its modules.
    inside, before = ["vocabulary"], 0

    def settle(*_: object) -> None:
        nonlocal before
        now = counter.get_total_flops()
        counts[inside[-1]] += now - before
        before = now

    def watch(name: str, module: nn.Module) -> None:
        def enter(*inputs: object) -> None:
            settle()
            inside.append(find_component(f"{name}."))

        def leave(*outputs: object) -> None:
            settle()
            inside.pop()

        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave).remove)

    with contextlib.ExitStack() as hooks, torch.no_grad(), count_products() as counter:
        for name, module in model.named_modules():
            if name:
                watch(name, module)
        run()
        settle()
    return {component: counts[component] for component in COMPONENTS}
