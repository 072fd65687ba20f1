"""A file that is watched gives the chunks, and the answers, of the same file that is read."""

import itertools
import json

import numpy as np
import pytest
import torch
from media_making import Audio, Video, ramp, tone, write_media

from mirasol.app.live.chunks import LiveSettings
from mirasol.app.live.features import compute_chunk_tensors
from mirasol.app.live.source import LiveSource
from mirasol.cli.main import main
from mirasol.config.media import MediaConfig
from mirasol.media.clip import Clip
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.reader import read_window

# Of the spectrogram, float16 values of about [-1, 1]. Where a chunk begins between two samples, which never happens at
# these rates, sound may be one sample apart.
TOLERANCE = 1e-3
RATES = (23.976, 29.97, 50.0, 12.5, 8.0)


def draw_file(folder, seed: int):
    """A file as untidy as life: odd rates, streams that begin and end apart, or are absent, or have pauses."""
    random = np.random.default_rng(seed)
    seconds, offset = random.uniform(0.7, 4.2), random.choice([0.0, 0.0, 1.7])
    tracks = []
    if random.random() < 0.85:
        rate = random.choice(RATES)
        times = offset + np.arange(max(1, int(seconds * rate))) / rate
        if random.random() < 0.4:  # variable frame rate, with a pause
            kept = random.random(len(times)) < 0.6
            kept[0] = True
            times = times[kept]
        late = random.choice([0.0, 0.0, 0.31])
        pictures = ramp(len(times))
        b_frames = int(random.choice([0, 2]))
        tracks.append(Video(pictures, [float(time + late) for time in times], rate=round(rate), b_frames=b_frames))
    if random.random() < 0.85 or not tracks:
        rate = int(random.choice([8_000, 11_025, 16_000, 22_050, 44_100, 48_000]))
        length = seconds * random.choice([1.0, 1.0, 0.5])
        first = offset + random.choice([0.0, 0.0, 0.42])
        pieces = [(first, tone(length, rate, hertz=random.uniform(200, 2000)))]
        if random.random() < 0.3:
            pieces.append((first + length + 0.3, tone(0.5, rate)))
        tracks.append(Audio(pieces, rate=rate))
    name = random.choice(["clip.mp4", "clip.mkv", "clip.ts"])
    return write_media(folder / name, *tracks)


def draw_media(seed: int) -> MediaConfig:
    random = np.random.default_rng(seed + 1000)
    rate = int(random.choice([16_000, 8_000, 32_000]))
    if random.random() < 0.3:
        return MediaConfig(chunk_seconds=None, num_chunks=int(random.integers(2, 7)), sample_rate=rate)
    seconds = float(random.choice([0.5, 0.37, 1.0, 0.2]))
    return MediaConfig(chunk_seconds=seconds, frames_per_chunk=int(random.choice([4, 3])), sample_rate=rate)


def check_chunks(file, media: MediaConfig, read_all) -> None:
    extractor = MirasolFeatureExtractor(**media.to_dict())
    decoded = read_window(file, extractor.grid, image_size=media.image_size, sample_rate=media.sample_rate)
    whole = extractor.tensors(Clip.from_decoded(decoded))
    chunks, _ = read_all(LiveSource("file", str(file)), LiveSettings(media, fast=True))
    assert [chunk.number for chunk in chunks] == list(range(decoded.timeline.num_chunks))
    edges = [(chunk.start, chunk.end) for chunk in chunks]
    assert edges == list(itertools.pairwise(decoded.timeline.edges))
    rows = [compute_chunk_tensors(extractor, chunk) for chunk in chunks]
    for name, values in whole.items():
        streamed = torch.cat([row[name] for row in rows])
        if name == "audio":
            torch.testing.assert_close(streamed, values, atol=TOLERANCE, rtol=0)
        else:
            assert torch.equal(streamed, values), name


@pytest.mark.parametrize("seed", [*range(8), 152])  # 152: a chunk that is no number of hops, with sound after its edge
def test_chunks_are_those_of_the_offline_reader(tmp_path, read_all, seed):
    check_chunks(draw_file(tmp_path, seed), draw_media(seed), read_all)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 220))
def test_chunks_are_those_of_the_offline_reader_in_many_cases(tmp_path, read_all, seed):
    check_chunks(draw_file(tmp_path, seed), draw_media(seed), read_all)


def test_answers_are_those_of_ask(capsys, here, untrained, shapes, tmp_path):
    clip = str(sorted((shapes / "clips" / "test").iterdir())[0])
    questions = ["what colour is the circle?", "which sound is heard first?"]
    record = tmp_path / "events.jsonl"
    lines = {}
    for name, arguments in {"ask": ["ask"], "stream": ["ask", "--stream"], "watch": ["watch", "--fast"]}.items():
        command, *more = arguments
        more += ["--record", str(record)] if command == "watch" else []
        capsys.readouterr()
        main([command, str(untrained), clip, *questions, *more, "--json", "--max-new-tokens", "4"])
        lines[name] = capsys.readouterr().out.splitlines()
    lines["watch"] = record.read_text().splitlines()  # where answers that have not changed are, too
    expected = [json.loads(line) for line in lines["ask"]]
    for name in ("stream", "watch"):
        answers = [found for found in map(json.loads, lines[name]) if "answer" in found][-len(questions) :]
        for found, wanted in zip(answers, expected, strict=True):
            assert (found["question"], found["answer"]) == (wanted["question"], wanted["answer"])
            assert found["probability"] == pytest.approx(wanted["probability"], rel=1e-3)
            assert found["not_sure"] == wanted["not_sure"]
