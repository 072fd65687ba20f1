"""Media file → `Clip`: one pass over the file, video and audio together. docs/media.md lists every behaviour."""

import itertools
import math
import os
from dataclasses import dataclass

import av.error
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mirasol.config.parts import FITS
from mirasol.errors import BadClip, UserError
from mirasol.media.clip import Clip
from mirasol.media.container import Chosen, Span, choose, find_span, open_media, packets
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.reading import Reading
from mirasol.media.timeline import ChunkGrid, cut, cutting_notes
from mirasol.media.video import orientation

END_TOLERANCE = 0.5  # seconds by which a window may reach past the end: annotations are rounded


@dataclass(frozen=True)
class VideoInfo:
    """Facts of the video stream that is read. Sizes in pixels as stored; `display_size` is (width, height) as shown."""

    index: int
    codec: str
    width: int
    height: int
    display_size: tuple[int, int]
    rotation: str
    sample_aspect_ratio: float
    average_rate: float | None


@dataclass(frozen=True)
class AudioInfo:
    """Facts of the audio stream that is read; `sample_rate` in Hz."""

    index: int
    codec: str
    sample_rate: int
    channels: int
    layout: str


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds. `duration` in seconds, from the header unless `duration_measured`."""

    file: str
    bytes: int
    container: str
    duration: float
    duration_measured: bool
    video: VideoInfo | None
    audio: AudioInfo | None
    num_streams: int
    notes: tuple[str, ...]


def probe(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> MediaInfo:
    """Facts of a media file.

    Decodes one frame (only it tells the rotation); without a reliable duration in the header reads all packets.

    Raises:
        BadClip: the file cannot be used.
    """
    with open_media(path, limits) as container:
        chosen = choose(container, path, limits)
        span = find_span(container, chosen, path, limits)
        notes = [*chosen.notes, *_span_notes(span)]
        return MediaInfo(
            file=str(path),
            bytes=os.path.getsize(path),
            container=container.format.name,
            duration=span.seconds,
            duration_measured=span.measured,
            video=_video_info(container, chosen, path) if chosen.video is not None else None,
            audio=_audio_info(chosen) if chosen.audio is not None else None,
            num_streams=len(container.streams),
            notes=tuple(notes),
        )


def _video_info(container: InputContainer, chosen: Chosen, path: str | os.PathLike) -> VideoInfo:
    stream = chosen.video
    codec = stream.codec_context
    turn, _ = orientation(_first_frame(container, stream, path))
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    shown = (round(codec.width * aspect), codec.height)
    return VideoInfo(
        index=stream.index,
        codec=codec.name,
        width=codec.width,
        height=codec.height,
        display_size=shown[::-1] if turn.transpose else shown,
        rotation=turn.words,
        sample_aspect_ratio=aspect,
        average_rate=float(stream.average_rate) if stream.average_rate else None,
    )


def _first_frame(container: InputContainer, stream: VideoStream, path: str | os.PathLike) -> VideoFrame:
    for packet in itertools.chain(packets(container, [stream], []), [None]):
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            continue  # a later packet may decode
        if frames:
            return frames[0]
    raise BadClip(path, "no frame of its video can be decoded")


def _audio_info(chosen: Chosen) -> AudioInfo:
    codec = chosen.audio.codec_context
    return AudioInfo(chosen.audio.index, codec.name, codec.sample_rate, codec.layout.nb_channels, codec.layout.name)


def read_clip(
    path: str | os.PathLike,
    grid: ChunkGrid,
    *,
    image_size: int,
    sample_rate: int = 16_000,
    start: float | None = None,
    end: float | None = None,
    fit: str = "pad",
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 0,
) -> Clip:
    """Reads a media file, or its window [start, end) seconds, for one chunk grid.

    `image_size`: side of the square frames in pixels; `fit` pads a picture to a square, crops or stretches it.
    `sample_rate`: Hz of the mono waveform. Second 0 is the earliest start of the streams that are read. A window is
    sought, not decoded from the beginning; frames nobody asked for are not kept. `threads`: decoding threads, 0 lets
    FFmpeg choose; 1 is right in loader workers.

    Raises:
        BadClip: the file cannot be used, or does not hold the window.
        UserError: a setting is impossible.
    """
    if fit not in FITS:
        raise UserError(f"fit={fit!r}: choose {', '.join(FITS)}")
    if image_size < 1 or sample_rate < 1:
        raise UserError(f"image_size={image_size} and sample_rate={sample_rate} must be positive")
    clip = None
    for seek in (True, False):
        with open_media(path, limits) as container:
            chosen = choose(container, path, limits)
            span = find_span(container, chosen, path, limits)
            left, right, notes = _window(path, span, start, end)
            limits.check_seconds(path, right - left)
            timeline = cut(left, right, grid)
            _set_threads(chosen, threads)
            reading = Reading(path, container, chosen, span, timeline)
            if chosen.video is not None:
                reading.add_video(image_size, fit, limits)
            if chosen.audio is not None:
                reading.add_audio(sample_rate)
            if seek and not reading.seek():
                continue  # nowhere to begin inside the file: open it anew and read from its beginning
            reading.run()
            reading.check()
            notes = [*chosen.notes, *_span_notes(span), *notes, *cutting_notes(timeline, grid), *reading.notes()]
            clip = reading.clip(image_size, sample_rate, tuple(notes))
            break
    assert clip is not None
    return clip


def _set_threads(chosen: Chosen, threads: int) -> None:
    for stream in chosen.streams:
        if threads != 1:
            stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads


def _window(
    path: str | os.PathLike, span: Span, start: float | None, end: float | None
) -> tuple[float, float, list[str]]:
    """The window in seconds of the media timeline, checked against the file's length."""
    length = span.seconds
    left, right = 0.0 if start is None else float(start), length if end is None else float(end)
    if not (math.isfinite(left) and math.isfinite(right)) or left < 0:
        raise BadClip(path, f"window {left:g} to {right:g} s: start and end must be numbers from 0 on")
    if left >= length:
        raise BadClip(path, f"window starts at {left:g} s, but the file lasts {length:.3f} s")
    if right <= left:
        raise BadClip(path, f"window {left:g} to {right:g} s has no length: end must lie after start")
    if right > length + END_TOLERANCE:
        raise BadClip(path, f"window ends at {right:g} s, but the file lasts {length:.3f} s")
    if right > length:
        return left, length, [f"window end {right:g} s lies past the end: read to {length:.3f} s"]
    return left, right, []


def _span_notes(span: Span) -> list[str]:
    return [f"no reliable duration in the header: {span.seconds:.3f} s by reading packets"] if span.measured else []
