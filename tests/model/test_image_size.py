"""A model moved to another resolution is the same model, its tables of places stretched over the new grid."""

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.config.recipe import ModelRecipe
from mirasol.model.combiner import order_tokens
from mirasol.pretrained.assemble import adapt_config
from mirasol.training.weights.initial import change_config, override_config

TTM = {"read_tokens": 6, "memory_tokens": 5, "learner_hidden": 4, "hidden": 8, "heads": 2, "head_width": 8}
COMBINERS = {
    "both_last": {}, "audio_last": {"token_order": "audio_last"}, "video_last": {"token_order": "video_last"},
    "cls": {"kind": "cls"}, "perceiver": {"kind": "perceiver"}, "ttm": {"kind": "ttm", "ttm": TTM},
    "concat": {"kind": "concat"},
}  # fmt: skip


def make(combiner: dict, image_size: int = 64) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    video = {"learned_positions": True, "image_size": image_size}
    return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", video=video, combiner=combiner)).eval()


def inputs(side: int) -> dict[str, torch.Tensor]:
    there = torch.ones(1, 2, dtype=torch.bool)
    media = {"video": torch.randn(1, 2, 4, 3, side, side), "audio": torch.randn(1, 2, 16, 64)}
    return media | dict.fromkeys(("chunk_mask", "video_mask", "audio_mask"), there)


@pytest.mark.parametrize("side", [96, 40])
@pytest.mark.parametrize("combiner", COMBINERS.values(), ids=COMBINERS)
def test_it_takes_the_new_size_and_is_saved_with_it(combiner, side, tmp_path):
    model, config = make(combiner), MirasolConfig.preset("tiny", video={"image_size": side}, combiner=combiner)
    model.set_image_size(side)
    shapes = {name: value.shape for name, value in make(combiner, side).state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    model.save_pretrained(tmp_path)
    loaded, batch = MirasolForConditionalGeneration.from_pretrained(tmp_path), inputs(side)
    assert loaded.config.combiner == config.combiner
    with torch.no_grad():
        x = model.encode(**batch).combined
        assert x.shape == (1, 2, config.combiner.m, 96) and x.isfinite().all()
        torch.testing.assert_close(loaded.encode(**batch).combined, x)
        with pytest.raises(UserError, match=f"this model takes .*{side}, {side}"):
            loaded.encode(**inputs(64))


@pytest.mark.parametrize("combiner", COMBINERS.values(), ids=COMBINERS)
def test_the_same_size_changes_nothing(combiner):
    model, before = make(combiner), make(combiner).state_dict()
    model.set_image_size(64)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("combiner", COMBINERS.values(), ids=COMBINERS)
def test_every_token_keeps_its_kind_and_place(combiner):
    """Tables that say 1, 2 for the kind of tube and 3 for audio, and the height in the frame (-1 to 1) beside it."""

    def table(config: MirasolConfig) -> torch.Tensor:
        rows = []
        for kind, tube in enumerate(config.video.tubes, start=1):
            t, h, w = tube.grid(config.video.frames_per_chunk, config.video.image_size)
            centres = (torch.arange(h) + 0.5) / h * 2 - 1
            heights = centres[None, :, None].expand(t, h, w).flatten()
            rows.append(torch.stack([torch.full_like(heights, kind), heights], dim=1))
        video, audio = torch.cat(rows), torch.tensor([[3.0, 0.0]]).expand(config.audio.tokens, 2)
        order = config.combiner.token_order if config.combiner.kind == "transformer" else "audio_last"
        return order_tokens(video[None, None], audio[None, None], order, config.combiner.m)[0, 0]

    model = make(combiner)
    # Without a Combiner the latent model has a position for each token.
    places = model.latent if combiner.get("kind") == "concat" else model.combiner
    with torch.no_grad():
        places.token_position[:, :2] = table(model.config)
    model.set_image_size(128)
    found, expected = places.token_position[:, :2].detach(), table(model.config)
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 1], expected[:, 1], atol=0.15, rtol=0)  # bicubic bends at the borders


def test_a_grid_that_is_not_square_is_stretched_along_its_own_axes():
    tubes = [{"kernel": (1, 8, 32), "stride": (4, 8, 32)}]
    video = {"learned_positions": True, "image_size": 32, "tubes": tubes}
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", video=video, combiner={"m": 4}))
    with torch.no_grad():
        # Four rows of one column, each its own number.
        model.chunk_encoder.tubes.learned_position[:] = torch.arange(4.0)[:, None]
    model.set_image_size(64)
    table = model.chunk_encoder.tubes.learned_position.unflatten(0, (8, 2))
    torch.testing.assert_close(table[:, 0], table[:, 1])
    assert (table[1:, 0] > table[:-1, 0]).all()


def test_what_does_not_fit_is_refused_and_changes_nothing():
    for combiner in ({}, {"kind": "concat"}):
        model, most = make(combiner), make({"m": 40})
        with pytest.raises(UserError, match="tube kernel .* does not fit"):
            model.set_image_size(8)
        with pytest.raises(UserError, match="combiner.m=40 exceeds the 21 tokens of a chunk"):
            most.set_image_size(32)
        for untouched in (model, most):
            assert untouched.config.video.image_size == untouched.chunk_encoder.tubes.video.image_size == 64
            with torch.no_grad():
                untouched.encode(**inputs(64))


def test_concat_has_as_many_features_as_a_chunk_has_tokens(tmp_path):
    """However its config is made; another number that is given is refused."""
    video = {"image_size": 64}
    tokens = (config := make({}).config).video.tokens + config.audio.tokens
    for made in (
        MirasolConfig.preset("tiny", video=video, combiner={"kind": "concat"}),
        MirasolConfig(video=video, combiner={"kind": "concat"}),
        adapt_config(MirasolConfig.preset("tiny", combiner={"kind": "concat"}), [{"video": video}], {}),
    ):
        assert made.combiner.m == tokens
        made.save_pretrained(tmp_path)
        assert MirasolConfig.from_pretrained(tmp_path).combiner.m == tokens
    with pytest.raises(UserError, match=f"combiner.m=8 must equal the {tokens} tokens of a chunk for kind=concat"):
        MirasolConfig.preset("tiny", video=video, combiner={"kind": "concat", "m": 8})


def test_a_recipe_moves_concat_to_its_own_size(tmp_path):
    """Both the model of `model.init` and its outline on other processes."""
    make({"kind": "concat"}).save_pretrained(tmp_path)
    config = MirasolConfig.from_pretrained(tmp_path)
    changed = change_config(config, ModelRecipe(init=str(tmp_path), image_size=96))
    assert changed.combiner == make({"kind": "concat"}, 96).config.combiner
    for init, overrides in (
        (config, {"video": {"image_size": 32}}),
        (make({}).config, {"combiner": {"kind": "concat"}}),
    ):
        changed = override_config(init, overrides)
        assert changed.combiner.m == changed.video.tokens + changed.audio.tokens
