"""An image is a clip of one frame: what the chunk encoder makes of single images."""

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.errors import UserError
from mirasol.model.encoder import ChunkEncoder
from mirasol.model.tubes import VideoTubes


def make_encoder(**video) -> ChunkEncoder:
    torch.manual_seed(0)
    encoder = ChunkEncoder(MirasolConfig.preset("tiny", video=video)).eval()
    torch.nn.init.normal_(encoder.missing_video)
    torch.nn.init.normal_(encoder.missing_audio)
    return encoder


def flat_tube(side: int) -> dict:
    return {"kernel": (1, side, side), "stride": (4, side, side)}


def test_an_image_reads_like_the_video_of_2d_patches_whose_first_frame_it_is():
    encoder = make_encoder(tubes=[flat_tube(16), flat_tube(8)])
    images = torch.randn(3, 3, 32, 32)
    video = torch.randn(3, 1, 4, 3, 32, 32)
    video[:, 0, 0] = images
    present = torch.ones(3, 1, dtype=torch.bool)
    with torch.no_grad():
        seen, _ = encoder(video, torch.zeros(3, 1, 16, 64), present, present)
        features = encoder.image(images, project=True)
    torch.testing.assert_close(features, seen[:, 0])


def test_tubes_of_several_frames_stay_out_of_an_image():
    encoder = make_encoder()
    with torch.no_grad():
        features = encoder.image(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 4, 96)


def test_images_do_not_see_each_other():
    encoder, images = make_encoder(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = encoder.image(images), [encoder.image(image[None]) for image in images]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_config_without_2d_patches_and_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"video.tubes=\(4, 16, 16\): images need a tube whose kernel is 1 frame long"):
        make_encoder(tubes=[{"kernel": (4, 16, 16), "stride": (4, 8, 8)}]).image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match=r"images of 48 x 32 pixels: this model takes video.image_size=32"):
        make_encoder().image(torch.zeros(1, 3, 48, 32))


def test_learned_positions_begin_alone_and_take_in_the_fixed_code_as_the_gate_opens():
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", video={"learned_positions": True}))
    tubes, fixed = model.chunk_encoder.tubes, VideoTubes(MirasolConfig.preset("tiny").video, 96).positions()
    assert tubes.position_gate.item() == 0 and tubes.learned_position.std() > 0
    patches = tubes.learned_position.shape[0]
    assert torch.equal(tubes.positions()[-patches:], tubes.learned_position)
    assert torch.equal(tubes.positions()[:-patches], fixed[:-patches])
    with torch.no_grad():
        tubes.position_gate.fill_(2.0)
    torch.testing.assert_close(tubes.positions()[-patches:], tubes.learned_position + 2 * fixed[-patches:])
    assert torch.equal(tubes.positions()[:-patches], fixed[:-patches])


def test_learned_positions_are_those_of_a_place_in_every_frame():
    tube = {"kernel": (1, 16, 16), "stride": (2, 16, 16)}
    config = MirasolConfig.preset("tiny", video={"learned_positions": True, "tubes": [tube]})
    tubes = MirasolForConditionalGeneration(config).chunk_encoder.tubes
    first, second = tubes.positions().chunk(2)
    assert torch.equal(first, second) and torch.equal(first, tubes.learned_position)


def test_separate_audio_never_meets_the_vit(config, batch):
    config = MirasolConfig.preset("tiny", audio={"backbone": "separate"})
    encoder = MirasolForConditionalGeneration(config).eval().chunk_encoder
    media = [batch[name] for name in ("video", "audio", "video_mask", "audio_mask")]
    with torch.no_grad():
        video, audio = encoder(*media)
        for parameter in encoder.vit.parameters():
            parameter.add_(0.1)
        video_after, audio_after = encoder(*media)
    assert torch.equal(audio, audio_after) and not torch.allclose(video, video_after)


def test_text_beyond_the_learned_positions_is_refused(batch):
    text = {"vocab_size": 40, "learned_positions": True, "max_length": 6}
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", text=text)).eval()
    with pytest.raises(UserError, match="text of 7 tokens: the model has text.max_length=6 positions"):
        model(**batch)
