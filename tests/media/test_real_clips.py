"""The reader against real clips of many makers, whose facts a manifest states (MIRASOL_REAL_DATA)."""

import json

import numpy as np
import pytest
import torch

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
LEFT_OUT = "lie beyond the last whole chunk and are not read"
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
    "sample_with_vorbis_audio.mkv": (f"the last 0.072 s {LEFT_OUT}", "audio begins 62 ms late"),
}


@pytest.fixture(params=NAMES)
def real(request, real_data):
    """Path, manifest entry, its video and its audio facts (none where absent)."""
    manifest = json.loads((real_data / "clips" / "manifest.json").read_text())
    entry = next(clip for clip in manifest["clips"] if clip["file"] == request.param)
    streams = {stream["index"]: stream for stream in entry["streams"]}
    video, audio = (streams.get(entry[f"ffmpeg_best_{kind}_stream"]) for kind in ("video", "audio"))
    return real_data / "clips" / request.param, entry, video, audio


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
