"""What a stream costs: `python benchmarks/stream.py`.

One more chunk after 63 against encoding all 64 again, the 1,000th chunk against the 10th, and the growth of resident
memory from chunk 64 to chunk 1,024. One thread, processor time, but for memory. The two sides of a ratio are taken
turn about in one run, and their medians are compared. Each case runs in a process of its own, between two calibrations;
where these differ by more than 10% it is run again, and marked where that did not help.

Cases are two sizes (`tiny`, and `middle`, 20 million weights) and every kind of Combiner, with weights that nobody
trained: time does not depend on them. A window of 8 chunks bounds the Combiner, the latent model and the latents kept.
Writes benchmarks/results/stream.json and stream.md.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, calibrate, quartiles, run_json, surroundings, table, write_results

from mirasol.config.model import MirasolConfig
from mirasol.model.mirasol import MirasolForConditionalGeneration
from mirasol.model.sizes import flops, stream_flops
from mirasol.model.streaming import MirasolStream

GOALS = {"encoding all over one more chunk": 25.0, "chunk 1000 over chunk 10": 1.1, "growth, MiB": 1.0}
WINDOW = 8
CHUNKS = 64
DRIFT, TRIES = 0.10, 3


def middle_parts() -> dict[str, Any]:
    """A model between `tiny` and the paper's: 84 tokens a chunk, width 256."""

    def stack(depth: int) -> dict[str, Any]:
        return {"depth": depth, "width": 256, "hidden": 1024, "heads": 4, "head_width": 64}

    return {
        "video": {
            "image_size": 64, "frames_per_chunk": 4,
            "tubes": [
                {"kernel": (4, 16, 16), "stride": (4, 8, 8)},
                {"kernel": (1, 16, 16), "stride": (4, 16, 16)},
            ],
        },
        "audio": {"num_mel_bins": 64, "spectrogram_frames": 16, "patch": (8, 16), "adapter": stack(2)},
        "vit": stack(6),
        "combiner": {"stack": stack(4), "m": 16},
        "latent": {"stack": stack(4)},
        "reconstruction": {"stack": stack(2), "image_size": 32, "patch": (4, 8, 8)},
        "text": {"stack": stack(4), "vocab_size": 4096},
    }  # fmt: skip


SIZES = {"tiny": dict, "middle": middle_parts}
TTM = {"read_tokens": 32, "memory_tokens": 16, "hidden": 128, "heads": 4, "head_width": 32}
COMBINERS = {
    "transformer": {},
    "transformer of a chunk": {"scope": "chunk"},
    "cls": {"kind": "cls"},
    "perceiver": {"kind": "perceiver"},
    "ttm": {"kind": "ttm", "ttm": TTM},
}


def configured(size: str, combiner: str) -> MirasolConfig:
    parts = SIZES[size]()
    return MirasolConfig.preset("tiny", **parts | {"combiner": parts.get("combiner", {}) | COMBINERS[combiner]})


def build(size: str, combiner: str) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(configured(size, combiner)).eval()


def chunk(model: MirasolForConditionalGeneration, chunks: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Video and audio of one chunk, or of a clip of several."""
    video, audio = model.config.video, model.config.audio
    shape = (1,) if chunks is None else (1, chunks)
    pixels = (video.frames_per_chunk, 3, video.image_size, video.image_size)
    return torch.randn(*shape, *pixels), torch.randn(*shape, audio.spectrogram_frames, audio.num_mel_bins)


def milliseconds(work: Callable[[], Any]) -> float:
    """Of the processor."""
    begin = time.process_time()
    work()
    return 1000 * (time.process_time() - begin)


@torch.no_grad()
def against_encoding_all(model: MirasolForConditionalGeneration, repeats: int, chunks: int) -> dict[str, Any]:
    """Chunks of a stream, in the middle of them number `chunks`, and a clip of `chunks`, turn about; no window."""
    there, clip, one = torch.ones(1, chunks, dtype=torch.bool), chunk(model, chunks), chunk(model)
    stream = advanced(model, chunks - 2 - repeats // 2)
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        times[0].append(milliseconds(lambda: stream.append(*one)))
        times[1].append(milliseconds(lambda: model.encode(*clip, there, there, there)))
    more, everything = (taken[1:] for taken in times)  # the first is for warming up
    work = sum(stream_flops(model.config, chunks - 1).values())
    whole = sum(flops(model.config, chunks, 1)[part] for part in stream_flops(model.config, 0))
    return {
        "one more chunk, ms": quartiles(more),
        "encoding all, ms": quartiles(everything),
        "ratio": statistics.median(everything) / statistics.median(more),
        "ratio of FLOPs": whole / work,
    }


def advanced(model: MirasolForConditionalGeneration, chunks: int, window: int | None = None) -> MirasolStream:
    """A stream some chunks on, all chunks the same noise."""
    return advance(model.stream(1, window), chunk(model), chunks)


def advance(stream: MirasolStream, one: tuple[torch.Tensor, torch.Tensor], chunks: int) -> MirasolStream:
    for _ in range(chunks):
        stream.append(*one)
    return stream


def late_against_early(
    model: MirasolForConditionalGeneration, repeats: int, early: int, start: int, late: int
) -> dict[str, Any]:
    """With the window: the chunks from number `early` of one stream on and from number `late` of another, turn about;
    and the memory that comes on in the other from chunk `start` to its end."""
    one, times = chunk(model), [[], []]
    streams = [advanced(model, early - 1, WINDOW), advanced(model, start, WINDOW)]
    before, own = resident_mib(), sum(streams[1].state_bytes.values())
    advance(streams[1], one, late - 1 - start)
    for _ in range(repeats):
        for stream, taken in zip(streams, times, strict=True):
            taken.append(milliseconds(lambda stream=stream: stream.append(*one)))
    return {
        f"chunk {early}, ms": quartiles(times[0]),
        f"chunk {late}, ms": quartiles(times[1]),
        "ratio": statistics.median(times[1]) / statistics.median(times[0]),
        "growth": {
            "chunks": [start, streams[1].chunks],
            "resident, MiB": resident_mib() - before,
            "state, MiB": (sum(streams[1].state_bytes.values()) - own) / 2**20,
        },
        "state at the end, KiB": {part: size / 1024 for part, size in streams[1].state_bytes.items()},
    }


def resident_mib() -> float:
    """Resident memory now, where the system says it; its peak elsewhere."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(size: str, combiner: str, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = build(size, combiner)
    chunks, early, late, repeats = (8, 10, 12, 2) if quick else (CHUNKS, 10, 1000, 7)
    before = calibrate()
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "against encoding all": against_encoding_all(model, repeats, chunks),
        "late against early": late_against_early(model, 4 * repeats, early, chunks, late),
    }
    after = calibrate()
    valid = abs(after / before - 1) <= DRIFT
    return result | {"calibration_gflop_per_second": {"before": before, "after": after, "valid": valid}}


def measured(size: str, combiner: str) -> dict[str, Any]:
    """One case in a process of its own, again where the machine's speed drifted; how often it was tried is kept."""
    for tries in range(1, TRIES + 1):
        result = run_json(__file__, ["--case", "--size", size, "--combiner", combiner]) | {"tries": tries}
        if result["calibration_gflop_per_second"]["valid"]:
            break
    return result


def as_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for case, result in results.items():
        against, late = result["against encoding all"], result["late against early"]
        rows.append([
            case,
            f"{against['one more chunk, ms']['median']:.1f}",
            f"{against['encoding all, ms']['median']:.1f}",
            f"{against['ratio']:.1f}",
            f"{against['ratio of FLOPs']:.1f}",
            f"{late['ratio']:.3f}",
            f"{late['growth']['resident, MiB']:.2f}",
            "yes" if result["calibration_gflop_per_second"]["valid"] else "no",
        ])  # fmt: skip
    return table(
        [
            "case",
            "one more chunk, ms",
            "encoding all, ms",
            "ratio",
            "ratio of FLOPs",
            "late / early chunk",
            "growth, MiB",
            "valid",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few chunks of the tiny model: whether it runs at all")
    parser.add_argument("--size", choices=SIZES, help="only this size")
    parser.add_argument("--combiner", choices=COMBINERS, help="only this Combiner")
    parser.add_argument("--case", action="store_true", help="run one case here and print it as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS / "stream.json")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.size, arguments.combiner, quick=False)))
        return
    sizes = [arguments.size] if arguments.size else ["tiny"] if arguments.quick else list(SIZES)
    results, config = {}, {}
    about = surroundings() | {"threads": 1, "dtype": "float32", "window": WINDOW}
    lines = "".join(f"- {name}: {value}\n" for name, value in about.items())
    for size in sizes:
        for combiner in [arguments.combiner] if arguments.combiner else COMBINERS:
            case = f"{size}, {combiner}"
            if arguments.quick:
                results[case] = run_case(size, combiner, quick=True)
            else:
                results[case] = measured(size, combiner)
            config[case] = configured(size, combiner).to_diff_dict()
            print(as_table({case: results[case]}).splitlines()[-1], flush=True)
            data = {"goals": GOALS, "surroundings": about, "results": results, "config": config}
            text = f"# What a stream costs\n\n{lines}\n{as_table(results)}\nGoals: {GOALS}\n"
            write_results(arguments.out, data, text)


if __name__ == "__main__":
    sys.exit(main())
