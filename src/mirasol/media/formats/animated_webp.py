"""Animated WebP files, which FFmpeg does not read: decoded by Pillow into a lossless video that the reader reads."""

import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from typing import BinaryIO

import av
import av.error
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mirasol.errors import BadClip
from mirasol.media.limits import Limits

HEADER_BYTES = 30
TICK = Fraction(1, 1000)  # WebP counts milliseconds
SHORTEST_MILLISECONDS = 10
USUAL_MILLISECONDS = 100  # of a frame that states less than the shortest, as browsers show it
MOST_PIXELS = 2**32  # of all frames together: what decoding takes, whatever the size of the file
MOST_BYTES = 2**30  # of the temporary file
_ANIMATED = 0x02


def is_animated_webp(beginning: bytes) -> bool:
    """Whether a file that begins with these `HEADER_BYTES` bytes is an animated WebP file."""
    named = beginning[:4] == b"RIFF" and beginning[8:16] == b"WEBPVP8X"
    return named and len(beginning) >= HEADER_BYTES and bool(beginning[20] & _ANIMATED)


def decode_animated_webp(path: str | os.PathLike, limits: Limits, report_progress: Callable[[], None]) -> BinaryIO:
    """An animated WebP file as lossless video (FFV1) in Matroska, in a temporary file that is deleted when closed.

    `report_progress` is called for each picture.

    Raises:
        BadClip: cut short, damaged, or over a limit.
    """
    with open(path, "rb") as stream:
        head = stream.read(HEADER_BYTES)
        size = os.fstat(stream.fileno()).st_size
    stated = int.from_bytes(head[4:8], "little") + 8
    if stated > size:
        raise BadClip(path, f"cut short: its header says {stated} bytes, {size} are there")
    width, height = (int.from_bytes(head[place : place + 3], "little") + 1 for place in (24, 27))
    limits.check_pixels(path, width, height)
    decoded = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        with av.open(decoded, "w", format="matroska") as out:
            _transfer_frames(path, out, decoded, width * height, report_progress)
    except BaseException:
        decoded.close()
        raise
    decoded.seek(0)
    return decoded


def _transfer_frames(
    path: str | os.PathLike, out: OutputContainer, decoded: BinaryIO, pixels: int, report_progress: Callable[[], None]
) -> None:
    from PIL import Image  # only where it is needed: a decoder process starts sooner without

    try:
        with Image.open(path, formats=["WEBP"]) as image:
            if image.n_frames * pixels > MOST_PIXELS:
                raise BadClip(path, f"{image.n_frames} pictures of {pixels} pixels are too many: convert it to mp4")
            video = None
            time = 0
            for number in range(image.n_frames):
                report_progress()
                image.seek(number)
                image.load()
                video = video or _add_video(out, image.width, image.height)
                frame = VideoFrame.from_ndarray(np.asarray(image.convert("RGBA")), "rgba")
                frame.pts, frame.time_base = time, TICK
                shown = int(image.info.get("duration", 0))
                shown = USUAL_MILLISECONDS if shown < SHORTEST_MILLISECONDS else shown
                time += shown
                for packet in video.encode(frame):
                    packet.duration = shown
                    out.mux(packet)
                if os.fstat(decoded.fileno()).st_size > MOST_BYTES:
                    raise BadClip(path, f"its pictures take more than {MOST_BYTES} bytes: convert it to mp4")
    except BadClip:
        raise  # is a ValueError that has its reason already
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        words = " ".join(str(error).split())
        raise BadClip(path, f"not an animated WebP file that can be decoded ({words})") from error


def _add_video(out: OutputContainer, width: int, height: int) -> VideoStream:
    video = out.add_stream("ffv1", rate=10)
    video.width, video.height, video.pix_fmt = width, height, "bgra"
    video.time_base = video.codec_context.time_base = TICK
    video.codec_context.gop_size = 1
    video.codec_context.thread_count = 1  # one picture in, one packet out
    return video
