"""`latent.kind: none`: features go straight to the text decoder, and what they skip is absent, not silent."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.cost.counting import count_flops
from mirasol.model.transformer import sinusoid
from mirasol.training.build import check_loss_weights

MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
KINDS = {"direct": {"kind": "concat"}, "only the Combiner": {}}


@pytest.fixture(params=KINDS)
def model(request) -> MirasolForConditionalGeneration:
    """With every feature of a chunk, and with a Combiner before."""
    config = MirasolConfig.preset(
        "tiny", combiner=KINDS[request.param], latent={"kind": "none"}, text={"vocab_size": 40}
    )
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(config).eval()


def media(batch, chunks=slice(None), clips=slice(None)):
    return {name: batch[name][clips, chunks] for name in MEDIA}


def cut(batch, clip):
    """A clip of the batch without its padding chunks, and its two prompts."""
    text = {name: value[2 * clip : 2 * clip + 2] for name, value in batch.items() if name not in MEDIA}
    return media(batch, slice(int(batch["chunk_mask"][clip].sum())), slice(clip, clip + 1)) | text


@torch.no_grad()
def test_the_decoder_attends_to_the_features_of_every_chunk_each_from_its_chunk_alone(batch):
    config = MirasolConfig.preset("tiny", combiner={"kind": "concat"}, latent={"kind": "none"})
    direct = MirasolForConditionalGeneration(config).eval()
    encoded = direct.encode(**media(batch))
    given = (batch[name] for name in ("video", "audio", "video_mask", "audio_mask"))
    features = torch.cat(direct.chunk_encoder(*given), 2)
    assert torch.equal(encoded.combined, features) and encoded.latents.shape == features.shape
    assert encoded.latent_mask.sum(1).tolist() == [4 * 21, 2 * 21, 3 * 21]
    chunk_codes = sinusoid(torch.arange(4), 96)[:, None]
    plain = direct.latent.norm(features + direct.latent.token_position + chunk_codes)
    torch.testing.assert_close(encoded.latents, plain, **TOLERANCE)
    other = {name: value.clone() for name, value in media(batch).items()}
    other["audio"][:, 1] += 1.0
    change = (direct.encode(**other).latents - encoded.latents).abs().amax(dim=(0, 2, 3))
    assert (change > 0).tolist() == [False, True, False, False]


@torch.no_grad()
def test_equal_chunks_are_told_apart_by_their_place(model, batch):
    first = {name: value[:1, :1].expand(1, 5, *value.shape[2:]) for name, value in media(batch).items()}
    latents = model.encode(**first).latents[0]
    distances = torch.cdist(latents.flatten(1), latents.flatten(1))
    assert distances[~torch.eye(5, dtype=torch.bool)].min() > 1


@torch.no_grad()
def test_batch_equals_single(model, batch):
    together = model(**batch)
    for clip in range(3):
        part = cut(batch, clip)
        alone, real = model(**part), part["decoder_attention_mask"].bool()
        torch.testing.assert_close(together.latents[clip, : alone.latents.shape[1]], alone.latents[0], **TOLERANCE)
        torch.testing.assert_close(together.logits[2 * clip : 2 * clip + 2][real], alone.logits[real], **TOLERANCE)


def test_generation_with_a_cache_equals_generation_without(model, batch):
    given = media(batch) | {"decoder_input_ids": batch["decoder_input_ids"][:, :4]}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given, **settings), model.generate(**given, **settings, use_cache=False))


@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_a_stream_is_the_pass_over_all_so_far_and_keeps_no_state_for_it(model, batch, window):
    stream, first = model.stream(1, window), media(batch, clips=slice(0, 1))
    for t in range(4):
        stream.append(*(first[name][:, t] for name in ("video", "audio", "video_mask", "audio_mask")))
        whole = model.encode(**{name: value[:, : t + 1] for name, value in first.items()})
        kept = min(t + 1, window or 4)
        found = stream.encoder_outputs.latents
        assert found.shape[1] == kept and stream.state_bytes["latent"] == 0
        if window is None or model.config.combiner.kind == "concat":  # a Combiner's own window changes its features
            torch.testing.assert_close(found, whole.latents[:, -kept:], **TOLERANCE)


@torch.no_grad()
def test_saved_and_loaded_is_equal(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert loaded.config.latent.kind == "none" and loaded.num_params() == model.num_params()
    for name, value in model(**batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, loaded(**batch)[name])


def test_there_is_no_latent_loss_and_everything_else_learns(model, batch):
    model.config.loss_weights = dataclasses.replace(model.config.loss_weights, latent=5.0, video=2.0)
    model.train()
    output = model(**batch)
    assert output.latent_loss is None and "latent_loss" not in output
    torch.testing.assert_close(output.loss, output.text_loss + 2 * output.video_loss)
    output.loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


def test_it_has_no_layers_and_costs_nothing(model):
    whole = MirasolConfig.preset("tiny", combiner=KINDS["direct"], text={"vocab_size": 40})
    assert model.num_params()["latent"] == sum(p.numel() for p in model.latent.parameters()) < 3_000
    assert count_flops(model.config, 4, 8)["latent"] == 0 < count_flops(whole, 4, 8)["latent"]


def test_frames_of_another_size_move_the_codes_of_places(batch):
    config = MirasolConfig.preset("tiny", combiner={"kind": "concat"}, latent={"kind": "none"})
    direct = MirasolForConditionalGeneration(config).eval()
    direct.set_image_size(48)
    assert direct.latent.token_position.shape[0] == direct.config.combiner.m == direct.config.count_tokens() > 21
    large = media(batch) | {"video": torch.rand(3, 4, 4, 3, 48, 48)}
    assert direct.encode(**large).latents.shape[2] == direct.config.combiner.m


def test_what_has_no_effect_is_refused_in_one_line(model, values):
    with pytest.raises(UserError, match="latent.window=3 needs a latent model that looks back, not kind='none'"):
        MirasolConfig.preset("tiny", latent={"kind": "none", "window": 3})
    with pytest.raises(UserError, match="latent.kind='nome': choose one of transformer, none"):
        MirasolConfig.preset("tiny", latent={"kind": "nome"})
    values["stages"] = {"silent": {"steps": 1}}
    with pytest.raises(UserError, match=r"stages.silent.loss_weights.latent=1.0: .*: set it to 0"):
        check_loss_weights(recipe_from_dict(values), model.config)
    values["stages"]["silent"]["loss_weights"] = {"latent": 0.0}
    check_loss_weights(recipe_from_dict(values), model.config)
