"""Words next to the codes of their positions: neither drowns the other, at any width, in both passes of the decoder."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.checkpoint import find_checkpoint, read_config
from mirasol.config.model import CHECKPOINT_FORMAT
from mirasol.config.presets import PRESETS
from mirasol.config.recipe_io import load_recipe
from mirasol.model.hf import MirasolPreTrainedModel
from mirasol.model.text import TextDecoder
from mirasol.training.build import read_recorded_config

REPOSITORY = Path(__file__).resolve().parents[2]


def make_decoder(config: MirasolConfig) -> TextDecoder:
    torch.manual_seed(0)
    return TextDecoder(config).apply(partial(MirasolPreTrainedModel._init_weights, None)).eval()


def read_first_layer(decoder: TextDecoder, words: Tensor, contrastive: bool) -> Tensor:
    """What enters the first layer for rows of words, [row, token, width]."""
    seen = []
    handle = decoder.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        if contrastive:
            decoder.read(words, torch.ones_like(words, dtype=torch.bool))
        else:
            width = decoder.latent_input.in_features if hasattr(decoder.latent_input, "in_features") else None
            latents = torch.zeros(len(words), 1, width or decoder.embedding.embedding_dim)
            decoder(words, None, latents, torch.ones(len(words), 1, dtype=torch.bool))
    handle.remove()
    return seen[0]


def find_mean_cosine(vectors: Tensor) -> float:
    directions = F.normalize(vectors, dim=-1)
    count = len(vectors)
    return ((directions @ directions.T).sum() - count).item() / (count * (count - 1))


@pytest.fixture(scope="module", params=sorted(PRESETS))
def decoder(request) -> TextDecoder:
    """The text decoder of a preset with its width, but few layers and words."""
    every = MirasolConfig.preset(request.param).text.cross_attention_every
    text = {"stack": {"depth": every, "hidden": 64}, "vocab_size": 500}
    return make_decoder(MirasolConfig.preset(request.param, text=text))


@pytest.mark.parametrize("contrastive", [False, True], ids=["generative", "contrastive"])
def test_words_and_codes_weigh_about_the_same(decoder, contrastive):
    words = torch.randperm(490)[:100, None].expand(-1, 5) + 10
    x = read_first_layer(decoder, words, contrastive)
    code = decoder.position_codes(torch.arange(5)[None], 5)
    ratio = (code.square().mean() / (x - code).square().mean()).sqrt().item()
    assert 0.6 < ratio < 0.8, "rms of codes over rms of words"
    for place in range(5):
        assert find_mean_cosine(x[:, place]) < 0.5, "different words at one place"
    assert find_mean_cosine(x[0]) > 0.5, "one word at neighbouring places is still the same word"


def test_without_the_scale_codes_drown_words():
    """What the field is for: the old value, at the paper's width."""
    text = {"stack": {"depth": 2, "hidden": 64}, "vocab_size": 500, "scale_embedding": False}
    decoder = make_decoder(MirasolConfig.preset("1b", text=text))
    x = read_first_layer(decoder, torch.randperm(490)[:100, None] + 10, contrastive=False)
    assert find_mean_cosine(x[:, 0]) > 0.99


def learn_to_copy(
    width: int, vocabulary: int, words: int, batch: int, rate: float, hidden: int, scale: bool = True
) -> float:
    """The share of random words that a decoder of two layers copies right after 200 steps."""
    stack = {"depth": 2, "width": width, "hidden": hidden, "heads": 4, "head_width": width // 4}
    text = {"stack": stack, "vocab_size": vocabulary, "scale_embedding": scale, "cross_attention_every": 2}
    decoder = make_decoder(MirasolConfig.preset("tiny", text=text))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, betas=(0.9, 0.98))
    latents, there = torch.zeros(batch, 1, 96), torch.ones(batch, 1, dtype=torch.bool)
    right = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20)
        given = torch.randint(4, vocabulary, (batch, words))
        begin, middle = torch.full((batch, 1), 1), torch.full((batch, 1), 3)
        hidden_states, _ = decoder(torch.cat([begin, given, middle, given], dim=1)[:, :-1], None, latents, there)
        logits = decoder.logits(hidden_states[:, -words:])
        right.append((logits.argmax(-1) == given).float().mean().item())
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), given.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    return sum(right[-5:]) / 5


def test_four_words_are_copied_soon():
    small = {"width": 128, "vocabulary": 1000, "words": 4, "batch": 16, "rate": 2e-3, "hidden": 128}
    assert learn_to_copy(**small) > 0.4, "without the scale: 0.00"


@pytest.mark.slow
def test_six_words_are_copied_after_200_steps():
    large = {"width": 256, "vocabulary": 2000, "words": 6, "batch": 64, "rate": 1e-3, "hidden": 1024}
    assert learn_to_copy(**large) > 0.95
    assert learn_to_copy(**large, scale=False) < 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_is_not_scaled(config, tied):
    config = copy.deepcopy(config)
    config.text.tied = tied
    decoder = make_decoder(config)
    hidden = torch.randn(3, config.text.stack.width)
    weight = decoder.embedding.weight if tied else decoder.output.weight
    torch.testing.assert_close(decoder.logits(hidden), hidden @ weight.T)


def write_first_format(model: MirasolForConditionalGeneration, folder: Path) -> None:
    """A checkpoint as it was written before embeddings had a scale."""
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["checkpoint_format"] = 1
    del values["text"]["scale_embedding"]
    (folder / "config.json").write_text(json.dumps(values))


@torch.no_grad()
def test_an_old_checkpoint_computes_what_it_did(config, batch, tmp_path):
    plain = copy.deepcopy(config)
    plain.text.scale_embedding = False
    torch.manual_seed(0)
    model = MirasolForConditionalGeneration(plain).eval()
    write_first_format(model, tmp_path / "old")
    expected, weights = model(**batch).logits, model.state_dict()
    for again in ("once", "twice"):  # loaded, and saved and loaded again
        loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path / "old").eval()
        assert torch.equal(loaded(**batch).logits, expected), again
        loaded.save_pretrained(tmp_path / "old")
        values = json.loads((tmp_path / "old" / "config.json").read_text())
        assert values["checkpoint_format"] == CHECKPOINT_FORMAT and values["text"]["scale_embedding"] is False
    scaled = MirasolForConditionalGeneration(config).eval()
    scaled.load_state_dict(weights)
    assert not torch.allclose(scaled(**batch).logits, expected)


def test_a_config_of_any_way_in_knows_its_format(config, tmp_path):
    """Loaded by name, from a file, from a mapping; without a `text` at all; what a file says itself stands."""
    old = {"model_type": "mirasol", "checkpoint_format": 1, "text": {"vocab_size": 300}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    without_text = {key: value for key, value in old.items() if key != "text"}
    for loaded in (
        MirasolConfig.from_pretrained(tmp_path), MirasolConfig.from_json_file(tmp_path / "config.json"),
        MirasolConfig(**old), MirasolConfig.from_dict(old), MirasolConfig(**without_text), read_config(tmp_path),
    ):  # fmt: skip
        assert loaded.text.scale_embedding is False and loaded.checkpoint_format == CHECKPOINT_FORMAT
        assert MirasolConfig(**loaded.to_dict()).text.scale_embedding is False
    assert MirasolConfig(**old | {"text": {"scale_embedding": True}}).text.scale_embedding is True
    assert MirasolConfig(**config.to_dict()).text.scale_embedding is True


def test_the_shipped_weights_are_of_the_present_format():
    config = read_config(find_checkpoint("tiny"))
    assert config.text.scale_embedding is True and config.latent.target == "centred"


def test_a_run_keeps_the_config_it_began_with():
    """A run that an older version began goes on, and is exported, with its own values."""
    recipe = load_recipe(REPOSITORY / "recipes" / "demo.yaml", ["model.overrides={combiner: {m: 4}}"])
    recorded = MirasolConfig.preset("tiny", combiner={"m": 4}).to_dict()
    assert read_recorded_config(recipe, {"model_config": recorded}).text.scale_embedding is True
    recorded["checkpoint_format"] = 1
    del recorded["text"]["scale_embedding"]
    for facts in ({"model_config": recorded}, {}):
        config = read_recorded_config(recipe, facts)
        assert config.text.scale_embedding is False and config.combiner.m == 4


@torch.no_grad()
def test_fixed_codes_of_the_other_parts_weigh_about_as_much_as_their_content(model, batch):
    """Tubes, Combiner and latent model: what docs/model.md says of new models."""
    sums = {}
    tubes, encoder = model.chunk_encoder.tubes, model.chunk_encoder
    tubes.register_forward_hook(
        lambda _, given, tokens: sums.update(tubes=(tokens - tubes.positions(), tubes.positions()))
    )
    encoder.register_forward_hook(
        lambda _, given, features: sums.update(
            video=(features[0][0], model.combiner.chunk_code(4)), audio=(features[1][0], model.combiner.chunk_code(4))
        )
    )
    model.combiner.register_forward_hook(lambda _, given, x: sums.update(latent=(x, model.combiner.chunk_code(4))))
    model.encode(**{name: batch[name] for name in ("video", "audio", "chunk_mask", "video_mask", "audio_mask")})
    assert len(sums) == 4
    for name, (content, code) in sums.items():
        ratio = (code.square().mean() / content.square().mean()).sqrt().item()
        assert 0.5 < ratio < 2, f"{name}: rms of the code over rms of the content {ratio:.2f}"
