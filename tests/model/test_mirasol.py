"""Properties of the whole model: what a batch, a padding, a cache or a future chunk may never change."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.model.outputs import check_media_type

MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def rows(batch, clip):
    """The part of a batch that belongs to one clip, without its padding chunks; two prompts per clip."""
    chunks = int(batch["chunk_mask"][clip].sum())
    media = {name: batch[name][clip : clip + 1, :chunks] for name in MEDIA}
    text = {name: batch[name][2 * clip : 2 * clip + 2] for name in batch if name not in MEDIA}
    return media | text


def test_batch_equals_single(model, batch):
    with torch.no_grad():
        together = model(**batch)
        for clip in range(3):
            alone = model(**rows(batch, clip))
            chunks = alone.latents.shape[1]
            torch.testing.assert_close(together.latents[clip, :chunks], alone.latents[0], **TOLERANCE)
            real = rows(batch, clip)["decoder_attention_mask"].bool()
            torch.testing.assert_close(
                together.logits[2 * clip : 2 * clip + 2][real],
                alone.logits[real],
                **TOLERANCE,
            )


def test_losses_of_a_batch_are_means_over_what_is_real(batch):
    """The text loss of the batch is the token-weighted mean of the clips' own text losses, and so on; the plain latent
    loss, for a centred one asks what the other clips are."""
    torch.manual_seed(0)
    plain = MirasolConfig.preset("tiny", text={"vocab_size": 40}, latent={"target": "plain"})
    model = MirasolForConditionalGeneration(plain).eval()
    with torch.no_grad():
        together = model(**batch)
        singles = [(model(**rows(batch, clip)), rows(batch, clip)) for clip in range(3)]
    counts = torch.tensor([float((part["labels"][:, 1:] != -100).sum()) for _, part in singles])
    losses = torch.stack([output.text_loss for output, _ in singles])
    torch.testing.assert_close(together.text_loss, (losses * counts).sum() / counts.sum(), **TOLERANCE)
    pairs = torch.tensor([3.0, 1.0, 2.0])
    losses = torch.stack([output.latent_loss for output, _ in singles])
    torch.testing.assert_close(together.latent_loss, (losses * pairs).sum() / pairs.sum(), **TOLERANCE)
    seen = torch.tensor([3.0, 1.0, 0.0])  # the third clip has no video to reconstruct
    losses = torch.stack([output.video_loss for output, _ in singles])
    torch.testing.assert_close(together.video_loss, (losses * seen).sum() / seen.sum(), **TOLERANCE)


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_a_later_chunk_changes_nothing_before_it(model, batch, changed):
    with torch.no_grad():
        before = model.encode(**{name: batch[name] for name in MEDIA})
        other = copy.deepcopy(batch)
        other["video"][:, changed:] = torch.randn_like(other["video"][:, changed:])
        other["audio"][:, changed:] = torch.randn_like(other["audio"][:, changed:])
        after = model.encode(**{name: other[name] for name in MEDIA})
    assert torch.equal(before.latents[:, :changed], after.latents[:, :changed])
    assert not torch.allclose(before.latents[0, changed], after.latents[0, changed])


def test_an_earlier_chunk_reaches_every_later_one(model, batch):
    """The Combiner's scope is the past: x_t itself, not only h_t, depends on chunk 0."""
    with torch.no_grad():
        before = model.encode(**{name: batch[name] for name in MEDIA})
        other = copy.deepcopy(batch)
        other["video"][0, 0] += 0.5
        after = model.encode(**{name: other[name] for name in MEDIA})
    for t in range(4):
        assert (before.combined[0, t] - after.combined[0, t]).abs().max() > 1e-4


def test_chunk_padding_changes_nothing(model, batch):
    longer = dict(batch)
    for name in MEDIA:
        pad = torch.full_like(batch[name][:, :2], float("nan") if batch[name].is_floating_point() else 0)
        longer[name] = torch.cat([batch[name], pad], dim=1)
    with torch.no_grad():
        short, long = model(**batch), model(**longer)
    for name in ("text_loss", "latent_loss", "video_loss", "loss"):
        torch.testing.assert_close(short[name], long[name], **TOLERANCE)
    torch.testing.assert_close(short.logits, long.logits, **TOLERANCE)


def test_what_a_missing_modality_holds_does_not_matter(model, batch):
    other = copy.deepcopy(batch)
    other["audio"][1], other["video"][2] = float("nan"), float("nan")
    media = {name: batch[name] for name in MEDIA}
    with torch.no_grad():
        assert torch.equal(
            model.encode(**media).latents,
            model.encode(**{n: other[n] for n in MEDIA}).latents,
        )
        assert torch.equal(model(**batch).loss, model(**other).loss)


def test_a_missing_modality_that_is_nan_spoils_no_gradient(model, batch):
    batch["audio"][1], batch["video"][2] = float("nan"), float("nan")
    model(**batch).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_a_missing_modality_is_not_silence(model, batch):
    """Without audio differs from audio that is all zeros: the mask carries information."""
    media = {name: batch[name].clone() for name in MEDIA}
    media["audio"][:] = 0
    deaf = dict(media, audio_mask=torch.zeros_like(media["audio_mask"]))
    with torch.no_grad():
        difference = model.encode(**media).latents[0] - model.encode(**deaf).latents[0]
    assert difference.abs().max() > 1e-3


def test_left_padding_of_the_prompt_changes_nothing(model, batch):
    ids, mask = (
        batch["decoder_input_ids"][[0, 2, 4], :5],
        torch.ones(3, 5, dtype=torch.long),
    )
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), ids], dim=1)
    padded_mask = torch.cat([torch.zeros(3, 3, dtype=torch.long), mask], dim=1)
    media = {name: batch[name] for name in MEDIA}
    with torch.no_grad():
        plain = model(**media, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        left = model(**media, decoder_input_ids=padded, decoder_attention_mask=padded_mask).logits[:, 3:]
    torch.testing.assert_close(plain, left, **TOLERANCE)


def prompts(batch):
    text = {"decoder_input_ids": batch["decoder_input_ids"][:, :4].clone()}
    text["decoder_attention_mask"] = torch.ones_like(text["decoder_input_ids"])
    text["decoder_input_ids"][1, 0], text["decoder_attention_mask"][1, 0] = (
        0,
        0,
    )  # one left-padded prompt
    return {name: batch[name] for name in MEDIA} | text


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_a_cache_equals_generation_without(model, batch, how):
    settings = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    plain = {name: value for name, value in how.items() if name != "cache_implementation"}
    cached = model.generate(**prompts(batch), **settings, **how)
    uncached = model.generate(**prompts(batch), **settings, use_cache=False, **plain)
    assert torch.equal(cached, uncached)
    assert cached.shape == (6, 4 + 6)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_of_ones_own_gives_what_no_cache_gives(model, batch, name):
    """Token by token, with a cache that forward makes and with one that the caller made."""
    inputs = prompts(batch)
    ids, mask = inputs.pop("decoder_input_ids"), inputs.pop("decoder_attention_mask")
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        for cache in (None, EncoderDecoderCache(DynamicCache(), DynamicCache())):
            for place in range(ids.shape[1]):
                step = model(
                    **inputs, decoder_input_ids=ids[:, place : place + 1],
                    decoder_attention_mask=mask[:, : place + 1], use_cache=True, **{name: cache},
                )  # fmt: skip
                cache = step.past_key_values
                real = mask[:, place].bool()
                torch.testing.assert_close(step.logits[real, 0], whole[real, place], **TOLERANCE)


def test_one_of_two_caches_is_not_ignored(model, batch):
    one, other = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
    assert model(**prompts(batch), past_key_values=one, cache=one).past_key_values is one
    with pytest.raises(UserError, match="past_key_values and cache are two names for one thing"):
        model(**prompts(batch), past_key_values=one, cache=other)


def test_what_is_left_out_is_named(model, batch):
    inputs = prompts(batch)
    encoded = model.encode(**{name: inputs[name] for name in MEDIA})
    with pytest.raises(UserError, match="decoder_input_ids"):
        model.generate(encoder_outputs=encoded)
    with pytest.raises(UserError, match="labels were given without video"):
        model(encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"], labels=batch["labels"])


@pytest.mark.parametrize("missing", MEDIA)
def test_media_that_are_missing_are_named(missing, model, batch):
    inputs = {name: value for name, value in prompts(batch).items() if name != missing}
    with pytest.raises(UserError, match=f"{missing} missing: .* or encoder_outputs"):
        model(**inputs)
    with pytest.raises(UserError, match=f"{missing} missing"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "chunk"), [("video", (4, 3, 64, 64)), ("video", (8, 3, 32, 32)), ("audio", (32, 64)), ("audio", (16, 80))]
)
def test_chunks_of_another_shape_are_refused(name, chunk, model, batch):
    batch[name] = torch.zeros(*batch["chunk_mask"].shape, *chunk)
    shape = ", ".join(map(str, chunk))
    with pytest.raises(UserError, match=rf"{name} of shape \(3, 4, {shape}\): this model takes \[clip, chunk, "):
        model(**batch)


def test_one_encoding_serves_many_prompts(model, batch):
    inputs = prompts(batch)
    encoded = model.encode(**{name: inputs[name] for name in MEDIA})
    text = {name: inputs[name] for name in ("decoder_input_ids", "decoder_attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    assert torch.equal(
        model.generate(**inputs, **settings),
        model.generate(encoder_outputs=encoded, **text, **settings),
    )


def test_rows_must_be_a_multiple_of_clips(model, batch):
    inputs = prompts(batch)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:4]
    inputs["decoder_attention_mask"] = inputs["decoder_attention_mask"][:4]
    with pytest.raises(UserError, match="4 prompts for 3 clips"):
        model.generate(**inputs, max_new_tokens=2)


def test_saved_and_loaded_is_equal(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch)
        for kind in (MirasolForConditionalGeneration, AutoModelForSeq2SeqLM):
            loaded = kind.from_pretrained(tmp_path).eval()
            assert torch.equal(loaded(**batch).logits, expected.logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict().keys() == model.config.to_dict().keys()
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))


def test_gradients_reach_every_parameter(model, batch):
    model.train()
    torch.manual_seed(3)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_batch_without_a_modality_still_gives_every_gradient(model, batch):
    """Ranks of a distributed run would wait for each other otherwise."""
    model.train()
    for absent in ("video_mask", "audio_mask"):
        model.zero_grad()
        model(**dict(batch, **{absent: torch.zeros_like(batch[absent])})).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_one_chunk_is_finite(model, batch):
    model.train()
    one = {name: batch[name][:, :1] if name in MEDIA else batch[name] for name in batch}
    output = model(**one)
    output.loss.backward()
    assert output.loss.isfinite() and output.latent_loss == 0 and output.video_loss == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_evaluation_is_deterministic_and_training_is_not(model, batch):
    with torch.no_grad():
        assert torch.equal(model(**batch).latents, model(**batch).latents)
        model.train()
        assert not torch.equal(model(**batch).latents, model(**batch).latents)


def test_only_target_tokens_carry_the_text_loss(model, batch):
    """Changing the last target changes the loss; changing a label before the targets cannot, it is ignored."""
    with torch.no_grad():
        expected = model(**batch).text_loss
        hidden = model(**batch).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = hidden.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(expected, -picked[labels != -100].mean(), **TOLERANCE)


def test_loss_is_the_weighted_sum(config, batch):
    weighted = MirasolConfig.preset(
        "tiny",
        text={"vocab_size": 40},
        loss_weights={"text": 10.0, "latent": 0.5, "video": 2.0},
    )
    output = MirasolForConditionalGeneration(weighted).eval()(**batch)
    expected = 10 * output.text_loss + 0.5 * output.latent_loss + 2 * output.video_loss
    torch.testing.assert_close(output.loss, expected)


@pytest.fixture
def listener(config):
    """A model that reconstructs the same chunk's video and audio."""
    torch.manual_seed(0)
    settings = {"audio": True, "step": "same"}
    return MirasolForConditionalGeneration(
        MirasolConfig.preset("tiny", text={"vocab_size": 40}, reconstruction=settings, loss_weights={"audio": 3.0})
    ).eval()


def test_audio_reconstruction_has_a_loss_and_a_weight(listener, batch):
    with torch.no_grad():
        output = listener(**batch)
    assert output.audio_reconstruction.shape == batch["audio"].shape
    heard = batch["audio_mask"] & batch["chunk_mask"]
    each = (output.audio_reconstruction - batch["audio"]).square().mean((2, 3))
    torch.testing.assert_close(output.audio_loss, each[heard].mean())
    parts = output.text_loss + output.latent_loss + output.video_loss + 3 * output.audio_loss
    torch.testing.assert_close(output.loss, parts)


def test_reconstruction_of_the_same_chunk_counts_the_first(listener, batch):
    with torch.no_grad():
        output = listener(**batch)
        one = {name: batch[name][:1, :1] for name in MEDIA}
        alone = listener(**one, decoder_input_ids=batch["decoder_input_ids"][:2], labels=batch["labels"][:2])
    seen = batch["video_mask"] & batch["chunk_mask"]
    each = (output.reconstruction - batch["video"]).square().mean((2, 3, 4, 5))
    torch.testing.assert_close(output.video_loss, each[seen].mean())
    torch.testing.assert_close(alone.video_loss, each[0, 0])


def test_missing_audio_is_not_reconstructed(listener, batch):
    """NaN where there is no audio spoils neither the loss nor a gradient; without any audio the loss is zero."""
    with torch.no_grad():
        expected = listener(**batch).audio_loss
    batch["audio"][1] = float("nan")
    listener.train()
    for mask in (batch["audio_mask"], torch.zeros_like(batch["audio_mask"])):
        listener.zero_grad()
        output = listener(**dict(batch, audio_mask=mask))
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in listener.parameters())
    assert output.audio_loss == 0
    with torch.no_grad():
        assert torch.equal(listener.eval()(**batch).audio_loss, expected)


def test_the_latent_target_is_detached(model, batch):
    """The next-latent loss moves the prediction, never the target: x of the last chunk gets no gradient from it."""
    model.train()
    model.config.latent.mask_ratio = 0.0
    seen = []

    def keep(module, inputs, x):
        x.retain_grad()
        seen.append(x)

    hook = model.combiner.register_forward_hook(keep)
    model(**batch).latent_loss.backward()
    hook.remove()
    assert (seen[0].grad[0, -1] == 0).all() and (seen[0].grad[0, 0] != 0).any()


def test_attention_weights_sum_to_one_over_real_chunks(model, batch):
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).cross_attentions
        plain = model(**batch).logits
        eager = model(**batch, output_attentions=True).logits
    torch.testing.assert_close(plain, eager, **TOLERANCE)
    m = model.config.combiner.m
    for weights in attentions:
        assert weights.shape == (6, model.config.text.stack.heads, 7, 4 * m)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights[2:4, ..., 2 * m :] == 0).all()


def test_half_precision_takes_what_the_processor_gives(model, batch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    output = half(**batch)
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    assert torch.equal(half(**cast).logits, output.logits)


def test_pixels_that_are_not_normalised_are_refused(batch):
    with pytest.raises(UserError, match="video of torch.uint8: give the normalised"):
        check_media_type("video", batch["video"].to(torch.uint8))


def test_features_of_another_pass_take_the_place_of_media(batch):
    """Also where they were computed with what a pass then hides: a missing modality has its learned features, whatever
    those of the chunk are."""
    torch.manual_seed(0)
    config = MirasolConfig.preset("tiny", text={"vocab_size": 40}, reconstruction={"audio": True})
    model = MirasolForConditionalGeneration(config).eval()
    everything = torch.ones_like(batch["chunk_mask"])
    with torch.no_grad():
        features = model.compute_features(batch["video"], batch["audio"], everything, everything)
        expected = model(**batch)
        rest = {name: value for name, value in batch.items() if name not in ("video", "audio")}
        found = model(**rest, features=features)
        for name in ("loss", "text_loss", "latent_loss", "video_loss", "audio_loss", "logits", "combined"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
        features.audio = features.audio.flip(-1)
        assert not torch.allclose(model(**rest, features=features).combined, expected.combined, atol=1e-3)
    with pytest.raises(UserError, match="chunk_mask missing"):
        model(decoder_input_ids=batch["decoder_input_ids"], features=features,
              video_mask=everything, audio_mask=everything)  # fmt: skip
    with pytest.raises(UserError, match="video of shape"):
        model.compute_features(batch["video"][:, :, :1], batch["audio"], everything, everything)
