"""Pixels and samples of a scene, and the mp4 file that holds both (H.264 + AAC)."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from mirasol.synthetic.looks import Track, make_mask, outline_circle
from mirasol.synthetic.scenes import Scene, ShapeEvent, SoundEvent, Style
from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS, World

DOT_GREY = 120
DISTRACTOR_RGB = (120, 120, 120)
FADE_SECONDS = 0.012


# Video


def render_frames(scene: Scene) -> np.ndarray:
    """All frames of a scene, uint8 [frame, height, width, 3] (RGB). Frame i is shown at i / frame_rate seconds."""
    style = scene.style
    rng = np.random.default_rng(style.noise_seed)
    count = round(scene.seconds * style.frame_rate)
    times = np.arange(count) / style.frame_rate
    gains = 1.0 + style.flicker * rng.uniform(-1, 1, size=count)
    frames = np.empty((count, style.height, style.width, 3), np.uint8)
    background = _draw_background(style, rng)
    np.multiply(background, gains[:, None, None, None], out=frames, casting="unsafe")
    if style.grain:
        _add_grain(frames, style.grain, rng)
    _draw_dot(frames, times, style)
    for event in scene.distractors:
        _draw_shape(frames, times, event, scene.world, DISTRACTOR_RGB)
    for event in scene.shapes:
        _draw_shape(frames, times, event, scene.world, scene.world.colours[event.colour])
    return frames


def _draw_background(style: Style, rng: np.random.Generator) -> np.ndarray:
    """A dark, smooth random texture, float32 [height, width, 3]."""
    coarse = rng.uniform(-1, 1, size=(5, 5)).astype(np.float32)
    rows, columns = _make_bilinear_weights(style.height, 5), _make_bilinear_weights(style.width, 5)
    texture = rows @ coarse @ columns.T
    mean = np.array(style.background, np.float32)
    return np.clip(mean + style.texture * texture[..., None], 0, 80)


def _make_bilinear_weights(size: int, knots: int) -> np.ndarray:
    """Interpolation weights [size, knots] from evenly spaced knots."""
    position = np.linspace(0, knots - 1, size, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(knots, dtype=np.float32)))


def _add_grain(frames: np.ndarray, amplitude: int, rng: np.random.Generator) -> None:
    # One noise image shifted about: fresh noise for every pixel would cost more than all the rest of the rendering.
    count, height, width, _ = frames.shape
    noise = rng.integers(0, amplitude + 1, size=(2 * height, 2 * width, 1), dtype=np.uint8)
    corners = rng.integers(0, (height, width), size=(count, 2))
    for frame, (y, x) in zip(frames, corners.tolist(), strict=True):
        frame += noise[y : y + height, x : x + width]


def _draw_dot(frames: np.ndarray, times: np.ndarray, style: Style) -> None:
    """A small grey dot that drifts through the whole clip at constant velocity, re-entering where it left."""
    x, y, vx, vy = style.dot
    radius = max(2.0, style.dot_radius * min(style.height, style.width))
    mask = make_mask(outline_circle, 2 * round(radius) + 1)
    for frame, time in zip(frames, times.tolist(), strict=True):
        _paste(frame, mask, (x + vx * time) % 1.0 * style.width, (y + vy * time) % 1.0 * style.height, (DOT_GREY,) * 3)


def _draw_shape(
    frames: np.ndarray, times: np.ndarray, event: ShapeEvent, world: World, rgb: tuple[int, int, int]
) -> None:
    _, height, width, _ = frames.shape
    size = round(event.size * min(height, width))
    colour = tuple(int(np.clip(c + d, 0, 255)) for c, d in zip(rgb, event.tint, strict=True))
    shown = np.flatnonzero((times >= event.onset) & (times < event.offset))
    progress = (times[shown] - event.onset) / (event.offset - event.onset)
    track = Track(size, width, height, event.travel, event.along, event.across)
    way = world.motions[event.motion](track, progress)
    for index, x, y, now in zip(shown.tolist(), *(part.tolist() for part in way), strict=True):
        _paste(frames[index], make_mask(world.shapes[event.shape], now), x, y, colour)


def _paste(frame: np.ndarray, mask: np.ndarray, x: float, y: float, colour: tuple[int, int, int]) -> None:
    """Blends `colour` into an RGB frame through a square mask (0..1) centred on pixel (x, y); clips at the border."""
    height, width, _ = frame.shape
    size = mask.shape[0]
    left, top = round(x - size / 2), round(y - size / 2)
    y0, y1, x0, x1 = max(top, 0), min(top + size, height), max(left, 0), min(left + size, width)
    if y0 >= y1 or x0 >= x1:
        return
    part = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    region = frame[y0:y1, x0:x1]
    region[...] = region + part * (np.array(colour, np.float32) - region) + 0.5


# Audio


def render_waveform(scene: Scene) -> np.ndarray:
    """The sound of a scene, float32 [channel, sample] in [-1, 1] at the style's sample rate."""
    style = scene.style
    rng = np.random.default_rng(style.noise_seed + 1)
    rate = style.sample_rate
    count = round(scene.seconds * rate)
    time = np.arange(count, dtype=np.float32) / rate
    mono = style.noise_bed * rng.standard_normal(count, dtype=np.float32)
    mono += np.float32(style.hum) * np.sin(np.float32(2 * np.pi * style.hum_frequency) * time)
    for event in scene.sounds:
        sound = render_sound(event, rate, scene.world)
        first = round(event.onset * rate)
        mono[first : first + len(sound)] += sound
    for click in style.clicks:
        first = round(click * rate)
        tick = np.exp(-time[: count - first] / 0.003)[: rate // 50]
        mono[first : first + len(tick)] += np.float32(style.click_level) * tick * np.sign(rng.uniform(-1, 1, len(tick)))
    balance = rng.uniform(0.75, 1.0, size=style.channels) if style.channels > 1 else np.ones(1)
    return np.clip(mono * balance[:, None], -1, 1).astype(np.float32)


def render_sound(event: SoundEvent, rate: int, world: World = SHAPES_AND_SOUNDS) -> np.ndarray:
    """One sound event alone, float32 [sample], `loudness` at its peak, from its onset to its offset."""
    count = round((event.offset - event.onset) * rate)
    time = np.arange(count, dtype=np.float32) / rate
    hz = world.find_hz(event.timbre, event.pitch) * event.detune
    sound = world.timbres[event.timbre].voice(time, hz, event.noise_seed)
    fade = np.minimum(1.0, np.minimum(time, time[-1] - time) / FADE_SECONDS)
    sound = sound * fade
    return (event.loudness * sound / np.abs(sound).max()).astype(np.float32)


# File


def write_clip(scene: Scene, path: Path, sound: bool = True) -> None:
    """Renders a scene to an mp4 file (`write_mp4`). Without `sound` there is no audio track.

    The bytes are the same for the same scene and the same PyAV version.
    """
    style = scene.style
    waveform = render_waveform(scene) if sound else None
    write_mp4(path, render_frames(scene), style.frame_rate, waveform, style.sample_rate)


def write_mp4(
    path: Path, frames: np.ndarray, frame_rate: int, waveform: np.ndarray | None, sample_rate: int = 0
) -> None:
    """Writes uint8 frames [frame, height, width, 3] and a float32 waveform [channel, sample] of one or two channels to
    an mp4 file: H.264 (yuv420p) and AAC, one encoding thread, no time stamps in the header."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=frame_rate)
        (video.height, video.width), video.pix_fmt = frames.shape[1:3], "yuv420p"
        # Small frames: low crf costs little and keeps the colours; one thread, because clips are rendered in parallel.
        video.options = {"preset": "ultrafast", "crf": "22"}
        video.codec_context.thread_count = 1
        channels = 0 if waveform is None else len(waveform)
        layout = "mono" if channels == 1 else "stereo"
        if waveform is not None:
            audio = container.add_stream("aac", rate=sample_rate, layout=layout)
            audio.bit_rate = 48_000 * channels
            # The default coder takes four times as long, which would be most of the rendering.
            audio.options = {"aac_coder": "fast"}
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, frame_rate)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if waveform is not None:
            _encode_audio(container, audio, waveform, layout, sample_rate)


def write_still(scene: Scene, path: Path, seconds: float) -> None:
    """Writes the frame that is on show at `seconds` to a PNG file."""
    import av

    pixels = render_frames(scene)[int(seconds * scene.style.frame_rate)]
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt = *pixels.shape[:2], "rgb24"
    codec.time_base = Fraction(1, 1)
    codec.thread_count = 1
    packets = [*codec.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *codec.encode(None)]
    path.write_bytes(b"".join(bytes(packet) for packet in packets))


def _encode_audio(container, stream, waveform: np.ndarray, layout: str, rate: int, block: int = 1024) -> None:
    """Encodes float32 [channel, sample] block by block: AAC frames hold 1,024 samples."""
    import av

    for first in range(0, waveform.shape[1], block):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[:, first : first + block]), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
