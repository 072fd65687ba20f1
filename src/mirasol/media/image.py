"""Image file → one square picture, decoded as a video's frames are, with the same limits."""

import os

import av
import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from mirasol.config.media import FITS
from mirasol.errors import BadClip, UserError
from mirasol.media.formats.content import PAGE, detect_content_kind
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.video import composite_on_black, draw_square, read_orientation

# By what a file begins with, never by its name: the demuxers that read one file and open no others.
_FORMATS = {b"\xff\xd8\xff": "jpeg_pipe", b"\x89PNG\r\n\x1a\n": "png_pipe", b"GIF8": "gif", b"BM": "bmp_pipe"}


def read_image(
    path: str | os.PathLike, *, image_size: int, fit: str = "pad", limits: Limits = DEFAULT_LIMITS
) -> UInt8[np.ndarray, "3 height width"]:
    """Reads a JPEG, PNG, WebP, GIF or BMP file as RGB in a square of `image_size` pixels.

    Turned as its EXIF data says. Of an animation the first picture is read. Transparent parts are black. The shape of
    pixels is ignored, as images state it wrongly more often than not. `fit` and `limits` as for video.

    Raises:
        BadClip: the file cannot be used, or its picture is over the limit.
        UserError: a setting is impossible.
    """
    if fit not in FITS:
        raise UserError(f"fit={fit!r}: choose {', '.join(FITS)}")
    frame = _decode_first_picture(path, limits)
    turn, _ = read_orientation(frame)
    square = np.zeros((3, image_size, image_size), np.uint8)
    draw_square(composite_on_black(frame), square, turn, fit, path, VideoReformatter())
    return square


def check_image(path: str | os.PathLike, kind: str) -> None:
    """Decodes the first picture of an image file of this kind (`detect_content_kind`).

    Raises:
        BadClip: it cannot be decoded, or is of another kind than JPEG, PNG or WebP.
    """
    if kind not in ("jpeg", "png", "webp"):
        raise BadClip(path, f"holds {kind or 'nothing known'}, not a jpeg, png or webp image")
    try:
        with av.open(f"file:{os.fspath(path)}", format=f"{kind}_pipe") as container:
            next(container.decode(video=0))
    except (av.error.FFmpegError, OSError, IndexError, StopIteration) as error:
        raise BadClip(path, "the image cannot be decoded") from error


def _decode_first_picture(path: str | os.PathLike, limits: Limits) -> VideoFrame:
    limits.check_bytes(path, _check_size(path))
    options = {"protocol_whitelist": "file"}
    try:
        with av.open(f"file:{os.fspath(path)}", format=_find_format(path), container_options=options) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            limits.check_pixels(path, codec.width, codec.height)
            codec.options = {"max_pixels": str(limits.max_pixels)}
            codec.thread_count = 1
            frame = next(container.decode(stream), None)
    except BadClip:
        raise  # is a ValueError that has its reason already
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise BadClip(path, f"not an image that can be read, or cut short ({' '.join(words.split())})") from error
    if frame is None:
        raise BadClip(path, "contains no picture (cut short?)")
    if frame.is_corrupt:
        raise BadClip(path, "its picture is damaged (cut short?)")
    limits.check_pixels(path, frame.width, frame.height)
    return frame


def _check_size(path: str | os.PathLike) -> int:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise BadClip(path, "no such file") from error
    if size == 0:
        raise BadClip(path, "the file is empty")
    return size


def _find_format(path: str | os.PathLike) -> str:
    with open(path, "rb") as stream:
        beginning = stream.read(512)
    if beginning.startswith(b"RIFF") and beginning[8:12] == b"WEBP":
        return "webp_pipe"
    known = next((name for start, name in _FORMATS.items() if beginning.startswith(start)), None)
    if known is None and detect_content_kind(beginning) == "html":
        raise BadClip(path, PAGE)
    if known is None:
        raise BadClip(path, "not a JPEG, PNG, WebP, GIF or BMP image by its content")
    return known
