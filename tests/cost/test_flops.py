"""FLOPs by component: against a second count of every product, known totals, and how they grow."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mirasol import MirasolConfig
from mirasol.config.components import COMPONENTS
from mirasol.cost.counting import STREAMED, build_on_meta, count_flops, count_stream_flops

TTM = {"read_tokens": 12, "memory_tokens": 6, "learner_hidden": 16, "hidden": 32, "heads": 2, "head_width": 16}
COMBINERS = {
    "transformer": {},
    "transformer of a chunk": {"scope": "chunk"},
    "cls": {"kind": "cls", "m": 7},
    "perceiver": {"kind": "perceiver", "m": 7},
    "perceiver of a chunk": {"kind": "perceiver", "scope": "chunk"},
    "ttm": {"kind": "ttm", "m": 7, "ttm": TTM},
    "concat": {"kind": "concat", "m": 21},
}
GROWING = ("transformer", "cls", "perceiver")


class Products(TorchFunctionMode):
    """Adds up two FLOPs for each multiplication, from the shapes that the model's functions are called with."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.linear:
            self.flops += 2 * result.numel() * args[0].shape[-1]
        elif function is F.conv3d:
            self.flops += 2 * result.numel() * math.prod(args[1].shape[1:])
        elif function is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            pairs = math.prod(query.shape[:-1]) * key.shape[-2]
            self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        elif function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm):
            self.flops += 2 * result.numel() * args[0].shape[-1]
        elif function in (torch.einsum, F.multi_head_attention_forward, torch.addmm, torch.baddbmm):
            raise NotImplementedError(f"{function} is not counted here")
        return result


def count_products_of(config: MirasolConfig, chunks: int, length: int) -> int:
    """FLOPs of a forward pass on real numbers, and of what the losses predict."""
    model = build_on_meta(config).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    present = torch.ones(1, chunks, dtype=torch.bool)
    with torch.no_grad(), Products() as products:
        output = model(
            torch.zeros(1, chunks, *config.video.chunk_shape),
            torch.zeros(1, chunks, *config.audio.chunk_shape),
            chunk_mask=present, video_mask=present, audio_mask=present,
            decoder_input_ids=torch.ones(1, length, dtype=torch.long),
        )  # fmt: skip
        model.reconstruction(output.latents)
        model.latent.predict_next(output.latents)
    return products.flops


PARTS = [
    {},
    *({"combiner": parts} for parts in COMBINERS.values() if parts),
    {"audio": {"shared_projection": True}},
    {"audio": {"adapter": {"width": 66}}},
    {"reconstruction": {"audio": True}},
    {"reconstruction": {"image_size": 16, "frames": 2, "patch": (2, 8, 8)}},
    {"text": {"cross_attention_ffn": True, "cross_attention_every": 2}},
    {"vit": {"class_token": True, "input_norm": True}, "video": {"learned_positions": True}},
    {"audio": {"backbone": "separate", "adapter": {"width": 66}}},
    {"audio": {"backbone": "separate", "shared_projection": True}},
    {"text": {"cross_attention_every": 2, "cross_attention_first": 1, "tied": False}},
    {"text": {"stack": {"width": 66}}, "vit": {"width": 48, "gated": True}},
]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_every_product_of_every_option_is_counted(parts):
    config = MirasolConfig.preset("tiny", **parts)
    counts = count_flops(config, 3, 7)
    assert tuple(counts) == COMPONENTS
    assert sum(counts.values()) == count_products_of(config, 3, 7)


def test_components_are_their_layers():
    config = MirasolConfig.preset("tiny")
    counts = count_flops(config, 3, 7)
    assert counts["vocabulary"] == 2 * 7 * config.text.stack.width * config.text.vocab_size

    def block(part, queries: int, keys: int) -> int:
        inner = part.heads * part.head_width
        projections = 4 * queries * part.width * inner + 4 * keys * part.width * inner
        return projections + 4 * queries * keys * inner + 4 * queries * part.width * part.hidden

    latents = 3 * config.combiner.m
    latent = config.latent.stack
    assert counts["latent"] == latent.depth * block(latent, latents, latents) + 2 * latents * latent.width**2
    text = config.text.stack
    assert counts["text"] == text.depth * block(text, 7, 7)
    kernels = [(tube.grid(config.video.frames_per_chunk, 32), tube.kernel) for tube in config.video.tubes]
    assert counts["tubes"] == sum(
        2 * 3 * math.prod(grid) * 3 * math.prod(kernel) * config.vit.width for grid, kernel in kernels
    )


def test_only_attention_over_all_chunks_is_quadratic():
    config = MirasolConfig.preset("tiny")
    one, two, four = (count_flops(config, chunks, 8) for chunks in (4, 8, 16))
    for component in ("vit", "tubes", "audio", "reconstruction"):
        assert four[component] == 2 * two[component] == 4 * one[component]
    for component in ("combiner", "latent"):
        bends = [four[component] - 2 * two[component], two[component] - 2 * one[component]]
        assert bends[0] == 4 * bends[1] > 0


@pytest.mark.parametrize("name", COMBINERS)
def test_only_combiners_that_see_past_chunks_are_quadratic(name):
    config = MirasolConfig.preset("tiny", combiner=COMBINERS[name])
    four, eight = (count_flops(config, chunks, 4)["combiner"] for chunks in (4, 8))
    assert (eight > 2.05 * four) == (name in GROWING)
    assert (four == 0) == (name == "concat")


@pytest.mark.parametrize("name", COMBINERS)
def test_a_chunk_of_a_stream_costs_more_with_its_past_up_to_the_window(name):
    config = MirasolConfig.preset("tiny", combiner=COMBINERS[name])
    chunks = count_stream_flops(config, 3)
    assert tuple(chunks[0]) == STREAMED
    bounded = count_stream_flops(config, 3, window=2) if name in GROWING else None
    for part, grows in (("vit", False), ("tubes", False), ("audio", False), ("combiner", name in GROWING),
                        ("latent", True)):  # fmt: skip
        work = [chunk[part] for chunk in chunks]
        [step] = {later - before for before, later in itertools.pairwise(work)}
        assert (step > 0) == grows
        assert bounded is None or [chunk[part] for chunk in bounded] == [*work[:2], work[1]]


def test_a_streamed_clip_is_quadratic_as_the_lower_triangle():
    """c n T for the linears and a n² T(T+1)/2 for attention, where a is 4 FLOPs for each inner feature of each layer;
    the last has m queries. With everything computed again for each chunk it would be cubic."""
    config = MirasolConfig.preset("tiny")
    stack, n, m, chunks = config.combiner.stack, 21, config.combiner.m, 4
    pair = 4 * stack.heads * stack.head_width * n * ((stack.depth - 1) * n + m)
    streamed = [chunk["combiner"] for chunk in count_stream_flops(config, chunks)]
    linears = chunks * (streamed[0] - pair)
    assert sum(streamed) == linears + pair * chunks * (chunks + 1) // 2
    # One pass over all chunks: the same linears, and the full square in a dense kernel.
    assert count_flops(config, chunks, 1)["combiner"] == linears + pair * chunks**2
