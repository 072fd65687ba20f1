"""Sound of any number of channels in any layout becomes one channel by one of three rules, and the process survives."""

import json
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from av.audio.plane import AudioPlane
from media_making import Audio, tone, write_media

from mirasol import ChunkGrid, read_clip
from mirasol.media.audio import WaveformBuilder, concatenate_frames

GRID = ChunkGrid(1, chunk_seconds=0.5)
RATE = 48_000
MIXED_BY_FFMPEG = [
    *("1 channels", "mono", "2 channels", "stereo", "downmix", "2.1", "3.0", "3.0(back)", "3.1", "3.1.2", "4.0", "4.1"),
    *("quad", "quad(side)", "5.0", "5.0(side)", "5.1", "5.1(side)", "5.1.2", "5.1.2(back)", "6.0", "6.0(front)"),
    *("hexagonal", "6.1", "6.1(back)", "6.1(front)", "7.0", "7.0(front)", "7.1", "7.1(wide)", "7.1(wide-side)"),
    *("octagonal", "7.1.2"),
]
KINDS = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}


def frame_of(samples: np.ndarray, kind: str, layout: str, position: int = 0) -> av.AudioFrame:
    """A frame of float samples [channel, sample]; written plane by plane, as `from_ndarray` writes too many."""
    dtype = KINDS[kind.removesuffix("p")]
    if dtype is np.uint8:
        samples = samples * 127 + 128
    elif np.issubdtype(dtype, np.integer):
        samples = samples * np.iinfo(dtype).max
    samples = samples.astype(dtype)
    frame = av.AudioFrame(format=kind, layout=layout, samples=samples.shape[1], align=1)
    planes = list(samples) if kind.endswith("p") else [samples.T.reshape(-1)]
    for number, plane in enumerate(planes):
        AudioPlane(frame, number).update(np.ascontiguousarray(plane).tobytes())
    frame.sample_rate, frame.pts, frame.time_base = RATE, position, Fraction(1, RATE)
    return frame


class Decoder:
    """Stands in for an audio stream and its decoder: each packet is a frame already."""

    time_base = Fraction(1, RATE)

    def __init__(self):
        self.codec_context = self

    def decode(self, packet):
        return [] if packet is None else [packet.frame]


class Packet:
    def __init__(self, frame):
        self.frame, self.pts, self.dts, self.duration = frame, frame.pts, frame.pts, frame.samples


def mix(frames) -> tuple[np.ndarray, WaveformBuilder]:
    builder = WaveformBuilder(Decoder(), 0.0, sum(frame.samples for frame in frames) / RATE, RATE)
    for frame in frames:
        builder.feed(Packet(frame))
    builder.finish()
    return builder.result()[0], builder


def noise(channels: int, samples: int = 4800) -> np.ndarray:
    return np.random.default_rng(channels).uniform(-0.5, 0.5, (channels, samples)).astype(np.float32)


@pytest.mark.parametrize("kind", ["u8", "u8p", "s16", "s16p", "s32", "s32p", "flt", "fltp", "dbl", "dblp"])
@pytest.mark.parametrize("channels", [*range(3, 18), 24, 41, 64])
def test_channels_of_no_known_layout_are_averaged(channels, kind):
    samples = noise(channels)
    mixed, builder = mix([frame_of(samples, kind, f"{channels} channels")])
    assert np.abs(mixed - samples.mean(axis=0)).max() < (0.01 if kind.startswith("u8") else 1e-4)
    assert builder.mixed_from == f"{channels} channels ({channels} channels)"
    assert "mean of its channels" in builder.mixing


@pytest.mark.parametrize("kind", ["s16p", "flt", "fltp"])
@pytest.mark.parametrize("name", MIXED_BY_FFMPEG)
def test_the_same_sound_in_all_channels_keeps_its_level(name, kind):
    layout = av.AudioLayout(name)
    wave = np.tile(noise(1), (layout.nb_channels, 1))
    low = np.array([channel.name == "LFE" for channel in layout.channels])
    wave[low & (layout.nb_channels > 1)] = 0.9
    mixed, _ = mix([frame_of(wave, kind, name)])
    assert np.abs(mixed - wave[0]).max() < 2e-3, "low frequencies are left out"
    alone = np.zeros_like(wave)
    for number in np.flatnonzero(~low):
        alone[:] = 0
        alone[number] = wave[number]
        assert np.abs(mix([frame_of(alone, kind, name)])[0]).max() > 0.02, f"channel {number} is heard"


@pytest.mark.parametrize("name", ["cube", "5.1.4", "7.1.4", "7.2.3", "9.1.6", "hexadecagonal", "22.2"])
def test_layouts_of_which_ffmpeg_drops_channels_are_averaged(name):
    layout = av.AudioLayout(name)
    samples = noise(layout.nb_channels)
    heard = samples[["LFE" not in channel.name for channel in layout.channels]]
    mixed, builder = mix([frame_of(samples, "fltp", name)])
    assert np.abs(mixed - heard.mean(axis=0)).max() < 1e-4
    assert builder.mixed_from == f"{layout.nb_channels} channels ({name})"


@pytest.mark.parametrize(("order", "channels"), [(1, 4), (2, 9), (3, 16)])
def test_of_ambisonic_sound_the_omnidirectional_channel_is_read(order, channels):
    samples = noise(channels)
    mixed, builder = mix([frame_of(samples, "fltp", f"ambisonic {order}")])
    assert np.abs(mixed - samples[0]).max() < 1e-4
    assert "omnidirectional" in builder.mixing


def test_a_layout_that_changes_midway():
    layouts = ["stereo", "7.1", "12 channels", "mono", "octagonal"]
    wave = noise(1, 9600)
    frames = [
        frame_of(np.tile(wave, (av.AudioLayout(name).nb_channels, 1)), "fltp", name, 9600 * k)
        for k, name in enumerate(layouts)
    ]
    for frame, name in zip(frames, layouts, strict=True):
        if name == "7.1":
            AudioPlane(frame, 3).update(np.zeros(9600, np.float32).tobytes())
    mixed, builder = mix(frames)
    assert np.abs(mixed - np.tile(wave[0], 5)).max() < 2e-3
    assert builder.counts.changes == 4


@pytest.mark.parametrize("channels", [7, 8, 9, 16, 64])
def test_planes_are_exactly_those_of_the_channels(channels):
    frames = [frame_of(noise(channels, count), "fltp", f"{channels} channels") for count in (100, 33)]
    wanted = np.concatenate([noise(channels, count) for count in (100, 33)], axis=1)
    assert np.array_equal(concatenate_frames(frames), wanted)


FILES = [
    ("a.m4a", "aac", "7.1"),
    ("a.opus", "libopus", "7.1"),
    ("a.mkv", "pcm_s16le", "7.1"),
    ("a.wav", "pcm_s16le", "16 channels"),
    ("a.mov", "pcm_s16le", "24 channels"),
    ("b.mkv", "pcm_s16le", "64 channels"),
    ("a.flac", "flac", "7.1"),
]
READ_ALL = """
import json, sys
from mirasol import ChunkGrid, read_clip
for path in sys.argv[1:]:
    clip = read_clip(path, ChunkGrid(1, chunk_seconds=0.5), image_size=16, threads=1)
    level = clip.waveform[2000:-2000].square().mean().sqrt()
    print(json.dumps([len(clip.waveform), float(level), clip.notes]))
"""


def test_files_of_many_channels_in_a_process_of_their_own(tmp_path):
    paths = []
    for name, codec, layout in FILES:
        sound = Audio([(0, tone(1.0, channels=av.AudioLayout(layout).nb_channels))], codec=codec, layout=layout)
        paths.append(str(write_media(tmp_path / name, sound)))
    answer = subprocess.run([sys.executable, "-c", READ_ALL, *paths], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    for line, (_, _, layout) in zip(answer.stdout.splitlines(), FILES, strict=True):
        length, level, notes = json.loads(line)
        assert abs(length - 16_000) < 200
        assert level == pytest.approx(0.5 / 2**0.5, rel=0.2)
        channels = av.AudioLayout(layout).nb_channels
        assert any(f"audio of {channels} channels" in note and "mixed to one" in note for note in notes)


@pytest.mark.parametrize("name", ["m71.m4a", "m71.opus", "m16.opus"])
def test_reported_files_of_many_channels(faults, name):
    clip = read_clip(faults / name, GRID, image_size=16, threads=1)
    assert clip.audio_present.all()
    assert any("mixed to one" in note for note in clip.notes)
