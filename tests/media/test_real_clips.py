"""The reader against clips whose facts a manifest states: real ones of many makers (MIRASOL_REAL_DATA), and for
everyone clips with the same irregularities that are encoded here."""

import json

import av
import numpy as np
import pytest
import torch
from made_once import make_once
from media_making import Audio, Video, grey, ramp, steady, write_media

from mirasol import MirasolFeatureExtractor, read_clip
from mirasol.media.reader import probe_media
from mirasol.media.timeline import ChunkGrid

NAMES = [
    "nasa_13013.mp4",
    "stream-of-water.mp4",
    "friday.mp4",
    "no_duration.webm",
    "muted_b.mp4",
    "fire2.mp4",
    "rabbit320.webm",
    "sample_with_vorbis_audio.mkv",
]

HELD = "past the end: last frame held, silence"
LEFT_OUT = "are ignored: too short for another chunk"
NEWER = "frames repeat the one before: the video has no newer frame then"
# All notes of a reading in chunks of half a second, four frames each.
NOTES = {
    "nasa_13013.mp4": (
        "2 video streams: stream 3 is read, not 0",
        "2 audio streams: stream 4 is read, not 1",
        f"the last 0.056 s {LEFT_OUT}",
    ),
    "stream-of-water.mp4": (f"the last 0.158 s {LEFT_OUT}",),
    "friday.mp4": (f"the last 0.166 s {LEFT_OUT}",),
    "no_duration.webm": (
        "no reliable duration in the header: 4.938 s by reading packets",
        f"the last chunk reaches 0.062 s {HELD}",
        "audio begins 15 ms late",
        "audio ends 63 ms early",
    ),
    "muted_b.mp4": ("no audio track",),
    "fire2.mp4": (
        f"the last chunk reaches 0.120 s {HELD}",
        f"1 of 20 {NEWER}",
        "rotation applied: 180 degrees",
        "1 gaps in the audio, 155 ms, are silence",
    ),
    "rabbit320.webm": (
        f"the last chunk reaches 0.200 s {HELD}",
        f"1 of 64 {NEWER}",
        "audio ends 17 ms early",
        "1 gaps in the audio, 20 ms, are silence",
        "1 audio packets overlap the one before: the later one counts",
        "5 times the audio's time stamps jumped and came back: taken as continuous",
    ),
    "two_of_each.mkv": (
        "2 video streams: stream 2 is read, not 0",
        "2 audio streams: stream 1 is read, not 3",
        f"the last chunk reaches 0.090 s {HELD}",
        "video ends 10 ms early: 1 frames show its last frame",
        "audio ends 21 ms early",
    ),
    "upside_down_with_a_gap.mp4": (
        f"the last 0.170 s {LEFT_OUT}",
        f"2 of 20 {NEWER}",
        "rotation applied: 180 degrees",
        "audio ends 20 ms early",
        "1 gaps in the audio, 176 ms, are silence",
    ),
    "no_duration.mkv": (
        "no reliable duration in the header: 4.907 s by reading packets",
        f"the last chunk reaches 0.093 s {HELD}",
    ),
    "muted.mp4": ("no audio track",),
    "late_vorbis.mkv": ("audio begins 62 ms late", "audio ends 37 ms early"),
    "sample_with_vorbis_audio.mkv": (f"the last 0.072 s {LEFT_OUT}", "audio begins 62 ms late"),
}


# Clips that are encoded here: their tracks, the video and audio stream that FFmpeg prefers, options of the container.
SLOW = [0.0, *np.cumsum([0.08, 0.1, 0.1, 0.1, 0.35, *[0.1] * 19]).round(3).tolist()]


def hiss(seconds: float, channels: int = 1, rate: int = 48_000) -> np.ndarray:
    """Noise, which is like itself at no other time."""
    noise = np.random.default_rng(0).standard_normal(round(seconds * rate)).astype(np.float32) / 8
    return np.tile(noise, (channels, 1))


def prefer(stream) -> None:
    stream.disposition = av.stream.Disposition.default


MADE = {
    "two_of_each.mkv": (
        [
            Video(ramp(60), steady(60, 25)),
            Audio([(0, hiss(112 * 1024 / 48_000))]),
            Video([grey(10 + k, 160, 120) for k in range(60)], steady(60, 25), prepare=prefer),
            Audio([(0, hiss(112 * 1024 / 48_000, channels=2))], layout="stereo"),
        ],
        (2, 1),
        {},
    ),
    "upside_down_with_a_gap.mp4": (
        [Video(ramp(25), SLOW, rotation=180), Audio([(0, hiss(1.024)), (1.2, hiss(1.28))])],
        (0, 1),
        {},
    ),
    "no_duration.mkv": (
        [Video(ramp(74), steady(74, 15), codec="libvpx"), Audio([(0.0, hiss(4.9))], codec="libopus")],
        (0, 1),
        {"live": "1"},
    ),
    "muted.mp4": ([Video(ramp(50), steady(50, 25), b_frames=2)], (0, None), {}),
    "late_vorbis.mkv": (
        [
            Video(ramp(50), steady(50, 25)),
            Audio([(0.0625, hiss(1.9, channels=2, rate=44_100))], 44_100, "vorbis", "stereo"),
        ],
        (0, 1),
        {},
    ),
}
CODECS = {"libx264": "h264", "libvpx": "vp8", "libopus": "opus"}


def facts_of(index: int, track: Video | Audio) -> dict:
    """A row of the manifest."""
    if isinstance(track, Audio):
        start, samples = track.pieces[-1]
        return {
            "index": index, "codec": CODECS.get(track.codec, track.codec), "sample_rate": track.rate,
            "channels": len(samples), "first_time_s": track.pieces[0][0],
            "end_time_s": start + samples.shape[1] / track.rate,
        }  # fmt: skip
    height, width = track.pictures[0].shape[:2]
    return {
        "index": index, "codec": CODECS[track.codec], "width": width, "height": height,
        "rotation_deg": track.rotation or 0, "decoded_frames": len(track.pictures), "first_time_s": track.times[0],
        "last_time_s": track.times[-1], "frame_gap_s": {"median": float(np.median(np.diff(track.times)))},
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the clips that are encoded here."""

    def make(folder):
        folder.mkdir()
        for name, (tracks, _, options) in MADE.items():
            write_media(folder / name, *tracks, options=options)

    return make_once(tmp_path_factory, "clips-with-facts", make)


@pytest.fixture(params=[*MADE, *NAMES])
def real(request, made):
    """Path, manifest entry, its video and its audio facts (none where absent)."""
    if request.param in MADE:
        tracks, best, options = MADE[request.param]
        streams = [facts_of(*numbered) for numbered in enumerate(tracks)]
        ends = [stream["end_time_s"] for stream in streams if "end_time_s" in stream]
        entry = {"streams": streams, "duration_s": None if options else max([*ends, streams[best[0]]["last_time_s"]])}
        folder = made
    else:
        folder = request.getfixturevalue("real_data") / "clips"
        clips = json.loads((folder / "manifest.json").read_text())["clips"]
        entry = next(clip for clip in clips if clip["file"] == request.param)
        best = entry["ffmpeg_best_video_stream"], entry["ffmpeg_best_audio_stream"]
    streams = {stream["index"]: stream for stream in entry["streams"]}
    return folder / request.param, entry, *(streams.get(index) for index in best)


def test_probe_agrees_with_the_manifest(real):
    path, entry, video, audio = real
    facts = probe_media(path)
    assert facts.num_streams == len(entry["streams"])
    assert (facts.video.index, facts.video.width, facts.video.height) == (
        video["index"],
        video["width"],
        video["height"],
    )
    assert facts.video.codec == video["codec"]
    assert (facts.video.rotation == "180 degrees") == (abs(video["rotation_deg"]) == 180)
    if audio is None:
        assert facts.audio is None
    else:
        assert all(getattr(facts.audio, name) == audio[name] for name in ("index", "sample_rate", "channels"))
    ends = [stream["end_time_s"] for stream in (audio,) if stream] + [video["last_time_s"]]
    assert facts.duration == pytest.approx(entry["duration_s"] or max(ends), abs=0.1)
    assert facts.duration_measured == (entry["duration_s"] is None)


def test_every_frame_and_sample_has_its_time(real):
    path, _, video, audio = real
    facts = probe_media(path)
    # Cells far shorter than a frame: every frame of the file is the answer to some wanted time.
    clip = read_clip(path, ChunkGrid(round(facts.duration / 0.004), num_chunks=1), image_size=32, threads=1)
    times = clip.frame_times.unique()
    assert len(times) == video["decoded_frames"]
    assert float(times[0]) == pytest.approx(video["first_time_s"], abs=1e-3)
    assert float(times[-1]) == pytest.approx(video["last_time_s"], abs=2e-3)
    gaps = np.diff(times.numpy())
    assert np.median(gaps) == pytest.approx(video["frame_gap_s"]["median"], abs=2e-3)
    if audio is None:
        assert len(clip.waveform) == 0
    else:
        # Vorbis stamps of some makers jump to and fro by up to 12 ms; the reader takes their median.
        slack = 12e-3 if audio["codec"] == "vorbis" else 2e-3
        assert clip.waveform_start == pytest.approx(audio["first_time_s"], abs=slack)
        end = clip.waveform_start + len(clip.waveform) / clip.sample_rate
        assert end == pytest.approx(min(audio["end_time_s"], facts.duration), abs=slack + 3e-3)


def test_irregularities_are_noted(real):
    path, *_ = real
    assert MirasolFeatureExtractor().read(path).notes == NOTES[path.name]


def test_model_ready_tensors_are_finite_and_alive(real):
    path, *_ = real
    extractor = MirasolFeatureExtractor()
    batch = extractor(extractor.read(path))
    assert torch.isfinite(batch["video"]).all()
    assert torch.isfinite(batch["audio"]).all()
    assert batch["video_mask"].any()


def test_a_window_equals_the_same_part_of_the_whole(real):
    path, *_ = real
    duration = probe_media(path).duration
    start, grid = duration * 0.4, ChunkGrid(8, num_chunks=2)
    part = read_clip(path, grid, image_size=32, start=start, end=start + duration / 4, threads=1)
    whole = read_clip(path, ChunkGrid(3000, num_chunks=1), image_size=32, threads=1)
    for time, frame in zip(part.frame_times, part.frames, strict=True):
        match = (whole.frame_times - time).abs().argmin()
        assert abs(float(whole.frame_times[match] - time)) < 1e-6
        assert torch.equal(frame, whole.frames[match])
    if part.has_audio:
        assert abs(delay(part, whole)) <= 0.005


def delay(part, whole) -> float:
    """Seconds by which the sound of `part` lies later than the same sound in `whole`, by cross-correlation."""
    first = round((part.waveform_start - whole.waveform_start) * whole.sample_rate)
    reach = 400
    middle = part.waveform[reach:-reach]
    around = whole.waveform[first : first + len(part.waveform)]
    match = torch.nn.functional.conv1d(around[None, None], middle[None, None])[0, 0]
    return (reach - int(match.argmax())) / whole.sample_rate if match.max() > 0 else 0.0
