"""Closed forms of parameters and FLOPs against what the model holds and what PyTorch counts."""

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.model.sizes import COMPONENTS, component_of

# Few layers of the real widths: the closed forms are linear in depth, which the tiny model's depths of 1 to 3 cover.
SHALLOW = {part: {"stack": {"depth": 2}} for part in ("combiner", "latent", "reconstruction")} | {
    "vit": {"depth": 2},
    "audio": {"adapter": {"depth": 2}},
    "text": {"stack": {"depth": 5}, "vocab_size": 1000},
}


def counted(model: MirasolForConditionalGeneration, chunks: int, length: int) -> Counter:
    """FLOPs of a forward pass and of the losses' predictions as PyTorch counts them, by component."""
    video, audio = model.config.video, model.config.audio
    pixels = (video.frames_per_chunk, 3, video.image_size, video.image_size)
    there = torch.ones(1, chunks, dtype=torch.bool, device="meta")
    counter, own, open_calls = FlopCounterMode(display=False), Counter(), []
    hooks = [hook for name, module in model.named_modules() for hook in watch(name, module, counter, own, open_calls)]
    # The CPU's fused attention counts as nothing: attention is taken apart into the products it consists of.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        output = model(
            torch.empty(1, chunks, *pixels, device="meta"),
            torch.empty(1, chunks, audio.spectrogram_frames, audio.num_mel_bins, device="meta"),
            there, there, there, decoder_input_ids=torch.ones(1, length, dtype=torch.long, device="meta"),
        )  # fmt: skip
        model.reconstruction(output.latents)
        model.latent.predict_next(output.latents)
    for hook in hooks:
        hook.remove()
    # The tied output layer is computed by the model itself, which is no component's module.
    components = Counter({"vocabulary": own.pop("")})
    for name, count in own.items():
        components[component_of(f"{name}.")] += count
    return components


def watch(name: str, module: torch.nn.Module, counter: FlopCounterMode, own: Counter, open_calls: list) -> tuple:
    """Hooks that add up each module's own share of the FLOPs, that of modules called from within it taken off."""

    def begin(*_):
        open_calls.append([counter.get_total_flops(), 0])

    def end(*_):
        start, inner = open_calls.pop()
        total = counter.get_total_flops() - start
        own[name] += total - inner
        if open_calls:
            open_calls[-1][1] += total

    return module.register_forward_pre_hook(begin), module.register_forward_hook(end)


def agree(model: MirasolForConditionalGeneration, chunks: int, length: int) -> None:
    found, expected = counted(model, chunks, length), model.flops(chunks, length)
    assert tuple(expected) == COMPONENTS
    for component in COMPONENTS:
        assert found[component] == pytest.approx(expected[component], rel=0.02), component
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.001)


def on_meta(preset: str, **parts) -> MirasolForConditionalGeneration:
    with torch.device("meta"):
        return MirasolForConditionalGeneration(MirasolConfig.preset(preset, **parts)).eval()


@pytest.mark.parametrize(("preset", "parts"), [("tiny", {}), ("1b", SHALLOW), ("3b", SHALLOW)])
def test_flops_are_what_pytorch_counts(preset, parts):
    model = on_meta(preset, **parts)
    for chunks, length in ((1, 5), (3, 64)):
        agree(model, chunks, length)


@pytest.mark.parametrize(
    "parts",
    [
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
    ],
)
def test_flops_follow_every_switch(parts):
    agree(on_meta("tiny", **parts), 3, 7)


def test_every_parameter_belongs_to_one_component(model):
    counts = model.num_params()
    assert tuple(counts) == COMPONENTS
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["vocabulary"] == model.text.embedding.weight.numel()


def test_only_attention_over_all_chunks_is_quadratic():
    model = on_meta("tiny")
    one, two, four = (model.flops(chunks, 8) for chunks in (4, 8, 16))
    for component in ("vit", "tubes", "audio", "reconstruction"):
        assert four[component] == 2 * two[component] == 4 * one[component]
    for component in ("combiner", "latent"):
        bends = [four[component] - 2 * two[component], two[component] - 2 * one[component]]
        assert bends[0] == 4 * bends[1] > 0
