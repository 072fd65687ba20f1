"""Dropout, layer drop and label smoothing: off without a trace, on in training alone, and as many as was said."""

import pytest
import torch
from torch.nn import functional as F

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.config.parts import StackConfig, TextConfig
from mirasol.model.losses import text_loss
from mirasol.model.transformer import Attention, LayerDrop, RowNoise, Stack, draw_from_seeds

STACK = {"depth": 4, "width": 8, "hidden": 8, "heads": 1, "head_width": 8}
TTM = {"read_tokens": 16, "memory_tokens": 8}
REGULARISED = {"dropout": 0.2, "layer_drop": 0.3}


def build(kind: str = "transformer", **text) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    combiner = {"kind": kind, "ttm": TTM}
    return MirasolForConditionalGeneration(
        MirasolConfig.preset("tiny", combiner=combiner, text={"vocab_size": 40, **text})
    )


def turn_on(model: MirasolForConditionalGeneration, **rates: float) -> None:
    for stack in model.config.stacks.values():
        for name, rate in rates.items():
            setattr(stack, name, rate)
    model.apply_dropout_rates()


def loss_of(model, batch, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(**batch).loss


@pytest.mark.parametrize("name", ["dropout", "layer_drop", "attention_dropout"])
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(name, rate):
    with pytest.raises(UserError, match=rf"{name}={rate} must be in \[0, 1\)"):
        StackConfig(**STACK, **{name: rate})


def test_impossible_smoothing_is_refused():
    with pytest.raises(UserError, match=r"label_smoothing=1.0 must be in \[0, 1\)"):
        TextConfig(stack=STACK, vocab_size=10, cross_attention_every=1, label_smoothing=1.0)


def test_the_rate_grows_with_depth_and_the_expectation_stays():
    torch.manual_seed(0)
    drop, x = LayerDrop(0.4).train(), torch.zeros(20_000, 1, 8)
    kept = torch.stack(drop(x, blocks=4, branches=2))
    rates = (kept == 0).float().mean(dim=(2, 3, 4))
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None].expand(4, 2)
    torch.testing.assert_close(rates, expected, atol=0.02, rtol=0)
    torch.testing.assert_close(kept.mean(dim=(2, 3, 4)), torch.ones(4, 2), atol=0.03, rtol=0)


def test_a_sequence_passes_over_branches_of_its_own():
    """Whole branches: what a sequence's tokens become is that of the stack without these branches."""
    torch.manual_seed(0)
    stack = Stack(StackConfig(**STACK, layer_drop=0.9)).train()
    x = torch.randn(6, 3, 8)
    torch.manual_seed(1)
    kept = stack.layer_drop(x, 4, 2)
    torch.manual_seed(1)
    out = stack(x)
    assert len({tuple(torch.stack(kept)[:, :, row].flatten().tolist()) for row in range(6)}) > 1
    for row in range(6):
        y = x[row : row + 1]
        for block, scale in zip(stack.blocks, kept, strict=True):
            if scale[0, row] > 0:
                queries, keys_values = block.attention.project(y, block.attention_norm)
                y = y + scale[0, row] * block.attention.attend(queries, keys_values)[0]
            if scale[1, row] > 0:
                y = y + scale[1, row] * block.feed_forward(y, block.feed_forward_norm)
        torch.testing.assert_close(out[row : row + 1], stack.norm(y))


@pytest.mark.parametrize("kind", ["transformer", "cls", "perceiver", "ttm"])
def test_rates_reach_every_module_act_in_training_alone_and_can_be_taken_back(kind, batch):
    plain, model = build(kind).train(), build(kind).train()
    before = loss_of(plain, batch)
    for name, rate in REGULARISED.items():
        turn_on(model, **{name: rate})
        assert loss_of(model, batch) != before, name
        assert loss_of(model, batch) == loss_of(model, batch)
        assert loss_of(model, batch) != loss_of(model, batch, seed=8)
        model.eval()
        assert loss_of(model, batch) == loss_of(plain.eval(), batch), name
        model.train()
        turn_on(model, **{name: 0.0})
        assert loss_of(model, batch) == before == loss_of(plain.train(), batch)
    turn_on(model, **REGULARISED)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.2
        if isinstance(module, Attention):
            assert module.dropout == 0.2
        if isinstance(module, LayerDrop):
            assert module.rate == 0.3


@pytest.mark.parametrize("kind", ["transformer", "perceiver", "ttm"])
def test_every_stack_drops_for_itself(kind, batch):
    model = build(kind).train()
    model.latent.mask_ratio = 0.0  # else what was drawn before it would change the loss
    before = loss_of(model, batch)
    paths = model.config.stacks if kind == "transformer" else ["combiner.stack"]
    for path in paths:
        stack = model.config.stacks[path]
        for name, rate in REGULARISED.items():
            setattr(stack, name, rate)
            model.apply_dropout_rates()
            assert loss_of(model, batch) != before, (path, name)
            setattr(stack, name, 0.0)
    model.apply_dropout_rates()
    assert loss_of(model, batch) == before


def test_a_saved_config_tells_what_the_modules_do(batch, tmp_path):
    model = build().train()
    turn_on(model, **REGULARISED)
    model.save_pretrained(tmp_path)
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path).train()
    assert loss_of(loaded, batch) == loss_of(model, batch)
    assert loaded.config.latent.stack.layer_drop == 0.3


def test_attention_dropout_of_its_own_stays(batch):
    model = build().train()
    model.config.vit.attention_dropout = 0.0
    turn_on(model, dropout=0.2)
    assert {module.dropout for module in model.chunk_encoder.vit.modules() if isinstance(module, Attention)} == {0.0}


@pytest.mark.parametrize("kind", ["transformer", "perceiver"])
def test_every_weight_has_a_gradient_when_nearly_all_is_passed_over(kind, batch):
    model = build(kind).train()
    turn_on(model, layer_drop=0.99)
    loss_of(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["transformer", "perceiver"])
def test_recomputing_draws_the_same_again(kind, batch):
    model = build(kind).train()
    turn_on(model, **REGULARISED)
    loss_of(model, batch).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.recompute_activations("block")
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_smoothing_is_the_libraries_and_off_outside_training(batch):
    plain, smooth = build().train(), build(label_smoothing=0.2).train()
    torch.manual_seed(7)
    output = plain(**batch)
    torch.manual_seed(7)
    smoothed = smooth(**batch)
    assert smoothed.text_loss != output.text_loss
    assert smoothed.latent_loss == output.latent_loss
    assert loss_of(smooth.eval(), batch) == loss_of(plain.eval(), batch)


def random_text(rows: int):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(50, 16)
    return hidden, torch.randint(50, (rows,)), lambda some: F.linear(some, weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_sliced_loss_with_weights_and_smoothing_is_the_plain_one(smoothing, weighted):
    weights = torch.rand(11) if weighted else None
    results = []
    for at_once in (50 * 11, 50 * 3):
        hidden, labels, logits = random_text(11)
        loss = text_loss(hidden, labels, logits, 50, at_once, weights, smoothing)
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    torch.testing.assert_close(*results)
    hidden, labels, logits = random_text(11)
    each = F.cross_entropy(logits(hidden), labels, reduction="none", label_smoothing=smoothing)
    expected = each.mean() if weights is None else (weights * each).sum() / weights.sum()
    torch.testing.assert_close(results[0][0], expected.detach())


def test_weights_of_zero_leave_a_loss_of_zero():
    hidden, labels, logits = random_text(4)
    assert text_loss(hidden, labels, logits, 50, weights=torch.zeros(4)) == 0


def test_row_weights_weigh_the_rows(model, batch):
    """Rows that weigh nothing are as good as rows without labels, and a common factor changes nothing."""
    batch.pop("decoder_attention_mask")
    without = batch["labels"].clone()
    without[::2] = -100
    weights = torch.tensor([0.0, 0.5] * 3)
    expected = model(**{**batch, "labels": without}).text_loss
    torch.testing.assert_close(model(**batch, row_weights=weights).text_loss, expected)


def test_rows_of_two_clips_give_the_mixed_loss(model, batch):
    """lambda CE(a) + (1 - lambda) CE(b), where each clip has as many target tokens in both roles."""
    batch["labels"][1, 6] = 7
    rows = torch.arange(6).view(3, 2)
    first, second = batch["labels"], batch["labels"][rows.roll(-1, 0).flatten()]
    ids = batch["decoder_input_ids"], batch["decoder_input_ids"][rows.roll(-1, 0).flatten()]
    media = {name: batch[name] for name in ("video", "audio", "chunk_mask", "video_mask", "audio_mask")}
    texts = [{"decoder_input_ids": ids[0], "labels": first}, {"decoder_input_ids": ids[1], "labels": second}]
    losses = [model(**media, **text).text_loss for text in texts]
    both = [torch.stack([a.view(3, 2, -1), b.view(3, 2, -1)], 1).flatten(0, 2) for a, b in (ids, (first, second))]
    weights = torch.tensor([0.7, 0.7, 0.3, 0.3] * 3)
    mixed = model(**media, decoder_input_ids=both[0], labels=both[1], row_weights=weights).text_loss
    torch.testing.assert_close(mixed, 0.7 * losses[0] + 0.3 * losses[1])


def test_row_weights_that_weigh_nothing_are_refused(model, batch):
    with pytest.raises(UserError, match="2 row_weights for 6 text rows"):
        model(**batch, row_weights=torch.ones(2))
    labels = batch.pop("labels")
    with pytest.raises(UserError, match="row_weights were given without labels"):
        model(**batch, row_weights=torch.ones(len(labels)))


def test_labels_without_all_the_media_are_refused(model, batch):
    encoded = model.encode(*(batch[n] for n in ("video", "audio", "chunk_mask", "video_mask", "audio_mask")))
    text = {"decoder_input_ids": batch["decoder_input_ids"], "labels": batch["labels"]}
    with pytest.raises(UserError, match="labels were given without audio, chunk_mask, video_mask, audio_mask: "):
        model(video=batch["video"], encoder_outputs=encoded, **text)


def test_a_gap_in_the_chunks_is_refused(model, batch):
    batch["chunk_mask"][1] = torch.tensor([True, False, True, False])
    with pytest.raises(UserError, match="chunk_mask of clip 1 has padding before chunk 2: padding chunks come last"):
        model(**batch)


def test_numbers_of_seeds_are_uniform_and_independent():
    seeds = torch.randint(-(2**62), 2**62, (300,), generator=torch.Generator().manual_seed(0))
    seeds[:100] = torch.arange(100)  # neighbours as well
    drawn = draw_from_seeds(seeds, 1000)
    assert (drawn >= 0).all() and (drawn < 1).all()
    assert torch.histc(drawn, 10, 0, 1).div(30_000).sub(1).abs().max() < 0.05
    assert torch.corrcoef(drawn[:100]).fill_diagonal_(0).abs().max() < 0.16  # 5 standard deviations
    assert torch.corrcoef(drawn[:, :100].T).fill_diagonal_(0).abs().max() < 0.29


@pytest.mark.parametrize("parts", [[6], [2, 4], [1, 1, 1, 3]])
def test_a_clips_numbers_do_not_depend_on_what_is_computed_with_it(parts):
    seeds = torch.arange(7, 13)

    def draw_all(seeds, chunks) -> torch.Tensor:
        noise, clips = RowNoise(), len(seeds)
        noise.seeds = seeds
        twice = [noise.draw(clips * chunks, 4, seeds.device).unflatten(0, (clips, chunks)) for _ in range(2)]
        assert not torch.equal(*twice)
        return torch.stack(twice, dim=1)

    whole = draw_all(seeds, chunks=5)
    for number, part in enumerate(seeds.split(parts)):
        longest = 3 + number % 3  # parts are padded to lengths of their own
        own = whole[(part - 7)][:, :, :longest]
        assert torch.equal(draw_all(part, longest)[:, :, :5], own)


def test_without_seeds_numbers_are_pytorchs():
    torch.manual_seed(3)
    drawn = RowNoise().draw(4, 6, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4, 6))
