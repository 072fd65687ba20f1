"""What a step costs, counted without computing it, against steps that are computed."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.components import find_component
from mirasol.cost.counting import count_flops
from mirasol.cost.step import LiveBytes, StepShape, count_saved_bytes, count_step_cost
from mirasol.model.kernels import keep_activations

STACK = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32, "dropout": 0.1}
PARTS = {part: {"stack": STACK} for part in ("combiner", "latent", "reconstruction", "text")} | {
    # Layers whose inputs need a gradient though their own weights are frozen, and layers that need none.
    "vit": {**STACK, "depth": 2},
    "audio": {"adapter": STACK},
    "contrastive": {"width": 16},
}
CLIPS = StepShape(clips=2, chunks=3, questions=2, text_length=9, target_tokens=4)
IMAGES = StepShape(3, 1, 1, 7, 5, "image_text")


def a_model(trained=None, device="meta") -> MirasolForConditionalGeneration:
    """A small model; `trained` names the components whose weights are not frozen."""
    with torch.device(device):
        model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **PARTS)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or find_component(name) in trained)
    return model


def real_batch(model, shape: StepShape, device="cpu") -> dict:
    video, audio, rows = model.config.video, model.config.audio, shape.clips * shape.questions
    ids = torch.randint(4, 100, (rows, shape.text_length))
    labels = ids.clone()
    labels[:, : shape.text_length - shape.target_tokens] = -100
    text = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids), "labels": labels}
    side, there = video.image_size, torch.ones(shape.clips, shape.chunks, dtype=torch.bool)
    media = {"images": torch.randn(shape.clips, 3, side, side)}
    if shape.objective == "clips":
        media = {
            "video": torch.randn(shape.clips, shape.chunks, video.frames_per_chunk, 3, side, side),
            "audio": torch.randn(shape.clips, shape.chunks, audio.spectrogram_frames, audio.num_mel_bins),
            "chunk_mask": there, "video_mask": there.clone(), "audio_mask": there.clone(),
        }  # fmt: skip
    return {name: value.to(device) for name, value in {**media, **text}.items()}


def loss_of(model, shape, batch, precision="fp32", device="cpu"):
    compute = model.image_text if shape.objective == "image_text" else model
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        return compute(**batch).loss


@pytest.mark.parametrize(
    ("shape", "trained"),
    [
        (CLIPS, None),
        (CLIPS, {"tubes", "audio", "combiner", "latent", "reconstruction", "cross_attention"}),
        (CLIPS, {"audio"}),
        (IMAGES, {"vit", "tubes", "text", "vocabulary"}),
    ],
    ids=["all", "text frozen", "audio alone", "images"],
)
def test_flops_are_those_of_a_real_step(shape, trained):
    cost = count_step_cost(a_model(trained), shape)
    model, counter = a_model(trained, "cpu"), FlopCounterMode(display=False)
    batch = real_batch(model, shape)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = loss_of(model, shape, batch)
        forward = counter.get_total_flops()
        loss.backward()
    assert (cost.forward_flops, cost.backward_flops) == (forward, counter.get_total_flops() - forward)
    assert cost.recomputed_flops == 0


def test_what_is_computed_again_is_counted_by_itself():
    plain, cost = (count_step_cost(a_model(), CLIPS, recomputed=what) for what in ("none", "block"))
    model, counter = a_model(device="cpu"), FlopCounterMode(display=False)
    model.recompute_activations("block")
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss_of(model, CLIPS, real_batch(model, CLIPS)).backward()
    assert cost.forward_flops + cost.backward_flops + cost.recomputed_flops == counter.get_total_flops()
    assert (cost.forward_flops, cost.backward_flops) == (plain.forward_flops, plain.backward_flops)
    assert 0 < cost.recomputed_flops < cost.forward_flops
    assert cost.saved_bytes < plain.saved_bytes / 2


@pytest.mark.parametrize(
    ("shape", "trained", "precision", "plain"),
    [
        (CLIPS, None, "fp32", False),
        (CLIPS, {"audio"}, "bf16", False),
        (IMAGES, {"vit", "text"}, "bf16", False),
        (CLIPS, None, "bf16 weights", False),
        (CLIPS, None, "bf16 weights", True),
    ],
)
def test_bytes_are_those_of_a_real_step(shape, trained, precision, plain):
    """`plain`: with the kernels that a compiled layer is made of."""
    cost = count_step_cost(a_model(trained), shape, precision, compiled=plain)
    model = a_model(trained, "cpu")
    batch = real_batch(model, shape)
    if precision == "bf16 weights":
        model.bfloat16()
        batch = {name: each.bfloat16() if each.is_floating_point() else each for name, each in batch.items()}
    if plain:
        keep_activations(model)
    weights = [*model.parameters(), *model.buffers()]
    live = LiveBytes(weights, list(batch.values()))
    with live:
        loss, saved = count_saved_bytes(lambda: loss_of(model, shape, batch, precision), [*weights, *batch.values()])
        loss.backward()
    assert cost.saved_bytes == pytest.approx(saved, rel=0.02)
    assert cost.peak_bytes == pytest.approx(live.peak, rel=0.02)
    assert cost.peak_bytes > cost.saved_bytes


@pytest.mark.parametrize("recomputed", ["none", "block"])
def test_bytes_are_the_same_without_flops(recomputed):
    model = a_model({"latent", "text"})
    both, alone = (count_step_cost(model, CLIPS, recomputed=recomputed, memory_alone=each) for each in (False, True))
    assert (alone.saved_bytes, alone.peak_bytes) == (both.saved_bytes, both.peak_bytes)
    assert alone.forward_flops == 0 < both.forward_flops


def test_gradients_that_leave_at_once_hold_no_memory():
    # One clip and one chunk: the gradients outweigh everything else.
    shape = StepShape(1, 1, 1, 4, 2)
    kept, gone = (count_step_cost(a_model(), shape, keep_gradients=keep).peak_bytes for keep in (True, False))
    gradients = 4 * sum(parameter.numel() for parameter in a_model().parameters())
    assert kept > gradients / 2
    assert gone < kept


def test_a_counted_model_stays_as_it_was():
    model = a_model({"vit"})
    count_step_cost(model, CLIPS, "bf16 weights", "block")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its measured peak is what is compared")
@pytest.mark.parametrize(("precision", "recomputed"), [("fp32", "none"), ("bf16", "none"), ("bf16", "block")])
def test_the_peak_on_a_gpu_is_within_15_percent(precision, recomputed):
    config = MirasolConfig.preset("tiny", **{part: {"stack": {"width": 512, "hidden": 2048, "heads": 8,
        "head_width": 64, "depth": 4}} for part in ("combiner", "latent", "reconstruction")})  # fmt: skip
    shape = StepShape(32, 16, 4, 32, 8)
    with torch.device("meta"):
        planned = MirasolForConditionalGeneration(config)
    cost = count_step_cost(planned, shape, precision, recomputed, device="cuda")
    model = MirasolForConditionalGeneration(config).cuda().train()
    model.recompute_activations(recomputed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        loss_of(model, shape, real_batch(model, shape, "cuda"), precision, "cuda").backward()
        optimizer.step()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert 3 * weights + cost.peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_the_cost_with_flex_attention_is_that_with_pytorchs_own():
    plain, other = a_model({"vit"}), a_model({"vit"})
    other.set_attn_implementation("flex_attention")
    assert count_step_cost(other, IMAGES) == count_step_cost(plain, IMAGES)
    assert count_flops(other.config, 3, 9) == count_flops(plain.config, 3, 9)
    assert other.config._attn_implementation == "flex_attention"
