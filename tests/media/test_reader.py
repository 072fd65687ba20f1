"""One documented behaviour for every irregularity of media (docs/media.md), none silent."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from media_making import Audio, Video, grey, number_of, ramp, steady, tone, write_media

from mirasol import UserError, read_clip
from mirasol.media.reader import probe_media
from mirasol.media.timeline import ChunkGrid
from mirasol.media.video import Orientation, compute_fitted_size, draw_square

GRID = ChunkGrid(4, chunk_seconds=0.5)


def read(path, grid=GRID, **settings):
    return read_clip(path, grid, image_size=32, threads=1, **settings)


def video(count=50, rate=25, start=0.0, **settings) -> Video:
    return Video(ramp(count), steady(count, rate, start), **settings)


def sound(seconds=2.0, start=0.0, rate=48_000, codec="aac", layout="mono") -> Audio:
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    return Audio([(start, tone(seconds, rate, channels=channels))], rate, codec, layout)


def has_note(clip, words: str) -> bool:
    return any(words in note for note in clip.notes)


def loudness(clip, left: float, right: float) -> float:
    """Root mean square of the waveform in [left, right) seconds; 0 where there is none."""
    first, last = (round((t - clip.waveform_start) * clip.sample_rate) for t in (left, right))
    samples = clip.waveform[max(first, 0) : max(last, 0)]
    return float(samples.square().mean().sqrt()) if len(samples) else 0.0


# What is wanted


def test_the_frame_of_a_time_is_the_last_one_shown_by_then(tmp_path):
    clip = read(write_media(tmp_path / "a.mp4", video(), sound()))
    wanted = [time for chunk in clip.timeline.frame_times for time in chunk]
    assert [number_of(frame) for frame in clip.frames] == [int(time * 25 + 1e-6) for time in wanted]
    torch.testing.assert_close(clip.frame_times, torch.tensor([int(t * 25 + 1e-6) / 25 for t in wanted]).double())
    assert clip.notes == ()
    assert len(clip.waveform) == 2 * 16_000
    assert clip.waveform_start == 0
    assert clip.audio_present.all()
    assert clip.video_present.all()


def test_reading_twice_gives_the_same(tmp_path):
    path = write_media(tmp_path / "a.mp4", video(b_frames=2), sound())
    first, second = read(path), read_clip(path, GRID, image_size=32, threads=0)
    assert torch.equal(first.frames, second.frames)
    assert torch.equal(first.waveform, second.waveform)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mpeg4"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_sparse_frames_are_the_same_as_dense_ones(tmp_path, codec, b_frames):
    """Groups of pictures that nobody looks at are skipped, and that changes no frame."""
    path = write_media(tmp_path / "a.mkv", video(55, codec=codec, b_frames=b_frames, group=5))
    dense = read(path, ChunkGrid(55, num_chunks=1))
    assert [number_of(frame) for frame in dense.frames] == list(range(55))
    sparse = read(path, ChunkGrid(1, num_chunks=5))
    assert [number_of(frame) for frame in sparse.frames] == [5, 16, 27, 38, 49]
    assert torch.equal(sparse.frames, dense.frames[[5, 16, 27, 38, 49]])
    assert sparse.video_counts.frames_converted == 5


@pytest.mark.parametrize("wanted", [3, 17, 40, 90])
def test_leaving_out_frames_that_no_other_needs_changes_nothing(tmp_path, wanted):
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, size=120)).tolist()
    path = write_media(tmp_path / "a.mp4", Video(ramp(120), times, b_frames=3, group=40))
    dense = read(path, ChunkGrid(4000, num_chunks=1))
    # With B-frames at uneven times the header's end may come before the last frames; what lies before it is all there.
    assert len(dense.frame_times.unique()) == sum(time - times[0] < dense.timeline.end for time in times)
    sparse = read(path, ChunkGrid(wanted, num_chunks=1))
    assert sparse.video_counts.frames_decoded < 120
    shown = [np.searchsorted(dense.frame_times.numpy(), t) for t in sparse.frame_times.numpy()]
    assert torch.equal(sparse.frames, dense.frames[shown])
    zero = times[0]
    expected = [max(k for k, t in enumerate(times) if t - zero <= w) for w in sparse.timeline.frame_times[0]]
    assert [number_of(frame) for frame in sparse.frames] == expected


# Sound


def test_no_audio_track(tmp_path):
    clip = read(write_media(tmp_path / "a.mp4", video()))
    assert len(clip.waveform) == 0
    assert not clip.audio_present.any()
    assert has_note(clip, "no audio track")


def test_audio_only(tmp_path):
    clip = read(write_media(tmp_path / "a.m4a", sound(1.5)))
    assert clip.frames.shape == (0, 3, 32, 32)
    assert clip.timeline.num_chunks == 3
    assert not clip.video_present.any()
    assert clip.audio_present.all()
    assert has_note(clip, "no video track: answered from sound alone")


def test_audio_that_starts_late(tmp_path):
    clip = read(write_media(tmp_path / "a.mkv", video(), sound(0.9, start=1.1, codec="libopus")))
    assert clip.waveform_start == pytest.approx(1.1, abs=0.01)
    assert clip.audio_present.tolist() == [False, False, True, True]
    assert has_note(clip, "audio begins 1")
    assert loudness(clip, 1.15, 1.9) > 0.3


def test_audio_that_starts_early_makes_the_video_late(tmp_path):
    clip = read(write_media(tmp_path / "a.mp4", video(25, start=1.0), sound(2.0)))
    assert clip.timeline.num_chunks == 4
    assert clip.video_present.tolist() == [False, False, True, True]
    assert clip.frame_times[0] == pytest.approx(1.0)
    assert number_of(clip.frames[0]) == 0
    assert has_note(clip, "video begins 1000 ms late: 8 frames show its first frame")


def test_audio_that_is_shorter(tmp_path):
    clip = read(write_media(tmp_path / "a.mp4", video(), sound(0.9)))
    assert clip.audio_present.tolist() == [True, True, False, False]
    assert has_note(clip, "audio ends 1")


def test_audio_that_is_longer(tmp_path):
    clip = read(write_media(tmp_path / "a.mp4", video(25), sound(2.0)))
    assert clip.timeline.num_chunks == 4
    assert clip.video_present.tolist() == [True, True, False, False]
    assert [number_of(frame) for frame in clip.frames[8:]] == [24] * 8
    assert has_note(clip, "video ends 1000 ms early: 8 frames show its last frame")


def test_a_video_that_ends_after_the_last_wanted_frame_has_no_frame_to_hold(tmp_path):
    clip = read(write_media(tmp_path / "a.mkv", video(49), sound(2.0, codec="pcm_s16le")))
    assert clip.video_present.all()
    assert [note for note in clip.notes if "early" in note] == ["video ends 40 ms early"]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "libopus")])
def test_gaps_are_silence_and_what_follows_keeps_its_time(tmp_path, name, codec):
    pieces = [(0.0, tone(0.48)), (1.2, tone(0.8))]
    clip = read(write_media(tmp_path / name, video(), Audio(pieces, codec=codec)))
    assert has_note(clip, "1 gaps in the audio")
    assert loudness(clip, 0.05, 0.45) > 0.3
    assert loudness(clip, 0.55, 1.15) < 0.01
    assert loudness(clip, 1.25, 1.9) > 0.3
    gap = clip.waveform[round(0.55 * 16_000) : round(1.15 * 16_000)]
    assert (gap == 0).all()


@pytest.mark.parametrize(
    ("layout", "codec", "name", "level"),
    [
        ("mono", "aac", "a.mp4", 0.5),
        ("stereo", "aac", "a.mp4", 0.5),
        ("5.1", "aac", "a.mp4", 0.5),
        ("5.1", "ac3", "a.mkv", 0.5),
        ("stereo", "pcm_s16le", "a.mov", 0.5),
    ],
)
def test_any_number_of_channels_becomes_one(tmp_path, layout, codec, name, level):
    clip = read(write_media(tmp_path / name, video(), sound(layout=layout, codec=codec)))
    assert clip.waveform.ndim == 1
    assert loudness(clip, 0.2, 1.8) == pytest.approx(level / 2**0.5, rel=0.2)
    assert has_note(clip, "mixed to one") == (layout == "5.1")


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    left = np.concatenate([tone(1.0), np.zeros((1, 48_000), np.float32)])
    clip = read(write_media(tmp_path / "a.mov", video(25), Audio([(0, left)], codec="pcm_s16le", layout="stereo")))
    assert loudness(clip, 0.2, 0.8) == pytest.approx(0.25 / 2**0.5, rel=0.02)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_any_sample_rate(tmp_path, rate):
    clip = read(write_media(tmp_path / "a.mov", video(), sound(rate=rate, codec="pcm_s16le")))
    assert abs(len(clip.waveform) - 32_000) <= 1
    time = torch.arange(len(clip.waveform)) / 16_000
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * time)
    assert (clip.waveform - expected)[800:-800].abs().max() < 0.01, "same phase: not a sample out of place"


@pytest.mark.parametrize("kind", ["flt", "fltp", "s16", "s16p", "s32", "u8p"])
def test_joined_frames_are_the_samples_of_each(kind):
    import av

    from mirasol.media.audio import concatenate_frames

    generator, frames = np.random.default_rng(0), []
    for count in (1024, 7, 333):
        planar = kind.endswith("p")
        dtype = np.dtype(av.audio.frame.format_dtypes[kind])
        data = generator.integers(0, 100, (2, count) if planar else (1, 2 * count)).astype(dtype)
        frames.append(av.AudioFrame.from_ndarray(data, kind, "stereo"))
    assert (concatenate_frames(frames) == np.concatenate([frame.to_ndarray() for frame in frames], axis=1)).all()


# Pictures


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx")])
def test_variable_frame_rate(tmp_path, name, codec):
    times = [0.0, 0.1, 0.5, 0.55, 1.2, 1.9]
    clip = read(write_media(tmp_path / name, Video(ramp(6), times, codec=codec)))
    wanted = [time for chunk in clip.timeline.frame_times for time in chunk]
    expected = [max(k for k, time in enumerate(times) if time <= want) for want in wanted]
    assert [number_of(frame) for frame in clip.frames] == expected
    assert clip.frame_times.tolist() == pytest.approx([times[k] for k in expected], abs=1e-3)
    assert has_note(clip, "11 of 16 frames repeat")


def corner_picture() -> np.ndarray:
    """Black, 64 x 32, with a white patch in the stored top left corner."""
    picture = grey(0, 64, 32)
    picture[:14, :14] = 255
    return picture


CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


def white_corner(frame) -> str:
    """In which quadrant of the picture (without its borders) the white patch lies."""
    picture = frame.float().mean(0)
    rows, columns = (picture.amax(axis) > 128 for axis in (1, 0))
    place = (int(rows.nonzero().float().mean() > 15.5), int(columns.nonzero().float().mean() > 15.5))
    return next(name for name, corner in CORNERS.items() if corner == place)


@pytest.mark.parametrize(
    ("rotation", "corner", "words", "shown"),
    [
        (None, "top left", "0 degrees", (64, 32)),
        (90, "bottom left", "270 degrees clockwise", (32, 64)),
        (-90, "top right", "90 degrees clockwise", (32, 64)),
        (180, "bottom right", "180 degrees", (64, 32)),
    ],
)
def test_rotation_is_applied(tmp_path, rotation, corner, words, shown):
    path = write_media(tmp_path / "a.mp4", Video([corner_picture()] * 12, steady(12, 25), rotation=rotation))
    clip, facts = read(path), probe_media(path)
    assert (facts.video.rotation, facts.video.display_size) == (words, shown)
    assert white_corner(clip.frames[0]) == corner
    assert has_note(clip, f"rotation applied: {words}") == (rotation is not None)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("turn", [Orientation(*flags) for flags in itertools.product((False, True), repeat=3)])
@pytest.mark.parametrize(("width", "height"), [(60, 34), (34, 60), (40, 40), (21, 9)])
def test_a_drawn_frame_is_to_the_byte_what_pyav_scales_then_turned_and_centred(fit, turn, width, height):
    size = 24
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
    across, down = compute_fitted_size(width, height, size, fit)
    way = Interpolation.AREA if across <= width and down <= height else Interpolation.BILINEAR
    turned = turn.apply(frame.reformat(across, down, "gbrp", interpolation=way).to_ndarray())
    top, left = (abs(length - size) // 2 for length in turned.shape[:2])
    wanted = np.zeros((size, size, 3), np.uint8)
    onto = wanted[top : top + turned.shape[0]] if turned.shape[0] < size else wanted
    onto = onto[:, left : left + turned.shape[1]] if turned.shape[1] < size else onto
    rows = turned[top : top + size] if turned.shape[0] > size else turned
    onto[:] = rows[:, left : left + size] if turned.shape[1] > size else rows
    square = np.zeros((3, size, size), np.uint8)
    draw_square(frame, square, turn, fit, "file", VideoReformatter())
    assert np.array_equal(square.transpose(1, 2, 0), wanted)


def test_a_mirrored_picture_is_mirrored_back(tmp_path):
    import av

    def mirror(stream):
        one = 1 << 16
        stream.set_display_matrix([-one, 0, 0, 0, one, 0, 0, 0, 1 << 30])

    assert hasattr(av.VideoStream, "set_display_matrix")
    path = write_media(tmp_path / "a.mp4", Video([corner_picture()] * 12, steady(12, 25), prepare=mirror))
    clip = read(path)
    assert white_corner(clip.frames[0]) == "top right"
    assert has_note(clip, "rotation applied: mirrored")


def test_rotation_agrees_with_the_angle_that_pyav_reports(tmp_path):
    import av

    from mirasol.media.video import read_orientation

    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for rotation in (90, 180, -90):
        path = write_media(tmp_path / f"{rotation}.mp4", Video([corner_picture()], [0.0], rotation=rotation))
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        expected = np.rot90(picture, frame.rotation // 90)
        assert (read_orientation(frame)[0].apply(picture) == expected).all()


def test_non_square_pixels_are_stretched_before_the_picture_is_fitted(tmp_path):
    path = write_media(tmp_path / "a.mp4", Video([grey(255, 64, 64)] * 12, steady(12, 25), aspect=Fraction(2)))
    clip = read(path)
    rows = (clip.frames[0].float().mean((0, 2)) > 128).tolist()
    assert rows == [False] * 8 + [True] * 16 + [False] * 8, "shown 128 x 64: half as high as wide"
    assert has_note(clip, "sample aspect ratio 2 applied")
    assert probe_media(path).video.display_size == (128, 64)


def test_pad_crop_and_stretch(tmp_path):
    picture = grey(0, 128, 64)
    picture[:, 32:96] = 255  # the middle half is white
    path = write_media(tmp_path / "a.mp4", Video([picture] * 12, steady(12, 25)))
    bright = {fit: read(path, fit=fit).frames[0].float().mean(0) > 128 for fit in ("pad", "crop", "stretch")}
    assert bright["crop"].all()
    assert bright["stretch"].sum() == 16 * 32
    assert bright["pad"].sum() == 16 * 16
    assert not bright["pad"][:8].any()
    with pytest.raises(UserError, match="choose pad, crop, stretch"):
        read(path, fit="squash")


def test_one_frame(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        clip = read(write_media(tmp_path / name, video(1)))
        assert clip.timeline.num_chunks == 1
        assert [number_of(frame) for frame in clip.frames] == [0] * 4
        assert clip.video_present.all()
        assert has_note(clip, "3 of 4 frames repeat")


def test_one_frame_with_sound_is_held_but_not_taken_for_video(tmp_path):
    clip = read(write_media(tmp_path / "a.mp4", video(1), sound(2.0)))
    assert clip.video_present.tolist() == [True, False, False, False]
    assert len(clip.frames) == 16


# Containers


@pytest.mark.parametrize("audio_first", [False, True])
def test_ffmpegs_best_stream_is_read_and_the_others_noted(tmp_path, audio_first):
    small = video()
    large = Video([grey(200, 320, 240)] * 50, steady(50, 25))
    tracks = [sound(), small, large] if audio_first else [small, large, sound()]
    path = write_media(tmp_path / "a.mkv", *tracks)
    clip, facts = read(path), probe_media(path)
    import av

    with av.open(str(path)) as container:
        assert facts.video.index == container.streams.best("video").index
    assert has_note(clip, f"2 video streams: stream {facts.video.index} is read")
    assert facts.num_streams == 3


def test_cover_art_is_not_video(tmp_path):
    cover = Video([grey(255, 400, 400)], [0.0], codec="mjpeg", attached_picture=True)
    clip = read(write_media(tmp_path / "a.mp4", sound(), cover))
    assert len(clip.frames) == 0
    assert has_note(clip, "1 attached picture (cover art) not read as video")
    both = read(write_media(tmp_path / "b.mp4", video(), sound(), cover))
    assert number_of(both.frames[-1]) == 48


def test_no_duration_in_the_header(tmp_path):
    path = write_media(tmp_path / "a.mkv", video(), sound(), options={"live": "1"})
    facts = probe_media(path)
    assert facts.duration_measured
    assert facts.duration == pytest.approx(2.0, abs=0.05)
    clip = read(path)
    assert [number_of(frame) for frame in clip.frames][-1] in (47, 48)
    assert has_note(clip, "no reliable duration in the header")


def test_fragmented_mp4(tmp_path):
    path = write_media(tmp_path / "a.mp4", video(), sound(), options={"movflags": "frag_keyframe+empty_moov"})
    assert probe_media(path).duration == pytest.approx(2.0, abs=0.05)
    assert read(path).timeline.num_chunks == 4


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_a_container_that_starts_later_than_zero(tmp_path, name):
    path = write_media(tmp_path / name, video(start=5.0), sound(start=5.0))
    clip = read(path)
    assert probe_media(path).duration == pytest.approx(2.0, abs=0.05)
    assert clip.timeline.num_chunks == 4
    assert number_of(clip.frames[0]) in (0, 1)
    assert clip.frame_times[0] < 0.1
    assert clip.waveform_start < 0.01


@pytest.mark.parametrize("name", ["a.avi", "a.ts", "a.mov", "a.flv", "a.webm"])
def test_other_containers(tmp_path, name):
    codecs = {"a.avi": ("mpeg4", "libmp3lame", 44_100), "a.webm": ("libvpx-vp9", "libopus", 48_000)}
    picture, audio, rate = codecs.get(name, ("libx264", "aac", 44_100))
    clip = read(write_media(tmp_path / name, video(codec=picture), sound(codec=audio, rate=rate)))
    assert clip.timeline.num_chunks == 4
    assert [number_of(frame) for frame in clip.frames][-1] in (46, 47, 48)
    assert loudness(clip, 0.2, 1.8) == pytest.approx(0.5 / 2**0.5, rel=0.1)


@pytest.mark.parametrize(("name", "codec"), [("a.wav", "pcm_s16le"), ("a.mp3", "libmp3lame"), ("a.flac", "flac")])
def test_sound_files(tmp_path, name, codec):
    clip = read(write_media(tmp_path / name, sound(2.0, rate=44_100, codec=codec)))
    assert clip.timeline.num_chunks == 4
    assert clip.audio_present.all()
