"""Writes small media files with PyAV's own encoders, every time stamp under the test's control."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.plane import AudioPlane

VIDEO_TICK = Fraction(1, 90_000)
COARSE_TICK = Fraction(1, 1_000)  # for codecs that know no finer one


@dataclass
class Video:
    """A video track: RGB pictures [height, width, 3] and the second at which each begins."""

    pictures: list[np.ndarray]
    times: list[float]
    codec: str = "libx264"
    rate: int = 25
    group: int = 12
    rotation: int | None = None  # degrees counter-clockwise, as FFmpeg's display matrix has it
    aspect: Fraction | None = None
    b_frames: int = 0
    attached_picture: bool = False
    options: dict[str, str] = field(default_factory=dict)
    tick: Fraction | None = None  # unit of the times
    prepare: Callable[[av.VideoStream], None] | None = None  # what else is to be set


@dataclass
class Audio:
    """An audio track: pieces of (second, samples [channel, sample])."""

    pieces: list[tuple[float, np.ndarray]]
    rate: int = 48_000
    codec: str = "aac"
    layout: str = "mono"


def steady(count: int, rate: float, start: float = 0.0) -> list[float]:
    return [start + k / rate for k in range(count)]


def grey(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def ramp(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Pictures that tell their own number: 4 x 3 fields, black or white, are its bits."""
    pictures = []
    for number in range(count):
        bits = np.array([number >> k & 1 for k in range(12)], np.uint8).reshape(3, 4) * 220 + 16
        cells = bits.repeat(height // 3, axis=0).repeat(width // 4, axis=1)
        pictures.append(np.repeat(cells[..., None], 3, axis=2))
    return pictures


def number_of(picture) -> int:
    """Which picture of `ramp` a decoded frame [3, size, size] is (4:3, padded to a square)."""
    size = picture.shape[-1]
    content = picture.float().mean(0)[size // 8 : -size // 8]
    cells = content.unflatten(0, (3, -1)).unflatten(2, (4, -1)).mean((1, 3))
    return sum(int(cell > 128) << k for k, cell in enumerate(cells.flatten()))


def tone(seconds: float, rate: int = 48_000, hertz: float = 440.0, channels: int = 1, gain: float = 0.5) -> np.ndarray:
    wave = gain * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def write_media(path: Path, *tracks: Video | Audio, options: dict[str, str] | None = None, late: float = 0.0) -> Path:
    """Writes the tracks, in that order, interleaved by time; video comes `late` seconds after the sound of its time.

    Returns the path.
    """
    # With nearly no patience the muxer keeps the order in which it gets packets.
    order = {"max_interleave_delta": "1"} if late else {}
    with av.open(str(path), "w", container_options={**order, **(options or {})}) as container:
        streams = [_add(container, track) for track in tracks]
        container.start_encoding()
        packets = []
        for track, stream in zip(tracks, streams, strict=True):
            packets += _video_packets(track, stream) if isinstance(track, Video) else _audio_packets(track, stream)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base + late * (p.stream.type == "video")):
            container.mux(packet)
    return path


def _add(container, track):
    if isinstance(track, Audio):
        options = {"strict": "experimental"} if track.codec == "vorbis" else {}
        stream = container.add_stream(track.codec, rate=track.rate, options=options)
        stream.layout = track.layout
        stream.time_base = Fraction(1, track.rate)
        return stream
    fast = {"deadline": "realtime", "cpu-used": "8"} if track.codec.startswith("libvpx") else {}
    stream = container.add_stream(track.codec, rate=track.rate, options=fast | track.options)
    stream.height, stream.width = track.pictures[0].shape[:2]
    stream.pix_fmt = "yuvj420p" if track.codec == "mjpeg" else "yuv420p"
    stream.time_base = stream.codec_context.time_base = _tick(track)
    stream.codec_context.gop_size = track.group
    stream.codec_context.max_b_frames = track.b_frames
    if track.aspect is not None:
        stream.codec_context.sample_aspect_ratio = track.aspect
    if track.rotation is not None:
        stream.set_display_rotation(track.rotation)
    if track.prepare is not None:
        track.prepare(stream)
    if track.attached_picture:
        stream.disposition = av.stream.Disposition.attached_pic
    return stream


def _tick(track: Video) -> Fraction:
    if track.tick is not None:
        return track.tick
    return COARSE_TICK if track.codec == "mpeg4" else VIDEO_TICK


def _video_packets(track: Video, stream):
    packets, tick = [], _tick(track)
    for picture, time in zip(track.pictures, track.times, strict=True):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = round(time / tick), tick
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _audio_packets(track: Audio, stream):
    context = stream.codec_context
    context.open(strict=False)
    size = context.frame_size or 1024
    packets = []
    for start, samples in track.pieces:
        first = round(start * track.rate)
        for offset in range(0, samples.shape[1], size):
            part = samples[:, offset : offset + size]
            packets += stream.encode(_audio_frame(part, context, track, first + offset))
    return packets + stream.encode(None)


def _audio_frame(samples: np.ndarray, context, track: Audio, position: int):
    planar = context.format.is_planar
    if context.format.name.startswith("s"):
        kind = np.int16 if context.format.name.startswith("s16") else np.int32
        samples = (samples.astype(np.float64) * np.iinfo(kind).max).astype(kind)
    data = samples if planar else samples.T.reshape(1, -1)
    if planar and len(data) >= 8:
        # PyAV 18.1's `from_ndarray` writes one plane too many.
        frame = av.AudioFrame(format=context.format.name, layout=track.layout, samples=data.shape[1], align=1)
        for number, plane in enumerate(data):
            AudioPlane(frame, number).update(np.ascontiguousarray(plane).tobytes())
    else:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), context.format.name, track.layout)
    frame.sample_rate, frame.pts, frame.time_base = track.rate, position, Fraction(1, track.rate)
    return frame
