"""High dynamic range, transparency, interlacing, and formats that are not read."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from media_making import Audio, Video, grey, steady, tone, write_media

from mirasol import BadClip, ChunkGrid, read_clip
from mirasol.media.image import read_image
from mirasol.media.tone_mapping import map_tones
from mirasol.media.transcode import Reencoding, reencode_media
from mirasol.media.video import UPRIGHT, composite_on_black, draw_square

GRID = ChunkGrid(1, chunk_seconds=0.2)
PQ, HLG, BT2020 = 16, 18, 9


def read(path):
    return read_clip(path, GRID, image_size=32, threads=1)


def has_note(clip, words: str) -> bool:
    return any(words in note for note in clip.notes)


def hdr_frame(transfer: int, luma: int, blue: int = 512, red: int = 512) -> av.VideoFrame:
    """One colour in 10 bits and limited range."""
    frame = av.VideoFrame(64, 64, "yuv420p10le")
    for plane, value in zip(frame.planes, (luma, blue, red), strict=True):
        plane.update(np.full(plane.buffer_size // 2, value, "<u2").tobytes())
    frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, BT2020, BT2020, 1
    return frame


def shown(frame) -> tuple[int, ...]:
    square = np.zeros((3, 32, 32), np.uint8)
    draw_square(frame, square, UPRIGHT, "pad", "file", VideoReformatter())
    return tuple(square[:, 16, 16].tolist())


# What `ffmpeg -vf zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=clip:desat=0,zscale=t=bt709:m=bt709`
# (FFmpeg 5.1, zimg 3.0) makes of these colours.
REFERENCE = {
    PQ: [((232, 512, 512), 38), ((299, 512, 512), 61), ((400, 512, 512), 110), ((468, 512, 512), 156)],
    HLG: [((232, 512, 512), 55), ((400, 512, 512), 110), ((535, 512, 512), 155), ((670, 512, 512), 220)],
}
COLOURS = {(478, 539, 519): (177, 155, 212), (515, 542, 600): (255, 44, 157), (517, 547, 400): (0, 255, 255)}
WHITE = {PQ: 573, HLG: 721}  # luma of reference white, 203 cd/m2


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_greys_are_those_of_zscale_and_white_is_white(transfer):
    for (luma, blue, red), wanted in REFERENCE[transfer]:
        assert shown(hdr_frame(transfer, luma, blue, red)) == pytest.approx((wanted,) * 3, abs=1.01)
    assert min(shown(hdr_frame(transfer, WHITE[transfer]))) >= 254
    assert shown(hdr_frame(transfer, 940)) == (255, 255, 255)
    assert shown(hdr_frame(transfer, 64)) == (0, 0, 0)
    greys = [shown(hdr_frame(transfer, luma))[0] for luma in range(64, 941, 20)]
    assert greys == sorted(greys)


def test_colours_of_pq_are_those_of_zscale():
    for colour, wanted in COLOURS.items():
        assert shown(hdr_frame(PQ, *colour)) == pytest.approx(wanted, abs=2)


def test_hue_is_kept_where_light_is_cut_off():
    bright, brighter = (np.full((3, 1, 1), value, np.uint16) for value in (45_000, 55_000))
    for picture in (bright, brighter):
        picture[2] = 20_000
    first, second = (map_tones(picture, "PQ", 1) for picture in (bright, brighter))
    assert first[0] == second[0] == 255
    assert second[2] < first[2], "relative to what is cut off"


def write_frames(path, frames, codec: str, pix_fmt: str, options=None, prepare=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        if prepare is not None:
            prepare(stream.codec_context)
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


@pytest.mark.parametrize(("transfer", "name"), [(PQ, "PQ"), (HLG, "HLG")])
def test_a_video_of_high_dynamic_range(tmp_path, transfer, name):
    def prepare(context):
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1

    frames = [hdr_frame(transfer, WHITE[transfer]) for _ in range(10)]
    path = write_frames(tmp_path / "a.mp4", frames, "libx264", "yuv420p10le", prepare=prepare)
    clip = read(path)
    assert clip.frames[0].float().mean() > 250
    assert has_note(clip, f"high dynamic range ({name}) mapped to standard")
    assert "high dynamic range" in reencode_media(path, tmp_path / "b.mp4", Reencoding(32))


def test_reported_phone_video(faults):
    clip = read(faults / "hdr_pq.mp4")
    assert clip.frames[0][:, 16, 16].min() > 250
    assert has_note(clip, "high dynamic range (PQ)")


def half_transparent(alphas=(255, 128, 0)) -> av.VideoFrame:
    """Bright columns of these opacities."""
    picture = np.full((48, 96, 4), 200, np.uint8)
    picture[..., 3] = np.repeat(np.array(alphas, np.uint8), 96 // len(alphas))
    return av.VideoFrame.from_ndarray(picture, "rgba")


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
    ],
)
def test_transparent_video_is_shown_on_black(tmp_path, name, codec, pix_fmt):
    frames = [half_transparent().reformat(format=pix_fmt) for _ in range(10)]
    path = write_frames(tmp_path / name, frames, codec, pix_fmt)
    clip = read(path)
    columns = clip.frames[0].float().mean(0)[14:18].mean(0)
    assert [columns[5].item(), columns[16].item(), columns[27].item()] == pytest.approx([200, 100, 0], abs=6)
    assert has_note(clip, "transparent parts: shown on black")
    assert reencode_media(path, tmp_path / "b.mp4", Reencoding(32)) == "transparent"


@pytest.mark.parametrize("pix_fmt", ["rgba", "bgra", "yuva420p", "gbrap", "ya8"])
def test_opaque_pictures_with_an_alpha_channel_stay_as_they_are(pix_fmt):
    frame = half_transparent((255, 255, 255)).reformat(format=pix_fmt)
    assert composite_on_black(frame) is frame


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_transparent_images_are_shown_on_black(tmp_path, name):
    Image = pytest.importorskip("PIL.Image", reason="Pillow writes the image: it would show one on black")
    picture = np.full((32, 32, 4), 200, np.uint8)
    picture[..., 3] = 255
    picture[:, 16:, 3] = 0
    Image.fromarray(picture).save(tmp_path / name)
    shown = np.asarray(read_image(tmp_path / name, image_size=32))
    assert shown[:, 16, 4].min() > 190
    assert shown[:, 16, 28].max() == 0


def test_interlaced_video_is_noted(tmp_path):
    frames = [av.VideoFrame.from_ndarray(grey(40 + k), "rgb24").reformat(format="yuv420p") for k in range(10)]
    options = {"x264-params": "interlaced=1"}
    path = write_frames(tmp_path / "a.mp4", frames, "libx264", "yuv420p", options)
    assert has_note(read(path), "interlaced frames: both fields are shown in one picture")
    assert reencode_media(path, tmp_path / "b.mp4", Reencoding(32)) == "interlaced"
    plain = write_media(tmp_path / "c.mp4", Video([grey(90)] * 10, steady(10, 25)))
    assert not has_note(read(plain), "interlaced")


# Formats


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP image"),
        (b"\xff\xd8\xff\xe0", "JPEG image"),
        (b"\x89PNG\r\n\x1a\n", "PNG image"),
        (b"%PDF-1.7", "PDF document"),
        (b"PK\x03\x04", "ZIP archive"),
        (b".RMF\0\0\0\x12", "RealMedia file"),
        (b"MThd\0\0\0\x06", "MIDI file"),
        (b"7z\xbc\xaf\x27\x1c", "7-Zip archive"),
    ],
)
def test_files_of_other_formats_are_refused_by_name(tmp_path, beginning, name):
    path = tmp_path / "a.mp4"
    path.write_bytes(beginning + bytes(500))
    with pytest.raises(BadClip, match=f"is a {name}, which is not read: read are mp4, mov, ") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.caf", "pcm_s16le", 16_000),
        ("a.au", "pcm_s16be", 16_000),
        ("a.aiff", "pcm_s16be", 16_000),
        ("a.ac3", "ac3", 48_000),
        ("a.eac3", "eac3", 48_000),
    ],
)
def test_more_sound_formats(tmp_path, name, codec, rate):
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} in this build of PyAV: it would show that {name[2:]} files are read")
    clip = read(write_media(tmp_path / name, Audio([(0, tone(2.0, rate))], rate=rate, codec=codec)))
    assert clip.timeline.end == pytest.approx(2.0, abs=0.1)
    assert clip.waveform[2000:-2000].square().mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.1)


def test_reported_files_of_other_formats(faults):
    assert read(faults / "x.amr").timeline.end == pytest.approx(2.0, abs=0.1)
    with pytest.raises(BadClip, match="WebP image"):
        read(faults / "c.webp")
