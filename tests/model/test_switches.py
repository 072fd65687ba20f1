"""Every switch of the config trains, generates and counts; with none of them set the model is what it always was."""

import hashlib
import json
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration

STACKED = ("combiner", "latent", "reconstruction", "text")
MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")
SWITCHES = {
    "shared projection": {"audio": {"shared_projection": True}},
    "latent projection": {"text": {"stack": {"width": 48}}},
    "cross-attention feed-forward": {"text": {"cross_attention_ffn": True, "cross_attention_every": 2}},
    "gated ViT": {"vit": {"gated": True, "bias": False}},
    "other widths": {"vit": {"width": 48}, "audio": {"adapter": {"width": 66}}},
    "another's ViT": {
        "vit": {"class_token": True, "input_norm": True, "final_norm": False, "activation": "quick_gelu"}
    },
    "tanh": {"vit": {"activation": "gelu_tanh", "norm_eps": 1e-6}, "text": {"stack": {"activation": "gelu_tanh"}}},
    "learned positions": {"video": {"learned_positions": True}, "text": {"learned_positions": True}},
    "separate audio": {"audio": {"backbone": "separate", "adapter": {"width": 66}}},
    "separate audio, shared projection": {"audio": {"backbone": "separate", "shared_projection": True}},
    "parted vocabulary": {"text": {"tied": False}},
    "first cross-attention": {
        "text": {"cross_attention_every": 2, "cross_attention_first": 1, "cross_attention_latent_norm": True}
    },
    "gated text": {"text": {"stack": {"gated": True, "bias": False}}},
    "gated middle": {
        part: {"stack": {"gated": True, "bias": False}} for part in ("combiner", "latent", "reconstruction")
    },
    "gated adapter": {"audio": {"adapter": {"gated": True}}},
    "mse": {"latent": {"distance": "mse", "mask_ratio": 0.0}},
    "plain latent target": {"latent": {"target": "plain"}},
    "cosine reconstruction": {"reconstruction": {"distance": "cosine"}},
    "small target": {"reconstruction": {"image_size": 16, "frames": 2, "patch": (2, 8, 8)}},
    "same chunk": {"reconstruction": {"step": "same"}},
    "audio reconstruction": {"reconstruction": {"audio": True}},
    "all of the reconstruction": {"reconstruction": {"audio": True, "distance": "cosine", "step": "same"}},
    "audio last": {"combiner": {"token_order": "audio_last"}},
    "video last": {"combiner": {"token_order": "video_last"}},
    "one chunk in sight": {"combiner": {"scope": "chunk"}},
    "cls": {"combiner": {"kind": "cls"}},
    "perceiver": {"combiner": {"kind": "perceiver"}},
    "ttm": {"combiner": {"kind": "ttm", "ttm": {"read_tokens": 12, "memory_tokens": 10, "heads": 3, "head_width": 8}}},
    "concat": {"combiner": {"kind": "concat", "m": 21}},
}


def build(parts: dict) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    text = {"vocab_size": 40} | parts.get("text", {})
    return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **(parts | {"text": text})))


@pytest.mark.parametrize("parts", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_trains_a_step(parts, batch):
    model = build(parts).train()
    before = model.state_dict()["chunk_encoder.tubes.projections.0.weight"].clone()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        unused = name == "latent.hidden_latent" and model.config.latent.mask_ratio == 0
        assert unused or (parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0), name
    optimizer.step()
    assert not torch.equal(before, model.chunk_encoder.tubes.projections[0].weight)


@pytest.mark.parametrize("parts", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_generates_the_same_with_and_without_a_cache(parts, batch):
    model = build(parts).eval()
    inputs = {name: batch[name] for name in MEDIA} | {"decoder_input_ids": batch["decoder_input_ids"][:, :4]}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, uncached = (model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_tiny_keeps_the_parameters_that_checkpoints_hold():
    """Names and shapes, in order, as of the first trained checkpoint."""
    names = "\n".join(f"{name} {tuple(value.shape)}" for name, value in build({}).state_dict().items())
    expected = "a930bc197e2422e49e5075fd4c76b34b8cddcf784b4edcd437261e2b26e116c5"
    assert hashlib.sha256(names.encode()).hexdigest() == expected


def test_a_config_saved_before_there_were_switches_still_means_the_same(tmp_path):
    build({}).config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    later = {
        "combiner": ("kind", "scope", "ttm"),
        "audio": ("shared_projection", "backbone"),
        "video": ("learned_positions",),
        "vit": ("activation", "norm_eps", "class_token", "input_norm", "final_norm"),
        "text": (
            "cross_attention_ffn",
            "cross_attention_first",
            "cross_attention_latent_norm",
            "tied",
            "label_smoothing",
        ),
        "latent": ("target",),
    }
    later |= {"reconstruction": ("frames", "distance", "step", "audio"), "loss_weights": ("audio", "contrastive")}
    for part, names in later.items():
        for name in names:
            del saved[part][name]
    for stack in (saved["vit"], saved["audio"]["adapter"], *(saved[part]["stack"] for part in STACKED)):
        del stack["layer_drop"]
    del saved["contrastive"]
    file.write_text(json.dumps(saved))
    assert MirasolConfig.from_pretrained(tmp_path).to_dict() == build({}).config.to_dict() | {
        "transformers_version": ANY
    }


def with_numbered_weights(model: MirasolForConditionalGeneration) -> MirasolForConditionalGeneration:
    """The same weights under every version of PyTorch, whose own initialisation draws differently in each."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        drawn = torch.from_numpy(np.random.RandomState(index).standard_normal(parameter.shape))
        scaled = drawn * 0.5 * (parameter.numel() / parameter.shape[0]) ** -0.5
        parameter.data.copy_(scaled * 0.2 + 1 if name.endswith("norm.weight") else scaled)
    return model


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("plain", [5.5458946, 3.6370392, 1.0187050, 0.8901508]),
        ("centred", [5.5109291, 3.6370392, 0.9837396, 0.8901508]),
    ],
)
def test_tiny_keeps_its_losses(batch, target, expected):
    """The arithmetic, masking included, is that of the first trained checkpoint, which had the plain target and plain
    embeddings: nothing but the rounding of another machine may move it."""
    old = {"latent": {"target": target}, "text": {"scale_embedding": False}}
    model = with_numbered_weights(build(old)).train()
    torch.manual_seed(7)
    output = model(**batch)
    losses = [output[name].item() for name in ("loss", "text_loss", "latent_loss", "video_loss")]
    assert losses == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("frames", [8, 32])
def test_one_chunk_of_all_frames_learns_from_text_alone(batch, frames):
    """The baselines of the paper's Table 1a: there is no next chunk, the rest is unchanged."""
    sound = {"spectrogram_frames": 64}
    settings = {"video": {"frames_per_chunk": frames}, "audio": sound, "combiner": {"m": 32}}
    model = build(settings | {"chunking": {"num_chunks": 1, "chunk_seconds": None}}).train()
    there = torch.ones(3, 1, dtype=torch.bool)
    media = {"video": torch.randn(3, 1, frames, 3, 32, 32), "audio": torch.randn(3, 1, 64, 64)}
    texts = {name: batch[name] for name in ("decoder_input_ids", "decoder_attention_mask", "labels")}
    output = model(**media, **texts, **dict.fromkeys(("chunk_mask", "video_mask", "audio_mask"), there))
    assert output.latents.shape[:3] == (3, 1, 32)
    assert output.latent_loss == output.video_loss == 0 and output.loss == output.text_loss > 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_latents_of_another_width_are_projected_once_for_an_answer(batch):
    model, calls = build(SWITCHES["latent projection"]).eval(), []
    model.text.latent_input.register_forward_hook(lambda *_: calls.append(1))
    inputs = {name: batch[name] for name in MEDIA} | {"decoder_input_ids": batch["decoder_input_ids"][:, :4]}
    model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(calls) == 1
