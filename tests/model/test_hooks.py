"""Hooks on any module work: each module is called through its forward, in every precision, offloaded or adapted."""

import copy

import jaxtyping
import pytest
import torch
from torch import nn

from mirasol import MirasolConfig, MirasolForConditionalGeneration

KINDS = ("transformer", "cls", "perceiver", "ttm", "concat")
STACK = {"depth": 2, "width": 32, "hidden": 32, "heads": 2, "head_width": 16}
TTM = {"depth": 1, "memory_tokens": 8, "read_tokens": 8, "hidden": 32, "heads": 2, "head_width": 16}
MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")


def make_model(kind: str = "transformer", **text) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    combiner = {"kind": kind, "m": 21 if kind == "concat" else 8, "stack": STACK, "ttm": TTM}
    parts = {"contrastive": {"width": 16, "bias": -5.0}, "video": {"learned_positions": True}, "vit": STACK}
    parts |= {"audio": {"adapter": STACK}, "latent": {"stack": STACK}, "reconstruction": {"stack": STACK}}
    text = {"vocab_size": 40, "learned_positions": True, "cross_attention_ffn": True, "stack": STACK, **text}
    return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", combiner=combiner, text=text, **parts)).eval()


def run_everything(model, batch) -> dict[str, torch.Tensor]:
    """What a model gives in all its passes."""
    media = {name: batch[name] for name in MEDIA}
    prompts = {name: batch[name][:, :4] for name in ("decoder_input_ids", "decoder_attention_mask")}
    ids, one = batch["decoder_input_ids"], {"labels": batch["labels"][:3], "images": batch["video"][:, 0, 0]}
    stream = model.stream(3)
    for chunk in range(2):
        stream.append(batch["video"][:, chunk], batch["audio"][:, chunk])
    candidates = ids[:, None, 4:6], torch.ones(6, 1, 2, dtype=torch.bool)
    with torch.no_grad():
        return {
            "loss": model(**batch).loss,
            "image_text": model.image_text(decoder_input_ids=ids[:3], **one).loss,
            "answers": model.generate(**media, **prompts, max_new_tokens=3, do_sample=False),
            "stream": stream.encoder_outputs.last_hidden_state,
            "scores": model.score(model.encode(**media), ids[:, :4], None, *candidates).total,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_all_modules_fire_in_a_training_step(dtype, kind, batch):
    model = make_model(kind, tied=dtype == torch.float32).to(dtype).train()
    forward, backward = set(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: forward.add(name))
        if not isinstance(module, MirasolForConditionalGeneration):
            module.register_full_backward_hook(lambda *_, name=name: backward.add(name))
    model(**batch).loss.backward()
    image_text = {"images": batch["video"][:, 0, 0], "labels": batch["labels"][:3]}
    model.image_text(decoder_input_ids=batch["decoder_input_ids"][:3], **image_text).loss.backward()
    # A list is no layer, and without target tokens' logits in training only the text loss asks for the output.
    layers = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert layers - forward == set()
    with_weights = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert with_weights - backward - {"text.embedding"} <= {"chunk_encoder", "contrastive"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_that_do_nothing_change_nothing(dtype, batch):
    plain = make_model().to(dtype).train()
    plain.latent.mask_ratio = 0.0
    watched = copy.deepcopy(plain)
    for module in watched.modules():
        module.register_forward_hook(lambda *_: None)
    losses = [model(**batch).loss for model in (plain, watched)]
    torch.testing.assert_close(*losses, rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=0)


def test_a_hook_sees_what_its_layer_is_given(batch):
    """A linear after a norm gets the normed input, also where the memory-saving kernels would have fused the two."""
    model, seen = make_model().to(torch.bfloat16).train(), []
    block = model.combiner.stack.blocks[0]
    block.feed_forward.hidden.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(**batch)
    normed = seen[0].float()
    assert normed.mean(-1).abs().max() < 0.05 and (normed.std(-1) - 1).abs().max() < 0.1


MAPS = (
    {"": "disk"},
    {"chunk_encoder": "disk", "combiner": "disk", "latent": "cpu", "reconstruction": "cpu", "text": "cpu",
     "contrastive": "disk"},
    {"chunk_encoder": "cpu", "combiner": "cpu", "latent": "disk", "reconstruction": "disk", "text": "disk",
     "contrastive": "cpu"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "placed"), [*((kind, MAPS[0]) for kind in KINDS), ("transformer", MAPS[1]), ("ttm", MAPS[2])]
)
def test_offloaded_parts_compute_the_same(kind, placed, batch, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    # accelerate rebuilds outputs from a mapping of their fields, which transformers takes and the annotations do not.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = make_model(kind, tied=kind != "ttm")
    model.save_pretrained(tmp_path / "model")
    placed = placed | ({"text": "disk"} if kind == "cls" and "text" in placed else {})
    offloaded = MirasolForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=str(tmp_path / "disk")
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert offloaded.device.type == "cpu"
    for (name, expected), found in zip(
        run_everything(model, batch).items(), run_everything(offloaded, batch).values(), strict=True
    ):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["LNTuningConfig", "LoraConfig", "IA3Config"])
def test_adapters_train_in_every_precision(method, dtype, batch):
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["attention_norm", "feed_forward_norm", "norm"]}
    if method != "LNTuningConfig":
        settings = {"target_modules": ["query", "key_value", "hidden"]}
    if method == "IA3Config":
        settings["feedforward_modules"] = ["hidden"]
    adapted = peft.get_peft_model(make_model().to(dtype).train(), getattr(peft, method)(**settings))
    adapted(**batch).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert any(p.grad.abs().max() > 0 for p in trained.values())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_a_static_cache_gives_the_same_answers(batch):
    model = make_model()
    arguments = {name: batch[name] for name in MEDIA} | {"max_new_tokens": 3, "do_sample": False}
    for name in ("decoder_input_ids", "decoder_attention_mask"):
        arguments[name] = batch[name][:, :4]
    expected = model.generate(**arguments)
    model.set_attn_implementation("flex_attention")
    assert torch.equal(model.generate(**arguments, cache_implementation="static"), expected)
