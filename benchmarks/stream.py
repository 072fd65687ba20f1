"""What a stream costs: `python benchmarks/stream.py`.

Compares the 64th chunk with encoding all 64 chunks again, the 1,000th chunk with the 10th, and resident memory at chunk
64 with that at chunk 1,024. Times are processor time on one thread. The two sides of a ratio alternate in one run, and
their medians are compared. Each case runs in its own process, between two calibrations; if these differ by more than
10% it is run again, and marked if that did not help.

Cases are two sizes (`tiny`, and `middle`, 20 million weights) and every kind of Combiner, with random weights: time
does not depend on them. A window of 8 chunks bounds the Combiner, the latent model and the latents kept. Writes
benchmarks/results/stream.json and stream.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _measure import (
    calibrate,
    compute_quartiles,
    describe_surroundings,
    format_markdown_table,
    make_parser,
    run_json,
    write_results,
)

if TYPE_CHECKING:
    import torch

    from mirasol.config.model import MirasolConfig
    from mirasol.model.hf import MirasolForConditionalGeneration
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


def make_config(size: str, combiner: str) -> MirasolConfig:
    from mirasol.config.model import MirasolConfig

    parts = SIZES[size]()
    return MirasolConfig.preset("tiny", **parts | {"combiner": parts.get("combiner", {}) | COMBINERS[combiner]})


def build_model(size: str, combiner: str) -> MirasolForConditionalGeneration:
    import torch

    from mirasol.model.hf import MirasolForConditionalGeneration

    torch.manual_seed(0)
    return MirasolForConditionalGeneration(make_config(size, combiner)).eval()


def draw_chunk(model: MirasolForConditionalGeneration, chunks: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise: video and audio of one chunk, or of a clip with several."""
    import torch

    video, audio = model.config.video, model.config.audio
    shape = (1,) if chunks is None else (1, chunks)
    pixels = (video.frames_per_chunk, 3, video.image_size, video.image_size)
    return torch.randn(*shape, *pixels), torch.randn(*shape, audio.spectrogram_frames, audio.num_mel_bins)


def measure_milliseconds(work: Callable[[], Any]) -> float:
    """Milliseconds of processor time."""
    begin = time.process_time()
    work()
    return 1000 * (time.process_time() - begin)


def compare_with_encoding_all(model: MirasolForConditionalGeneration, repeats: int, chunks: int) -> dict[str, Any]:
    """Times single chunks of a stream around chunk `chunks`, and a clip of `chunks`, in turn; no window."""
    import torch

    from mirasol.cost.counting import STREAMED, count_flops, count_products

    present, clip, one = torch.ones(1, chunks, dtype=torch.bool), draw_chunk(model, chunks), draw_chunk(model)
    stream = advance(model.stream(1), one, chunks - 2 - repeats // 2)
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(repeats + 1):
            times[0].append(measure_milliseconds(lambda: stream.append(*one)))
            times[1].append(measure_milliseconds(lambda: model.encode(*clip, present, present, present)))
    more, everything = (taken[1:] for taken in times)  # the first of each warms up
    stream = advance(model.stream(1), one, chunks - 1)
    with count_products() as counter:
        stream.append(*one)
    counts = count_flops(model.config, chunks, 1)
    return {
        "one more chunk, ms": compute_quartiles(more),
        "encoding all, ms": compute_quartiles(everything),
        "ratio": statistics.median(everything) / statistics.median(more),
        "ratio of FLOPs": sum(counts[part] for part in STREAMED) / counter.get_total_flops(),
    }


def advance(stream: MirasolStream, one: tuple[torch.Tensor, torch.Tensor], chunks: int) -> MirasolStream:
    """Appends the same chunk `chunks` times."""
    for _ in range(chunks):
        stream.append(*one)
    return stream


def compare_late_with_early(
    model: MirasolForConditionalGeneration, repeats: int, early: int, start: int, late: int
) -> dict[str, Any]:
    """With the window: times the chunks from number `early` of one stream and from number `late` of another, in turn;
    and measures how much memory the second gains from chunk `start` to its end."""
    one, times = draw_chunk(model), [[], []]
    streams = [advance(model.stream(1, WINDOW), one, count) for count in (early - 1, start)]
    before, own = measure_resident_mib(), sum(streams[1].state_bytes.values())
    advance(streams[1], one, late - 1 - start)
    for _ in range(repeats):
        for stream, taken in zip(streams, times, strict=True):
            taken.append(measure_milliseconds(lambda stream=stream: stream.append(*one)))
    return {
        f"chunk {early}, ms": compute_quartiles(times[0]),
        f"chunk {late}, ms": compute_quartiles(times[1]),
        "ratio": statistics.median(times[1]) / statistics.median(times[0]),
        "growth": {
            "chunks": [start, streams[1].chunks],
            "resident, MiB": measure_resident_mib() - before,
            "state, MiB": (sum(streams[1].state_bytes.values()) - own) / 2**20,
        },
        "state at the end, KiB": {part: size / 1024 for part, size in streams[1].state_bytes.items()},
    }


def measure_resident_mib() -> float:
    """Resident memory now, where the system reports it, otherwise its peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_case(size: str, combiner: str, quick: bool) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    model = build_model(size, combiner)
    chunks, early, late, repeats = (8, 10, 12, 2) if quick else (CHUNKS, 10, 1000, 7)
    before = calibrate()
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "against encoding all": compare_with_encoding_all(model, repeats, chunks),
        "late against early": compare_late_with_early(model, 4 * repeats, early, chunks, late),
    }
    after = calibrate()
    valid = abs(after / before - 1) <= DRIFT
    return result | {"calibration_gflop_per_second": {"before": before, "after": after, "valid": valid}}


def measure_case_in_child(size: str, combiner: str) -> dict[str, Any]:
    """One case in its own process, run again if the machine's speed drifted; the number of tries is recorded."""
    for tries in range(1, TRIES + 1):
        result = run_json(__file__, ["--case", "--size", size, "--combiner", combiner]) | {"tries": tries}
        if result["calibration_gflop_per_second"]["valid"]:
            break
    return result


def format_cases(results: dict[str, dict[str, Any]]) -> str:
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
    return format_markdown_table(
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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("stream", __doc__)
    parser.add_argument("--size", choices=SIZES, help="only this size")
    parser.add_argument("--combiner", choices=COMBINERS, help="only this Combiner")
    parser.add_argument("--case", action="store_true", help="run one case here and print it as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.case:
        print(json.dumps(measure_case(options.size, options.combiner, quick=False)))
        return
    sizes = [options.size] if options.size else ["tiny"] if options.quick else list(SIZES)
    results, config = {}, {}
    about = describe_surroundings() | {"threads": 1, "dtype": "float32", "window": WINDOW}
    lines = "".join(f"- {name}: {value}\n" for name, value in about.items())
    for size in sizes:
        for combiner in [options.combiner] if options.combiner else COMBINERS:
            case = f"{size}, {combiner}"
            if options.quick:
                results[case] = measure_case(size, combiner, quick=True)
            else:
                results[case] = measure_case_in_child(size, combiner)
            config[case] = make_config(size, combiner).to_diff_dict()
            print(format_cases({case: results[case]}).splitlines()[-1], flush=True)
            data = {"goals": GOALS, "surroundings": about, "results": results, "config": config}
            text = f"# What a stream costs\n\n{lines}\n{format_cases(results)}\nGoals: {GOALS}\n"
            write_results(options.out, data, text)


if __name__ == "__main__":
    sys.exit(main())
