"""Image side, text decoder and cross-attention compute what the openMaMMUT model they came from computes.

The reference here is written from the description of the model in docs/starting-weights.md, over a random state dict
with the names of its checkpoints.
"""

import json

import pytest
import torch
from making import config, image_model, saved
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from mirasol import MirasolForConditionalGeneration, UserError

from_parts = MirasolForConditionalGeneration.from_parts
WIDTH, TEXT_WIDTH, VOCABULARY, CONTEXT, LAYERS, EVERY = 48, 32, 50, 12, 4, 2
HEADS, TEXT_HEADS = 2, 4


def block_shapes(name: str, width: int, hidden: int, cross: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,), "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,), "ln_2.bias": (width,), "mlp.c_fc.weight": (hidden, width), "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    shapes |= {"ln_1_kv.weight": (width,), "ln_1_kv.bias": (width,)} if cross else {}
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def state_dict(patch: int = 16, grid: int = 4) -> dict[str, Tensor]:
    shapes = {
        "map_viz2txt_kv": (WIDTH, TEXT_WIDTH), "logit_scale": (), "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (grid * grid + 1, WIDTH), "visual.proj": (WIDTH, 24),
        "visual.conv1.weight": (WIDTH, 3, patch, patch), "visual.ln_pre.weight": (WIDTH,),
        "visual.ln_pre.bias": (WIDTH,), "visual.ln_post.weight": (WIDTH,), "visual.ln_post.bias": (WIDTH,),
        "text.token_embedding.weight": (VOCABULARY, TEXT_WIDTH), "text.positional_embedding": (CONTEXT, TEXT_WIDTH),
        "text.text_projection": (TEXT_WIDTH, VOCABULARY), "text.ln_final.weight": (TEXT_WIDTH,),
        "text.ln_final.bias": (TEXT_WIDTH,),
    }  # fmt: skip
    for index in range(2):
        shapes |= block_shapes(f"visual.transformer.resblocks.{index}", WIDTH, 80)
    for index in range(LAYERS):
        shapes |= block_shapes(f"text.resblocks.{index}", TEXT_WIDTH, 64)
    for index in range(LAYERS // EVERY):
        shapes |= block_shapes(f"text.cross_attn.{index}", TEXT_WIDTH, 64, cross=True)
    generator = torch.Generator().manual_seed(2)
    norms = (".ln_1.weight", "ln_2.weight", "ln_1_kv.weight", "ln_pre.weight", "ln_post.weight", "ln_final.weight")
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if name.endswith(norms) else 0.0)
        for name, shape in shapes.items()
    }


class Reference:
    """openMaMMUT's forward pass over a state dict."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def block(self, x: Tensor, name: str, heads: int, mask: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        prefix = f"{name}.attn."
        attention.load_state_dict({k[len(prefix) :]: v for k, v in self.state.items() if k.startswith(prefix)})
        query = self.norm(x, f"{name}.ln_1")
        looked_at = query if keys is None else self.norm(keys, f"{name}.ln_1_kv")
        x = x + attention(query, looked_at, looked_at, attn_mask=mask, need_weights=False)[0]
        hidden = F.gelu(self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        return x + self.linear(hidden, f"{name}.mlp.c_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def image(self, images: Tensor) -> Tensor:
        """Class token and patches, as the text decoder looks at them."""
        kernel = self.state["visual.conv1.weight"]
        patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        first = self.state["visual.class_embedding"].expand(len(images), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.state["visual.positional_embedding"]
        x = self.norm(x, "visual.ln_pre")
        for index in range(2):
            x = self.block(x, f"visual.transformer.resblocks.{index}", HEADS)
        return x

    def text(self, ids: Tensor, image_tokens: Tensor) -> Tensor:
        keys = image_tokens @ self.state["map_viz2txt_kv"]
        x = self.state["text.token_embedding.weight"][ids] + self.state["text.positional_embedding"][: ids.shape[1]]
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        for index in range(LAYERS):
            x = self.block(x, f"text.resblocks.{index}", TEXT_HEADS, mask)
            if index % EVERY == 0:
                x = self.block(x, f"text.cross_attn.{index // EVERY}", TEXT_HEADS, keys=keys)
        return self.norm(x, "text.ln_final") @ self.state["text.text_projection"]


def decoder_config():
    """Latents of the image side's width, which is where `map_viz2txt_kv` belongs."""
    stack = {"width": WIDTH, "heads": 2, "head_width": 24}
    return config(
        audio={"adapter": stack}, combiner={"stack": stack}, latent={"stack": stack}, reconstruction={"stack": stack}
    )


@pytest.fixture
def file(tmp_path):
    """A pickled state dict as it is published, with its config beside it."""
    torch.save(state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    model = {"vision_cfg": {"head_width": WIDTH // HEADS}, "text_cfg": {"heads": TEXT_HEADS}}
    pictures = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pictures}))
    return tmp_path / "open_clip_pytorch_model.bin"


def test_image_features_equal_the_source(file):
    model, _ = from_parts(decoder_config(), openmammut=file, allow_pickle=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = model.chunk_encoder.image(images)
    expected = Reference(state_dict()).image(images)[:, 1:]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert model.config.chunking.image_mean == (0.5, 0.4, 0.3)


def test_logits_equal_the_source(file):
    model, report = from_parts(decoder_config(), openmammut=file.parent, allow_pickle=True)
    ids, image_tokens = torch.randint(0, VOCABULARY, (3, 7)), torch.randn(3, 17, WIDTH)
    with torch.no_grad():
        hidden, _ = model.text(ids, None, image_tokens, torch.ones(3, 17, dtype=torch.bool))
        ours = model.text.logits(hidden)
    expected = Reference(state_dict()).text(ids, image_tokens)
    torch.testing.assert_close(ours[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)
    assert ours.shape[-1] == VOCABULARY + 1
    assert model.config.sep_token_id == VOCABULARY
    assert report.config_changes["text.cross_attention_first"] == [None, 1]
    assert {e["source"] for e in report.unused} == {
        "logit_scale", "visual.proj", "visual.ln_post.weight", "visual.ln_post.bias",
    }  # fmt: skip


def test_every_tensor_is_in_the_report(file):
    model, report = from_parts(decoder_config(), openmammut=file, allow_pickle=True)
    ours = [entry["target"] for entry in (*report.loaded, *report.filled, *report.random)]
    assert sorted(ours) == sorted(model.state_dict())
    theirs = {name for entry in report.loaded for name in entry["source"]} | {e["source"] for e in report.unused}
    assert theirs == set(state_dict())
    assert not any(name.startswith("text.") for name in (e["target"] for e in report.random))


def test_latents_of_another_width_leave_the_map_unused_and_say_so(file):
    _, report = from_parts(config(), openmammut=file, allow_pickle=True)
    [entry] = [e for e in report.unused if e["source"] == "map_viz2txt_kv"]
    assert entry["reason"].startswith("projects the source's image features")


def test_rows_for_tokens_that_the_source_lacks_are_recorded_as_untrained(file):
    _, report = from_parts(decoder_config(), openmammut=file, allow_pickle=True)
    rows = len(state_dict()["text.token_embedding.weight"])
    found = {e["target"]: e["untrained_from"] for e in report.loaded if "untrained_from" in e}
    assert found == {"text.embedding.weight": rows, "text.output.weight": rows}


def test_the_image_side_of_another_model_goes_with_its_text_decoder(file, tmp_path):
    folder = saved(image_model("ViTModel", 16, 64), tmp_path / "vit")
    model, report = from_parts(decoder_config(), image=folder, openmammut=file, allow_pickle=True)
    alone, _ = from_parts(decoder_config(), image=folder)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.chunk_encoder.image(images), alone.chunk_encoder.image(images))
    assert torch.equal(model.text.position, state_dict()["text.positional_embedding"])
    assert "the image side comes from another source" in {e["reason"] for e in report.unused}


def test_wrapped_and_safetensors_state_dicts_are_read_alike(file, tmp_path):
    from safetensors.torch import save_file

    save_file(state_dict(), tmp_path / "open_clip_model.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state_dict().items()}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    plain, _ = from_parts(decoder_config(), openmammut=tmp_path)
    other, _ = from_parts(decoder_config(), openmammut=tmp_path / "epoch_3.pt", allow_pickle=True)
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in other.state_dict().items())


def test_the_loaded_model_trains_answers_and_comes_back_from_disk(file, tmp_path):
    model, _ = from_parts(decoder_config(), openmammut=file, allow_pickle=True)
    media = {"video": torch.randn(1, 2, 4, 3, 64, 64), "audio": torch.randn(1, 2, 16, 64)}
    media |= {name: torch.ones(1, 2, dtype=torch.bool) for name in ("chunk_mask", "video_mask", "audio_mask")}
    ids = torch.tensor([[1, 5, 6, VOCABULARY, 7, 8]])
    model.train()(**media, decoder_input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.text.parameters())
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path / "saved")
    settings = {"decoder_input_ids": ids[:, :4], "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**media, **settings), loaded.generate(**media, **settings))


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows where texts begin and end, but no <sep>, as CLIP's."""
    vocabulary = {f"w{index}": index for index in range(words - 2)} | {"<s>": words - 2, "</s>": words - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_the_tokenizer_decides_the_special_tokens_and_gets_those_it_lacks(file):
    tokenizer = word_tokenizer(VOCABULARY)
    model, _ = from_parts(decoder_config(), openmammut=file, allow_pickle=True, tokenizer=tokenizer)
    ids = [getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad", "sep")]
    assert ids == [VOCABULARY - 2, VOCABULARY - 1, VOCABULARY - 1, VOCABULARY]
    assert tokenizer.sep_token == "<sep>" and model.config.text.vocab_size == VOCABULARY + 1
    with pytest.raises(UserError, match=r"the tokenizer has 60 tokens, but .* was trained with 50"):
        from_parts(decoder_config(), openmammut=file, allow_pickle=True, tokenizer=word_tokenizer(60))


def test_bad_state_dicts_are_refused(file, tmp_path):
    def refused(message: str, state: dict[str, Tensor]) -> None:
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=message):
            from_parts(decoder_config(), openmammut=tmp_path / "bad.pt", allow_pickle=True)

    whole = state_dict()
    with pytest.raises(UserError, match="a pickle can run code"):
        from_parts(decoder_config(), openmammut=file)
    with pytest.raises(UserError, match="no such file"):
        from_parts(decoder_config(), openmammut=tmp_path / "none.pt")
    refused("not an openMaMMUT state dict: it has no text.token_embedding.weight", {"a": torch.zeros(1)})
    refused("not a state dict of tensors", {"a": 3})
    refused("lacks the tensor text.resblocks.3.mlp.c_fc.bias", without(whole, "text.resblocks.3.mlp.c_fc.bias"))
    refused(
        r"visual.transformer.resblocks.1.mlp.c_fc.weight has shape \[64, 48\], but "
        r"chunk_encoder.vit.blocks.1.feed_forward.hidden.weight takes \[80, 48\]",
        whole | {"visual.transformer.resblocks.1.mlp.c_fc.weight": torch.zeros(64, 48)},
    )
    refused(r"visual.conv1.weight has shape \[64, ", whole | {"visual.conv1.weight": torch.zeros(64, 3, 16, 16)})
    refused("ls_1.gamma has no counterpart", whole | {"text.resblocks.0.ls_1.gamma": torch.zeros(32)})


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}
