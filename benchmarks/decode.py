"""Reading media, compared with bare decoding: `python benchmarks/decode.py`.

Ours: one pass over video and audio to model-ready tensors (frames fitted, waveform resampled, log-mel, batch). Bare:
PyAV decodes the video of the same file and resizes exactly the frames that ours keeps, without audio. Both alternate on
one thread; each figure is the best of all repeats, in processor seconds, those of the decoder process included, which
other work on the machine disturbs little. The files are rendered here, so that the benchmark runs anywhere. Writes
benchmarks/results/decode.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from _measure import describe_surroundings, find_descendants, make_parser, measure_processor_seconds

if TYPE_CHECKING:
    from mirasol import MirasolFeatureExtractor

GOAL = 0.8
# name: width, height, frames per second, seconds, and the settings of the model that reads it
FILES = {
    "160x120, 15 fps, 5 s, demo model": (
        160,
        120,
        15,
        5,
        {"image_size": 32, "frames_per_chunk": 4, "chunk_seconds": 0.5},
    ),
    "640x360, 25 fps, 20 s, 128 frames of 224": (640, 360, 25, 20, {"image_size": 224}),
    "1280x720, 30 fps, 10 s, 128 frames of 224": (1280, 720, 30, 10, {"image_size": 224}),
    "1280x720, 30 fps, 10 s, 128 frames of 448": (1280, 720, 30, 10, {"image_size": 448}),
}
LARGE_MODEL = {
    "frames_per_chunk": 8,
    "chunk_seconds": None,
    "num_chunks": 16,
    "num_mel_bins": 128,
    "spectrogram_frames": 32,
}


def render(path: Path, width: int, height: int, rate: int, seconds: int) -> None:
    """A drifting texture with film grain and a noisy tone: H.264 and AAC at the bit rates of ordinary web video."""
    import av
    import numpy as np

    generator = np.random.default_rng(0)
    texture = generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    grain = generator.integers(0, 12, texture.shape, dtype=np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"preset": "fast"})
        video.width, video.height, video.pix_fmt = texture.shape[1], texture.shape[0], "yuv420p"
        audio = container.add_stream("aac", rate=44_100)
        audio.layout = "stereo"
        for index in range(rate * seconds):
            picture = np.roll(texture, (index, 2 * index), axis=(0, 1)) // 2 + np.roll(grain, 7 * index, axis=1)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        times = np.arange(44_100 * seconds) / 44_100
        wave = 0.3 * np.sin(2 * np.pi * 440 * times) + generator.normal(0, 0.02, len(times))
        for start in range(0, len(wave), 1024):
            part = np.tile(wave[start : start + 1024].astype(np.float32), (2, 1))
            frame = av.AudioFrame.from_ndarray(part, "fltp", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = 44_100, start, Fraction(1, 44_100)
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def decode_bare(path: Path, kept: set[float], size: int) -> int:
    """Decodes the video and resizes the frames at the given times to `size` wide; returns the frames resized."""
    import av
    import torch
    from av.video.reformatter import Interpolation, VideoReformatter

    count, reformatter = 0, VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.best("video")  # like ours: a file may have several streams
        stream.codec_context.thread_count = 1
        height = max(1, round(stream.height * size / stream.width))
        for frame in container.decode(stream):
            if round(frame.time, 6) in kept:
                small = reformatter.reformat(frame, size, height, "rgb24", interpolation=Interpolation.AREA, threads=1)
                torch.from_numpy(small.to_ndarray())
                count += 1
    return count


def compare(path: Path, extractor: MirasolFeatureExtractor, repeats: int) -> dict[str, float]:
    """Processor time of reading one file in either way, and the ratio of the frame rates."""
    clip = extractor.read(path)
    kept = {round(float(t), 6) for t in clip.frame_times.unique()}
    seconds = {"ours": [], "bare": []}
    decoders = find_descendants([os.getpid()])[1:]
    for _ in range(repeats):
        begin = measure_processor_seconds(decoders)
        extractor(extractor.read(path, threads=1))
        middle = measure_processor_seconds(decoders)
        count = decode_bare(path, kept, extractor.image_size)
        seconds["ours"].append(middle - begin)
        seconds["bare"].append(measure_processor_seconds(decoders) - middle)
        assert count == len(kept), (count, len(kept))
    ours, plain = min(seconds["ours"]), min(seconds["bare"])
    return {
        "frames_kept": len(kept),
        "frames_decoded": clip.video_counts.frames_decoded,
        "seconds_of_media": clip.timeline.end,
        "ours_ms": round(ours * 1000, 2),
        "bare_ms": round(plain * 1000, 2),
        "ours_frames_per_second": round(len(kept) / ours, 1),
        "bare_frames_per_second": round(len(kept) / plain, 1),
        "ratio": round(plain / ours, 3),
    }


def describe_libraries() -> dict[str, str]:
    """Hardware, commit and versions, those of PyAV and FFmpeg included."""
    import av

    import mirasol

    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return describe_surroundings() | {"mirasol": mirasol.__version__, "av": av.__version__, "libavcodec": codec}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("decode", __doc__)
    parser.add_argument("--repeats", type=int, default=9, help="how often each file is read in either way")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)

    import torch

    from mirasol import MirasolFeatureExtractor

    torch.set_num_threads(1)
    results, repeats = {}, 1 if options.quick else options.repeats
    files = list(FILES.items())[: 1 if options.quick else None]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (width, height, rate, seconds, settings)) in enumerate(files):
            path = Path(folder) / f"{number}.mp4"
            render(path, width, height, rate, seconds)
            large = {} if "chunk_seconds" in settings else LARGE_MODEL
            results[name] = compare(path, MirasolFeatureExtractor(**large, **settings), repeats)
            row = results[name]
            print(f"{name}: ours {row['ours_ms']} ms, bare {row['bare_ms']} ms, ratio {row['ratio']} (goal {GOAL})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = {"goal": GOAL, "surroundings": describe_libraries(), "results": results}
    options.out.write_text(json.dumps(data, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
