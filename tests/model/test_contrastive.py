"""MaMMUT's two passes: what the contrastive features depend on, what the loss is, and that it can be learnt."""

import math

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.model.losses import contrastive_loss

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
TEXT = {"vocab_size": 40, "cross_attention_ffn": True, "cross_attention_every": 2}


def build(**contrastive) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    parts = {"text": TEXT, "contrastive": {"width": 16, **contrastive}}
    return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **parts)).eval()


@pytest.fixture
def paired():
    return build()


@pytest.fixture
def pairs():
    """Five images and texts of 3 to 7 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 40, (5, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 6, 4])[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    return {
        "images": torch.randn(5, 3, 32, 32, generator=generator),
        "decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels,
    }  # fmt: skip


def by_hand(images, texts, temperature, gamma, bias=0.0):
    """The loss of the paper, pair after pair."""
    total = 0.0
    for i in range(len(images)):
        for j in range(len(texts)):
            p = 1 / (1 + math.exp(-(float(images[i] @ texts[j]) / temperature + bias)))
            p = p if i == j else 1 - p
            total -= (1 - p) ** gamma * math.log(p)
    return total / len(images)


def some_features(count=6, width=8):
    generator = torch.Generator().manual_seed(3)
    return torch.nn.functional.normalize(torch.randn(2, count, width, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("bias", [None, -1.5])
def test_the_loss_is_the_formula(gamma, bias):
    images, texts = some_features()
    found = contrastive_loss(images, texts, torch.tensor(0.2), bias and torch.tensor([bias]), gamma)
    assert found.item() == pytest.approx(by_hand(images, texts, 0.2, gamma, bias or 0.0), rel=1e-5)


def test_the_loss_is_symmetric():
    images, texts = some_features()
    there, back = (contrastive_loss(a, b, torch.tensor(0.1), None, 2.0) for a, b in ((images, texts), (texts, images)))
    torch.testing.assert_close(there, back)


def test_every_process_with_its_own_images_gives_the_loss_of_the_whole_batch():
    """Values and, once all processes' gradients are averaged, gradients."""
    images, texts = some_features()
    whole, parts = images.clone().requires_grad_(), images.clone().requires_grad_()
    together = contrastive_loss(whole, texts, torch.tensor(0.1), None, 2.0)
    shares = [contrastive_loss(parts[f : f + 2], texts, torch.tensor(0.1), None, 2.0, first=f) for f in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(shares).mean(), together)
    together.backward()
    torch.stack(shares).mean().backward()
    torch.testing.assert_close(whole.grad, parts.grad)


def test_autocast_does_not_round_the_similarities():
    images, texts = some_features().float()
    plain = contrastive_loss(images, texts, torch.tensor(0.02), None, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(images, texts, torch.tensor(0.02), None, 2.0), plain)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_gradient_is_finite_where_pairs_are_as_sure_as_numbers_allow(gamma):
    features = torch.eye(4).requires_grad_()
    temperature = torch.tensor(1e-3, requires_grad=True)
    for texts in (torch.eye(4), -torch.eye(4)):
        loss = contrastive_loss(features, texts, temperature, None, gamma)
        loss.backward()
        assert loss.isfinite() and features.grad.isfinite().all() and temperature.grad.isfinite()


def test_the_text_is_read_in_both_directions(paired, pairs):
    """A later token changes what an earlier one becomes, unlike in the generative pass."""
    ids, real = pairs["decoder_input_ids"][:1], torch.ones(1, 7, dtype=torch.bool)
    other = ids.clone()
    other[0, -1] = 5 + (other[0, -1] - 4) % 35
    with torch.no_grad():
        assert (paired.text.read(ids, real) - paired.text.read(other, real))[0, 0].abs().max() > 1e-3
        latents, mask = torch.randn(1, 4, 96), torch.ones(1, 4, dtype=torch.bool)
        hidden = [paired.text(row, None, latents, mask)[0][0, :-1] for row in (ids, other)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_text_feature(paired, pairs, side):
    with torch.no_grad():
        expected = paired.image_text(**pairs).text_features
        for name, filler in (("decoder_input_ids", 7), ("decoder_attention_mask", 0), ("labels", -100)):
            pad = torch.full((5, 3), filler)
            pairs[name] = torch.cat([pad, pairs[name]] if side == "left" else [pairs[name], pad], dim=1)
        output = paired.image_text(**pairs)
    torch.testing.assert_close(output.text_features, expected, **TOLERANCE)


def test_a_batch_of_pairs_equals_single_pairs(paired, pairs):
    with torch.no_grad():
        together = paired.image_text(**pairs)
        for row in range(5):
            alone = paired.image_text(**{name: value[row : row + 1] for name, value in pairs.items()})
            torch.testing.assert_close(together.image_features[row], alone.image_features[0], **TOLERANCE)
            torch.testing.assert_close(together.text_features[row], alone.text_features[0], **TOLERANCE)
            real = pairs["decoder_attention_mask"][row].bool()
            torch.testing.assert_close(together.logits[row, real], alone.logits[0, real], **TOLERANCE)


def test_features_are_normalised_and_a_text_of_nothing_is_finite(paired, pairs):
    pairs["decoder_attention_mask"][1] = 0
    output = paired.image_text(**pairs)
    for features in (output.image_features, output.text_features[[0, 2, 3, 4]]):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in paired.parameters() if p.grad is not None)


def test_both_passes_train_the_same_decoder(paired, pairs):
    """Self-attention, feed-forward and embedding learn from both; cross-attention from the generative pass alone."""
    gradients = {}
    for loss in ("contrastive_loss", "text_loss"):
        paired.zero_grad()
        paired.image_text(**pairs)[loss].backward()
        gradients[loss] = {n for n, p in paired.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    text = {name for name, _ in paired.named_parameters() if name.startswith("text.")}
    cross = {name for name in text if "cross_" in name}
    assert cross and text - cross <= gradients["contrastive_loss"] and not cross & gradients["contrastive_loss"]
    assert text <= gradients["text_loss"]
    space = {name for name, _ in paired.named_parameters() if name.startswith("contrastive.")}
    assert space == {n for n in gradients["contrastive_loss"] if n.startswith("contrastive.")} and len(space) == 3
    assert not space & gradients["text_loss"]
    for found in gradients.values():
        assert {"chunk_encoder.vit.norm.weight", "chunk_encoder.tubes.projections.1.weight"} <= found


def test_the_image_is_looked_at_while_writing(paired, pairs):
    with torch.no_grad():
        before = paired.image_text(**pairs)
        after = paired.image_text(**(pairs | {"images": pairs["images"].flip(0)}))
    assert (before.logits[0] - after.logits[0]).abs().max() > 1e-3
    torch.testing.assert_close(before.image_features.flip(0), after.image_features, **TOLERANCE)
    assert torch.equal(before.text_features, after.text_features)


def test_the_loss_is_the_weighted_sum(pairs):
    parts = {"text": TEXT, "contrastive": {"width": 16}, "loss_weights": {"text": 10.0, "contrastive": 0.5}}
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **parts))
    output = model.train().image_text(**pairs)
    torch.testing.assert_close(output.loss, 10 * output.text_loss + 0.5 * output.contrastive_loss)
    assert output.logits is None
    del pairs["labels"]
    output = model.image_text(**pairs)
    assert output.text_loss is None
    torch.testing.assert_close(output.loss, 0.5 * output.contrastive_loss)


def test_what_is_added_is_only_there_when_asked_for(pairs):
    plain = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", text=TEXT))
    extra = {"contrastive.image_projection.weight", "contrastive.text_projection.weight", "contrastive.log_temperature"}
    assert set(build().state_dict()) - set(plain.state_dict()) == extra
    assert set(build(bias=-10.0).state_dict()) - set(plain.state_dict()) == extra | {"contrastive.bias"}
    with pytest.raises(UserError, match="contrastive=None: image_text needs a model made with contrastive"):
        plain.image_text(**pairs)


def test_texts_must_match_images(paired, pairs):
    with pytest.raises(UserError, match="5 texts for 4 images"):
        paired.image_text(**(pairs | {"images": pairs["images"][:4]}))


def test_temperature_and_bias_start_as_configured_and_survive_saving(tmp_path):
    model = build(temperature=0.1, bias=-10.0)
    assert model.contrastive.temperature.item() == pytest.approx(0.1)
    assert model.contrastive.bias.item() == -10
    torch.nn.init.constant_(model.contrastive.log_temperature, -1.0)
    model.save_pretrained(tmp_path)
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.contrastive.log_temperature.item() == -1
    assert loaded.config.contrastive == model.config.contrastive


@pytest.mark.parametrize(
    ("contrastive", "message"),
    [
        ({}, "contrastive.width is missing"),
        ({"width": 0}, "contrastive.width=0 must be at least 1"),
        ({"width": 8, "gamma": -1.0}, "contrastive.gamma=-1.0 must be at least 0"),
        ({"width": 8, "temperature": 0.0}, "contrastive.temperature=0.0 must be above 0"),
        ({"width": 8, "tau": 1.0}, "contrastive: unknown key 'tau'"),
        (3, "contrastive=3 must be a mapping"),
    ],
)
def test_impossible_settings_are_refused(contrastive, message):
    with pytest.raises(UserError, match=message):
        MirasolConfig.preset("tiny", contrastive=contrastive)


@pytest.mark.slow
def test_32_pairs_are_learnt_by_heart():
    torch.manual_seed(0)
    settings = {"text": {"vocab_size": 40}, "contrastive": {"width": 32}}
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **settings)).train()
    generator = torch.Generator().manual_seed(1)
    images, ids = torch.randn(32, 3, 32, 32, generator=generator), torch.randint(5, 40, (32, 6), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 3e-4 * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        model.image_text(images, ids).loss.backward()
        optimizer.step()
    output = model.eval().image_text(images, ids)
    similarity = output.image_features @ output.text_features.T
    for direction in (0, 1):
        assert similarity.argmax(direction).tolist() == list(range(32))
    assert output.contrastive_loss < 0.05
