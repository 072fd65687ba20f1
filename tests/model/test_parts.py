"""Properties of the parts: tubes and their positions, token order, the last m outputs, masks, bad configs."""

import jaxtyping
import pytest
import torch

from mirasol import MirasolConfig, UserError
from mirasol.config.parts import StackConfig, TubeConfig, VideoConfig
from mirasol.model import losses, transformer, tubes
from mirasol.model.combiner import TransformerCombiner, order_tokens
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.model.masks import BlockCausal

NAN = float("nan")
PAPER_TUBES = [
    TubeConfig((1, 14, 14), (8, 14, 14)),
    TubeConfig((8, 4, 4), (8, 32, 32), (0, 8, 8)),
    TubeConfig((4, 4, 4), (4, 32, 32), (0, 16, 16)),
]


@pytest.mark.parametrize(("size", "counts"), [(224, [256, 49, 98]), (448, [1024, 196, 392])])
def test_tube_counts_come_from_the_convolution(size, counts):
    video = VideoConfig(size, 8, PAPER_TUBES)
    assert video.tokens == sum(counts)
    for tube, count in zip(video.tubes, counts, strict=True):
        with torch.device("meta"):
            convolution = torch.nn.Conv3d(3, 8, tube.kernel, tube.stride)
            t, y, x = tube.offset
            output = convolution(torch.empty(1, 3, 8, size, size)[:, :, t:, y:, x:])
        assert output.shape[2:].numel() == count == len(tubes.tube_centres(tube, video))


def test_tubes_see_exactly_the_pixels_around_their_centre():
    """Lighting one pixel changes only tokens whose tube holds it, and those tokens' centres lie within the tube."""
    tube = TubeConfig((2, 4, 4), (2, 8, 8), (0, 2, 2))
    video = VideoConfig(16, 4, [tube])
    module = tubes.VideoTubes(video, 12)
    torch.nn.init.normal_(module.projections[0].weight)
    dark, lit = torch.zeros(1, 4, 3, 16, 16), torch.zeros(1, 4, 3, 16, 16)
    lit[0, 3, :, 11, 4] = 1.0
    changed = (module(lit) - module(dark)).abs().sum(-1)[0] > 0
    centres = tubes.tube_centres(tube, video)
    inside = ((centres - torch.tensor([3.0, 11.0, 4.0])).abs() <= torch.tensor([0.5, 1.5, 1.5])).all(-1)
    assert changed.sum() == 1 and torch.equal(changed, inside)


@pytest.mark.parametrize("size", [224, 448])
def test_position_codes_are_distinct_for_every_token(size):
    """Video tokens of the paper's tubes, by their centres."""
    video = VideoConfig(size, 8, PAPER_TUBES)
    codes = torch.cat([tubes.centre_code(tubes.tube_centres(tube, video), 1280) for tube in PAPER_TUBES])
    assert len(codes.unique(dim=0)) == video.tokens


def distance_to_the_nearest_other(codes):
    return (torch.cdist(codes, codes) + torch.eye(len(codes)) * 1e6).min()


def test_position_codes_of_tiny_are_distinct_for_every_token():
    """Video tokens and audio tokens of a chunk, all tokens of 64 chunks in the Combiner and in the latent model."""
    config = MirasolConfig.preset("tiny")
    model = MirasolForConditionalGeneration(config)
    assert distance_to_the_nearest_other(model.chunk_encoder.tubes.positions()) > 1
    assert distance_to_the_nearest_other(model.chunk_encoder.patches.position) > 1e-2
    assert distance_to_the_nearest_other(model.combiner.positions(64).flatten(0, 1)) > 1e-2
    chunk = transformer.sinusoid(torch.arange(64), config.latent.stack.width)
    assert distance_to_the_nearest_other((chunk[:, None] + model.latent.token_position).flatten(0, 1)) > 1e-2


def test_both_last_puts_half_of_each_modality_at_the_end():
    video, audio = torch.zeros(1, 1, 20, 1), torch.ones(1, 1, 8, 1)
    assert order_tokens(video, audio, "both_last", 8)[0, 0, -8:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    assert order_tokens(video, audio, "audio_last", 8)[0, 0, -8:, 0].tolist() == [1.0] * 8
    assert order_tokens(video, audio, "video_last", 8)[0, 0, -8:, 0].tolist() == [0.0] * 8
    few = torch.ones(1, 1, 2, 1)
    assert order_tokens(video, few, "both_last", 8)[0, 0, -8:, 0].tolist() == [0.0] * 6 + [1.0] * 2


def test_no_order_loses_a_token():
    video, audio = (
        torch.arange(20.0).view(1, 1, 20, 1),
        torch.arange(20.0, 28.0).view(1, 1, 8, 1),
    )
    for order in ("both_last", "audio_last", "video_last"):
        assert sorted(order_tokens(video, audio, order, 8).flatten().tolist()) == list(map(float, range(28)))


def test_one_pass_equals_step_by_step():
    """For every t: the Combiner run on f_1..f_t alone, keeping the last m outputs, gives the one-pass x_t."""
    config = MirasolConfig.preset("tiny")
    model = TransformerCombiner(config).eval()
    torch.nn.init.normal_(model.token_position)
    video, audio = torch.randn(2, 5, 13, 96), torch.randn(2, 5, 8, 96)
    with torch.no_grad():
        whole = model(video, audio)
        for t in range(1, 6):
            torch.testing.assert_close(
                model(video[:, :t], audio[:, :t])[:, -1],
                whole[:, t - 1],
                atol=1e-5,
                rtol=1e-4,
            )


def test_the_last_outputs_alone_equal_all_outputs_cut():
    """The last block computes only what is read; the result is that of computing everything."""
    stack = transformer.Stack(StackConfig(2, 16, 32, 2, 8)).eval()
    x, mask = torch.randn(2, 12, 16), BlockCausal(3, 4, 4)
    with torch.no_grad():
        every = stack(x, mask)
        torch.testing.assert_close(stack(x, mask, last=2), every[:, torch.tensor([2, 3, 6, 7, 10, 11])])
        torch.testing.assert_close(stack(x, last=5), stack(x)[:, -5:])


def test_gated_feed_forward_has_a_gate():
    """128 x 2^20 weights at the paper's size of a gated stack without biases (facts, section 5)."""
    with torch.device("meta"):
        stack = transformer.Stack(StackConfig(8, 1024, 4096, 16, 64, gated=True, bias=False))
    weights = sum(p.numel() for n, p in stack.named_parameters() if "norm" not in n)
    assert weights == 128 * 2**20


def test_losses_of_nothing_are_zero():
    x = torch.randn(2, 1, 4, 8)
    there = torch.ones(2, 1, dtype=torch.bool)
    for target in ("plain", "centred"):
        assert losses.latent_loss(x, x, there, there, there, "cosine", target) == 0
    assert losses.text_loss(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), torch.nn.Linear(8, 10), 10) == 0


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_a_perfect_prediction_has_no_latent_loss(distance):
    x = torch.randn(2, 3, 4, 8)
    predicted = torch.cat([x[:, 1:], torch.randn(2, 1, 4, 8)], dim=1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    good, bad = (losses.latent_loss(guess, x, mask, mask, mask, distance, "plain") for guess in (predicted, x))
    assert good < 1e-6 < bad


def test_reconstruction_patches_land_where_they_belong():
    """Each query's pixels fill its own (time, y, x) cell of the chunk and no other."""
    config = MirasolConfig.preset("tiny", reconstruction={"image_size": 16, "patch": (2, 8, 8)})
    model = MirasolForConditionalGeneration(config).reconstruction
    ramp = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 3 * 2 * 8 * 8)
    video = model.video(ramp)
    assert video.shape == (1, 1, 4, 3, 16, 16)
    assert (video[0, 0, :2, :, :8, 8:] == 1).all() and (video[0, 0, 2:, :, 8:, :8] == 6).all()


def test_patches_of_a_target_make_up_the_target_again():
    """Folding and unfolding are inverse, so a predicted patch is compared with its own place of the target."""
    config = MirasolConfig.preset("tiny", reconstruction={"patch": (2, 8, 4), "audio": True})
    model = MirasolForConditionalGeneration(config).reconstruction
    video, audio = torch.randn(2, 3, 4, 3, 32, 32), torch.randn(2, 3, 16, 64)
    assert torch.equal(model.video(model.video_target(video)), video)
    assert torch.equal(model.audio(model.audio_target(audio)), audio)
    # The encoder's own patches, in its order.
    patches = tubes.AudioPatches(config.audio, 96)
    patches.projection, patches.position = torch.nn.Identity(), torch.nn.Parameter(torch.zeros(()))
    assert torch.equal(model.audio_target(audio)[1], patches(audio[1]))


def test_a_smaller_target_is_the_average_of_frames_and_pixels():
    config = MirasolConfig.preset("tiny", reconstruction={"image_size": 16, "frames": 2, "patch": (1, 8, 8)})
    model = MirasolForConditionalGeneration(config).reconstruction
    video = torch.randn(1, 2, 4, 3, 32, 32)
    small = model.video(model.video_target(video))
    assert small.shape == (1, 2, 2, 3, 16, 16)
    torch.testing.assert_close(small[0, 1, 1, 2, 3, 5], video[0, 1, 2:, 2, 6:8, 10:12].mean())


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("step", ["next", "same"])
def test_a_perfect_reconstruction_has_no_loss(distance, step):
    """And what a chunk without the modality holds, or the last chunk predicts of the next, does not count."""
    target, mask = torch.randn(2, 3, 5, 8), torch.ones(2, 3, dtype=torch.bool)
    predicted = target.roll(-1, dims=1) if step == "next" else target.clone()
    other = "same" if step == "next" else "next"
    if step == "next":
        predicted[:, -1] = 100.0
    assert losses.reconstruction_loss(predicted, target, mask, distance, step).abs() < 1e-6
    assert losses.reconstruction_loss(predicted, target, mask, distance, other) > 0.1
    mask[1, 2], target[1, 2] = False, 100.0
    assert losses.reconstruction_loss(predicted, target, mask, distance, step).abs() < 1e-6
    assert losses.reconstruction_loss(predicted, target, torch.zeros_like(mask), distance, step) == 0


def test_cosine_is_taken_patch_by_patch():
    """A patch's contrast is free, patch for patch; one common scale for all patches would not do."""
    target, mask = torch.randn(1, 1, 4, 8), torch.ones(1, 1, dtype=torch.bool)
    scaled = target * torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None]
    assert losses.reconstruction_loss(scaled, target, mask, "cosine", "same").abs() < 1e-6
    scaled[0, 0, 0] *= -1
    torch.testing.assert_close(losses.reconstruction_loss(scaled, target, mask, "cosine", "same"), torch.tensor(0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"combiner": {"m": 64}}, "combiner.m=64 exceeds the 21 tokens"),
        ({"combiner": {"m": 7}}, "combiner.m=7 must be even"),
        (
            {"video": {"frames_per_chunk": 2}},
            "tube kernel .* does not fit a chunk of 2 frames",
        ),
        (
            {"latent": {"stack": {"width": 64}}},
            "latent.stack.width=64 must equal combiner.stack.width=96",
        ),
        ({"audio": {"num_mel_bins": 60}}, "must divide the spectrogram"),
        ({"text": {"cross_attention_every": 9}}, "cross_attention_every=9"),
        ({"combinr": {}}, "unknown part 'combinr': did you mean 'combiner'"),
        ({"combiner": {"mm": 3}}, "unknown key 'mm' in CombinerConfig"),
        ({"combiner": {"stack": {"dpth": 3}}}, "combiner.stack: unknown key 'dpth' .* did you mean 'depth'"),
        ({"vit": {"heads": 5}}, "vit.heads=5 must divide vit.width=96"),
        ({"text": {"stack": {"heads": 7}}}, "text.stack.heads=7 must divide text.stack.width=96"),
        ({"audio": {"adapter": {"heads": 5}}}, "audio.adapter.heads=5 must divide audio.adapter.width=96"),
        ({"text": {"stack": {"width": 33}}}, "text.stack.width=33 must be even"),
        ({"vit": {"width": 2, "heads": 1}}, "vit.width=2 must be at least 6"),
        ({"reconstruction": {"stack": {"width": 48}}}, "reconstruction.stack.width=48 must equal combiner.*=96"),
        (
            {"audio": {"shared_projection": True, "adapter": {"width": 48}}},
            "audio.adapter.width=48 must equal combiner.stack.width=96 with audio.shared_projection",
        ),
        ({"reconstruction": {"patch": (3, 8, 8)}}, r"reconstruction.patch=\(3, 8, 8\) must .*frames_per_chunk=4"),
        ({"reconstruction": {"patch": (4, 7, 8)}}, r"reconstruction.patch=\(4, 7, 8\) must .*image_size=32"),
        ({"reconstruction": {"frames": 3, "patch": (1, 8, 8)}}, "reconstruction.frames=3 must divide video.*chunk=4"),
        ({"reconstruction": {"frames": 2}}, r"reconstruction.patch=\(4, 8, 8\) must divide reconstruction.frames=2"),
        ({"reconstruction": {"frames": 0}}, "reconstruction.frames=0 must be at least 1"),
        ({"reconstruction": {"step": "last"}}, "reconstruction.step='last': choose one of next, same"),
        ({"reconstruction": {"distance": "l1"}}, "reconstruction.distance='l1': choose one of mse, cosine"),
        ({"reconstruction": {"patch": (4, 8)}}, r"reconstruction.patch=\(4, 8\) must be 3 whole numbers"),
        ({"video": {"image_size": 0}}, "video.image_size=0 must be at least 1"),
        ({"video": {"tubes": []}}, r"video.tubes=\[\]: give at least one tube"),
        ({"video": {"tubes": [{"kernel": (1, 8, 8)}]}}, r"video.tubes\[0\].stride is missing"),
        (
            {"video": {"tubes": [{"kernel": (1, 8, 8), "stride": (1, 0, 8)}]}},
            r"video.tubes\[0\].stride=\(1, 0, 8\) must not contain a number below 1",
        ),
        ({"audio": {"patch": (0, 8)}}, r"audio.patch=\(0, 8\) must not contain a number below 1"),
        (
            {"video": {"tubes": [{"kernal": (1, 8, 8)}]}},
            r"video.tubes\[0\]: unknown key 'kernal' in TubeConfig: did you mean 'kernel'",
        ),
        ({"vit": None}, "vit=None: only the part contrastive may be missing"),
        ({"vit": 3}, "vit=3 must be a mapping with the fields of ViTConfig"),
        ({"vit": {"depth": "3"}}, "vit.depth='3' must be of type int"),
        ({"chunking": {"image_std": 0}}, "chunking.image_std=0 must be positive"),
        ({"chunking": {"image_std": [0.2, 0.0, 0.2]}}, r"chunking.image_std=\(0.2, 0.0, 0.2\) must be positive"),
        ({"chunking": {"image_mean": [0.2, 0.2]}}, r"chunking.image_mean=\[0.2, 0.2\] must be a number, or three"),
        ({"chunking": {"image_mean": "grey"}}, "chunking.image_mean='grey' must be a number, or three"),
        ({"vit": {"activation": "relu"}}, "vit.activation='relu': choose one of gelu, gelu_tanh, quick_gelu"),
        ({"vit": {"norm_eps": 0.0}}, "vit.norm_eps=0.0 must be in"),
        ({"vit": {"class_token": 1}}, "vit.class_token=1 must be of type bool"),
        ({"audio": {"backbone": "own"}}, "audio.backbone='own': choose one of shared, separate"),
        (
            {"video": {"learned_positions": True, "tubes": [{"kernel": (4, 8, 8), "stride": (4, 8, 8)}]}},
            "video.learned_positions needs one tube whose kernel is 1 frame long, tubes has 0",
        ),
        (
            {"text": {"cross_attention_every": 2, "cross_attention_first": 3}},
            "text.cross_attention_first=3 must be between 1 and cross_attention_every=2",
        ),
        ({"combiner": {"m": 0}}, "combiner.m=0 must be at least 1"),
        ({"combiner": {"m": "8"}}, "combiner.m='8' must be of type int"),
        ({"combiner": {"m": 8.5}}, "combiner.m=8.5 must be of type int"),
        ({"combiner": {"stack": {"gated": 1}}}, "combiner.stack.gated=1 must be of type bool"),
        ({"combiner": {"kind": "cat"}}, "combiner.kind='cat': choose one of transformer, cls"),
        ({"combiner": {"scope": "all"}}, "combiner.scope='all': choose one of past, chunk"),
        ({"combiner": {"kind": "ttm", "scope": "chunk"}}, "combiner.scope='chunk' contradicts combiner.kind='ttm'"),
        ({"combiner": {"kind": "ttm", "ttm": {"heads": 0}}}, "combiner.ttm.heads=0 must be at least 1"),
        ({"combiner": {"kind": "concat", "m": 8}}, "combiner.m=8 must equal the 21 tokens of a chunk for kind=concat"),
        ({"combiner": {"stack": 3}}, "combiner.stack=3 must be a mapping with the fields of StackConfig"),
        ({"latent": {"distance": "far"}}, "latent.distance='far': choose one of cosine, mse"),
        ({"latent": {"mask_ratio": 1}}, "latent.mask_ratio=1 must be in"),
        ({"vit": {"dropout": -0.1}}, "vit.dropout=-0.1 must be in"),
        ({"vit": {"depth": 0}}, "vit.depth=0 must be at least 1"),
        ({"text": {"vocab_size": 3}}, "sep_token_id=3 must be a whole number from 0 to below text.vocab_size=3"),
        ({"chunking": {"chunk_seconds": 0.0}}, "chunking.chunk_seconds=0.0 must be positive"),
        ({"chunking": {"chunk_seconds": NAN}}, "chunking.chunk_seconds=nan must be positive and finite"),
        ({"chunking": {"image_mean": NAN}}, "chunking.image_mean=nan must be finite"),
        ({"contrastive": {"width": 8, "bias": NAN}}, "contrastive.bias=nan must be finite"),
        ({"video": {"tubes": 5}}, "video.tubes=5 must be a list of tubes"),
        ({"chunking": {"fit": "squeeze"}}, "chunking.fit='squeeze': choose one of pad, crop, stretch"),
        ({"loss_weights": {"video": -1.0}}, "loss_weights.video=-1.0 must be at least 0"),
        (
            {"chunking": {"num_chunks": 4}},
            "exactly one of chunk_seconds and num_chunks",
        ),
    ],
)
def test_impossible_configs_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        MirasolConfig.preset("tiny", **change)


@pytest.mark.parametrize("value", [-1, None, 512, "1"])
def test_special_tokens_are_ids_of_the_vocabulary(value):
    with pytest.raises(UserError, match=f"pad_token_id={value!r} must be a whole number .* text.vocab_size=512"):
        MirasolConfig(pad_token_id=value)


def test_the_perceivers_norms_are_those_of_its_stack():
    combiner = {"kind": "perceiver", "stack": {"norm_eps": 1e-3}}
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", combiner=combiner))
    assert {layer.eps for layer in model.combiner.modules() if isinstance(layer, torch.nn.LayerNorm)} == {1e-3}


def test_a_partial_mapping_lies_over_the_tiny_preset():
    config = MirasolConfig(chunking={"max_chunks": 32})
    assert config.chunking.chunk_seconds == MirasolConfig.preset("tiny").chunking.chunk_seconds
    assert config.chunking.max_chunks == 32


def test_config_round_trip(tmp_path):
    config = MirasolConfig.preset("tiny", loss_weights={"text": 10.0})
    config.save_pretrained(tmp_path)
    loaded = MirasolConfig.from_pretrained(tmp_path)
    assert loaded.loss_weights == config.loss_weights and loaded.video == config.video and loaded.text == config.text


def test_shapes_are_as_annotated():
    """The suite runs with jaxtyping's import hook (see pyproject.toml): a wrong shape at a boundary is an error."""
    model = TransformerCombiner(MirasolConfig.preset("tiny"))
    with pytest.raises(jaxtyping.TypeCheckError):
        model(torch.zeros(2, 3, 13, 96), torch.zeros(2, 4, 8, 96))
