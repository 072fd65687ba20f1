"""Stills: read by content, fitted as frames of video are, bad ones refused with a reason."""

import io
import re
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mirasol.data.clip_cache import ClipCache
from mirasol.data.media_files import is_image
from mirasol.errors import BadClip, UserError
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.image import read_image
from mirasol.media.limits import Limits


def encoded(pixels: np.ndarray, codec: str = "png", pixel_format: str = "rgb24") -> bytes:
    """The picture, uint8 [height, width, 3], as a PNG or JPEG file."""
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt = *pixels.shape[:2], pixel_format
    context.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


@pytest.fixture
def pixels() -> np.ndarray:
    """Left half red, right half blue, 40 wide and 20 high."""
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20, 0] = 250
    picture[:, 20:, 2] = 250
    return picture


@pytest.mark.parametrize(("codec", "pixel_format"), [("png", "rgb24"), ("png", "gray"), ("mjpeg", "yuvj420p")])
def test_a_picture_is_fitted_into_a_square(pixels, tmp_path, codec, pixel_format):
    file = tmp_path / "a.png"  # whatever the name says
    file.write_bytes(encoded(pixels, codec, pixel_format))
    square = read_image(file, image_size=20, fit="pad")
    assert square.shape == (3, 20, 20)
    assert square.dtype == np.uint8
    assert not square[:, :4].any()
    assert not square[:, -4:].any()
    if pixel_format != "gray":
        assert square[0, 10, 4] > 200 > 60 > square[2, 10, 4]
        assert square[2, 10, 15] > 200 > 60 > square[0, 10, 15]
    assert read_image(file, image_size=20, fit="stretch")[:, 0].any()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html><body>404</body></html>", "an HTML page"),
        (b"\x89PNG\r\n\x1a\n and no more", "not an image that can be read|contains no picture"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadClip) as refused:
        read_image(tmp_path / "a.jpg", image_size=8)
    assert re.match(reason, refused.value.reason)


def test_a_missing_file_a_large_picture_and_an_unknown_fit_are_refused(pixels, tmp_path):
    with pytest.raises(BadClip, match="no such file"):
        read_image(tmp_path / "none.png", image_size=8)
    (tmp_path / "a.png").write_bytes(encoded(pixels))
    with pytest.raises(BadClip, match=r"a\.png: pictures of 40x20 exceed the limit of 799 pixels"):
        read_image(tmp_path / "a.png", image_size=8, limits=Limits(max_pixels=799))
    with pytest.raises(UserError, match="fit='squeeze'"):
        read_image(tmp_path / "a.png", image_size=8, fit="squeeze")


def test_a_picture_cut_short_is_refused(pixels, tmp_path):
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    content = encoded(noisy)
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadClip):
        read_image(tmp_path / "a.png", image_size=8)


def test_the_cache_keeps_pictures_of_folders_and_tars_and_a_batch_is_normalised_like_video(pixels, tmp_path):
    content = encoded(pixels)
    (tmp_path / "a.png").write_bytes(content)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    extractor = MirasolFeatureExtractor()
    cache = ClipCache(tmp_path / "cache", tmp_path, extractor.media.to_dict())
    assert not cache.fill([("a.png", None, None), ("00000.tar/0.png", None, None)])
    one, other = cache.load("a.png"), cache.load("00000.tar/0.png")
    assert list(one) == ["image"]
    assert torch.equal(one["image"], other["image"])
    batch = extractor.collate([one, other])
    assert list(batch) == ["images"]
    assert batch["images"].shape == (2, 3, 32, 32)
    assert torch.equal(extractor.pixels(batch["images"][0]), one["image"])


def test_names_of_stills():
    assert is_image("a/B.JPG")
    assert is_image("0.tar/1.webp")
    assert not is_image("a.mp4")
    assert not is_image(str(Path("a.png") / "b.mp4"))
