"""Small media files of every container and codec that PyAV's encoders can make, rendered here."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from media_making import Audio, tone, write_media
from PIL import Image

RATE, FRAMES = 10, 12
# file name: (video codec or "", audio codec or "", options of the codecs)
VIDEO = {
    "h264.mp4": ("libx264", "aac"),
    "hevc.mp4": ("libx265", "ac3"),
    "mpeg4.mp4": ("mpeg4", "libmp3lame"),
    "fragments.mp4": ("libx264", "aac"),
    "av1.mp4": ("libsvtav1", "libopus"),
    "h264.mov": ("libx264", "pcm_s16le"),
    "prores.mov": ("prores", "pcm_s16be"),
    "mjpeg.mov": ("mjpeg", "alac"),
    "h264.mkv": ("libx264", "libopus"),
    "ffv1.mkv": ("ffv1", "flac"),
    "vp9.mkv": ("libvpx-vp9", "vorbis"),
    "eac3.mkv": ("libx264", "eac3"),
    "vp8.webm": ("libvpx", "vorbis"),
    "vp9.webm": ("libvpx-vp9", "libopus"),
    "mpeg4.avi": ("mpeg4", "libmp3lame"),
    "mjpeg.avi": ("mjpeg", "pcm_s16le"),
    "h264.avi": ("libx264", "ac3"),
    "huffyuv.avi": ("huffyuv", "libmp3lame"),
    "msmpeg4.avi": ("msmpeg4v3", "adpcm_ms"),
    "h264.ts": ("libx264", "aac"),
    "mpeg2.ts": ("mpeg2video", "mp2"),
    "mpeg1.mpg": ("mpeg1video", "mp2"),
    "mpeg2.mxf": ("mpeg2video", "pcm_s16le"),
    "h264.flv": ("libx264", "aac"),
    "flv1.flv": ("flv", "libmp3lame"),
    "mpeg4.3gp": ("mpeg4", "aac"),
    "wmv2.wmv": ("wmv2", "wmav2"),
    "wmv1.asf": ("wmv1", "wmav1"),
    "gif.gif": ("gif", ""),
    "vp8.ivf": ("libvpx", ""),
    "silent.mp4": ("libx264", ""),
    "aac.m4a": ("", "aac"),
    "alac.m4a": ("", "alac"),
    "opus.ogg": ("", "libopus"),
    "vorbis.ogg": ("", "vorbis"),
    "flac.ogg": ("", "flac"),
    "opus.webm": ("", "libopus"),
    "flac.flac": ("", "flac"),
    "pcm.wav": ("", "pcm_s16le"),
    "adpcm.wav": ("", "adpcm_ima_wav"),
    "mulaw.wav": ("", "pcm_mulaw"),
    "pcm.w64": ("", "pcm_s16le"),
    "pcm.aiff": ("", "pcm_s16be"),
    "pcm.au": ("", "pcm_s16be"),
    "pcm.caf": ("", "pcm_s16le"),
    "wavpack.wv": ("", "wavpack"),
    "mp3.mp3": ("", "libmp3lame"),
    "aac.aac": ("", "aac"),
    "ac3.ac3": ("", "ac3"),
    "eac3.eac3": ("", "eac3"),
    "amr.amr": ("", "libopencore_amrnb"),
    "amr.3gp": ("", "libopencore_amrnb"),
    "raw.h264": ("libx264", ""),
    "raw.hevc": ("libx265", ""),
    "raw.m4v": ("mpeg4", ""),
    "raw.m2v": ("mpeg2video", ""),
    "raw.m1v": ("mpeg1video", ""),
    "raw.mjpeg": ("mjpeg", ""),
    "raw.obu": ("libsvtav1", ""),
    "vp8.ogg": ("libvpx", "libopus"),
    "mpeg2.vob": ("mpeg2video", "ac3"),
    "apng.apng": ("apng", ""),
}
IMAGES = {
    "image.png": ("png", "rgb24"),
    "image.jpg": ("mjpeg", "yuvj420p"),
    "image.webp": ("libwebp", "yuv420p"),
    "image.gif": ("gif", "rgb8"),
    "image.bmp": ("bmp", "bgr24"),
}
CHANNELS = {"surround.mkv": ("libx264", "flac", "5.1"), "surround.ogg": ("", "libopus", "5.1")}
MANY_CHANNELS = {
    "channels.m4a": ("aac", "7.1"),
    "channels.mka": ("libopus", "7.1"),
    "channels.wav": ("pcm_s16le", "hexadecagonal"),
}
ANIMATION = "animation.webp_"  # not the extension of an image
# Recordings of other seeds, appended to each other.
JOINED = {
    "same.ts": ("h264.ts", "h264.ts"),
    "other.ts": ("h264.ts", "mpeg2.ts", "h264.ts"),
    "other.vob": ("mpeg2.vob", "mpeg1.mpg"),
    "same.ogg": ("opus.ogg", "opus.ogg"),
    "other.ogg": ("vp8.ogg", "flac.ogg", "vp8.ogg"),
}
FORMATS = {
    "raw.m4v": "m4v",
    "raw.m2v": "mpeg2video",
    "raw.m1v": "mpeg1video",
    "raw.h264": "h264",
    "raw.hevc": "hevc",
    "wmv2.wmv": "asf",
    "wmv1.asf": "asf",
    "aac.aac": "adts",
}


def render_seeds(folder: Path) -> dict[str, bytes]:
    """The seeds by name; those in `folder` already are not rendered again. What this PyAV cannot make is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, codecs in {**VIDEO, **CHANNELS, **MANY_CHANNELS, **IMAGES}.items():
        file = folder / name
        if file.exists():
            continue
        unfinished = folder / f".{name}"
        try:
            if name in IMAGES:
                unfinished.write_bytes(_image(*codecs))
            elif name in MANY_CHANNELS:
                unfinished = folder / f".hidden.{name}"
                channels = 16 if codecs[1] == "hexadecagonal" else 8
                write_media(unfinished, Audio([(0.0, tone(0.4, channels=channels))], codec=codecs[0], layout=codecs[1]))
            else:
                _render(unfinished, name, *codecs)
            unfinished.rename(file)
        except (av.error.FFmpegError, ValueError, LookupError):
            unfinished.unlink(missing_ok=True)
    if not (folder / ANIMATION).exists():
        first, *others = [Image.fromarray(_picture(number)) for number in range(FRAMES)]
        first.save(folder / ANIMATION, format="WEBP", save_all=True, append_images=others, duration=100)
    for name, parts in JOINED.items():
        if all((folder / part).exists() for part in parts):
            (folder / name).write_bytes(b"".join((folder / part).read_bytes() for part in parts))
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


def _picture(number: int) -> np.ndarray:
    picture = np.random.default_rng(number).integers(0, 60, (48, 64, 3), np.uint8)
    picture[10:30, 4 * number : 4 * number + 20] += 150
    return picture


def _image(codec: str, pixel_format: str) -> bytes:
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt, context.time_base = 48, 64, pixel_format, Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(_picture(3), format="rgb24").reformat(format=pixel_format)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def _render(path: Path, name: str, video: str, audio: str, layout: str = "stereo") -> None:
    options = {"movflags": "frag_keyframe+empty_moov"} if name.startswith("fragments") else {}
    kind = FORMATS.get(name)
    with av.open(str(path), "w", format=kind or _guess(name), container_options=options) as out:
        pictures = _add_video(out, video, name) if video else None
        sound = _add_audio(out, audio, name, layout) if audio else None
        packets = []
        if pictures is not None:
            packets += _encode_video(pictures)
        if sound is not None:
            packets += _encode_audio(sound, layout)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)


def _guess(name: str) -> str | None:
    suffix = name.rpartition(".")[2]
    guessed = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "m4a": "ipod", "wv": "wv"}
    return guessed.get(suffix, suffix)


def _add_video(out: av.container.OutputContainer, codec: str, name: str) -> av.VideoStream:
    rate = 25 if codec in ("mpeg1video", "mpeg2video") else RATE
    stream = out.add_stream(codec, rate=rate)
    stream.width, stream.height = 64, 48
    formats = {"mjpeg": "yuvj420p", "prores": "yuv422p10le", "huffyuv": "yuv422p", "gif": "rgb8", "apng": "rgb24"}
    stream.pix_fmt = formats.get(codec, "yuv420p")
    stream.codec_context.gop_size = 6
    if codec in ("libx264", "mpeg2video") and not name.endswith((".avi", ".flv")):
        stream.codec_context.max_b_frames = 2
    if codec == "libx265":
        stream.options = {"x265-params": "log-level=none"}
    return stream


def _add_audio(out: av.container.OutputContainer, codec: str, name: str, layout: str) -> av.AudioStream:
    rate = 8000 if "amr" in codec else 44_100 if codec.startswith("wma") else 48_000
    stream = out.add_stream(codec, rate=rate, options={"strict": "experimental"})
    stream.layout = "mono" if "amr" in codec else layout
    if codec.startswith("wma"):
        stream.bit_rate = 64_000
    return stream


def _encode_video(stream: av.VideoStream) -> list[av.Packet]:
    packets = []
    for number in range(FRAMES):
        frame = av.VideoFrame.from_ndarray(_picture(number), format="rgb24")
        frame = frame.reformat(format=stream.pix_fmt)
        frame.pts, frame.time_base = number, 1 / stream.codec_context.framerate
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _is_raw(name: str) -> bool:
    """Whether a codec stores samples as they are: such files need not be long."""
    return name.startswith("pcm") or name in ("alac", "flac")


def _encode_audio(stream: av.AudioStream, layout: str) -> list[av.Packet]:
    context = stream.codec_context
    context.open(strict=False)
    rate, size = context.sample_rate, context.frame_size or 1024
    channels = context.layout.nb_channels
    packets, resampler = [], av.AudioResampler(context.format.name, context.layout.name, rate)
    seconds = 0.3 if _is_raw(context.name) else 1.2
    for number in range(int(seconds * rate) // size):
        times = (np.arange(size) + number * size) / rate
        wave = 0.4 * np.sin(2 * np.pi * 440 * times).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.tile(wave, (channels, 1)), "fltp", context.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, number * size, Fraction(1, rate)
        for converted in resampler.resample(frame):
            packets += stream.encode(converted)
    return packets + stream.encode(None)
