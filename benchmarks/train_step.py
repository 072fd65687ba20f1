"""Speed and memory of a training step: `python benchmarks/train_step.py`.

One step is forward, backward and a fused AdamW update over one microbatch of synthetic tensors; each row runs in its
own process. MFU is the model's FLOPs (three times those of the forward pass; recomputation does not count, masked
attention does) divided by the stated peak: the data sheet's dense bfloat16 figure of a known GPU, and on a processor
the measured speed of a large matmul of the same type. Times are a GPU's wall clock or, on a processor, one thread's
processor time. Without options: the preset `tiny` on a processor, `3b` and `1b` on a GPU. Needs torch and transformers
only. Writes benchmarks/results/train_step.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from _measure import (
    describe_surroundings,
    find_device,
    format_markdown_table,
    make_parser,
    round_floats,
    run_json,
    write_results,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mirasol import MirasolConfig

PRECISIONS = ("float32", "bfloat16", "autocast")
RECOMPUTE = ("none", "hidden", "block")
ATTENTION = ("eager", "sdpa", "flex_attention")
# The module that a component's forward time is measured on; the ViT's is video and audio together.
TIMED_MODULES = {
    "tubes": "chunk_encoder.tubes", "vit": "chunk_encoder.vit", "audio": "chunk_encoder.audio_adapter",
    "combiner": "combiner", "latent": "latent", "reconstruction": "reconstruction", "text": "text",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement. `image_size` 0 and `frames` 0 are the preset's own resolution and 8 chunks."""

    preset: str
    microbatch: int
    frames: int = 0
    image_size: int = 0
    text_length: int = 64
    recompute: str = "none"
    attention: str = "sdpa"
    precision: str = "float32"
    compiled: bool = False
    steps: int = 5


def default_rows(device: str, steps: int) -> list[Row]:
    """`tiny` with each kind of recomputation on a processor; on a GPU several settings of the paper's two sizes."""
    if device == "cpu":
        rows = [Row("tiny", 8, precision="float32", recompute=each, steps=steps) for each in RECOMPUTE]
        return [*rows, Row("tiny", 8, precision="bfloat16", steps=steps)]
    sizes = [(7, 128, 224, "none"), (14, 128, 224, "hidden"), (32, 128, 224, "block"), (8, 128, 448, "block"),
             (4, 512, 224, "block")]  # fmt: skip
    return [
        Row(preset, batch, frames, pixels, 64, recompute, "flex_attention", "bfloat16", True, steps)
        for preset in ("3b", "1b")
        for batch, frames, pixels, recompute in sizes
    ]


def make_batch(config: MirasolConfig, row: Row, chunks: int, device: str) -> dict[str, torch.Tensor]:
    """Noise of the shapes that the model takes; every token but the first is a target."""
    import torch

    dtype = torch.bfloat16 if row.precision == "bfloat16" else torch.float32
    video, audio, batch = config.video, config.audio, row.microbatch
    pixels = (batch, chunks, video.frames_per_chunk, 3, video.image_size, video.image_size)
    spectrogram = (batch, chunks, audio.spectrogram_frames, audio.num_mel_bins)
    present = torch.ones(batch, chunks, dtype=torch.bool, device=device)
    text = torch.randint(4, config.text.vocab_size, (batch, row.text_length), device=device)
    return {
        "video": torch.randn(pixels, device=device, dtype=dtype),
        "audio": torch.randn(spectrogram, device=device, dtype=dtype),
        "chunk_mask": present, "video_mask": present, "audio_mask": present,
        "decoder_input_ids": text, "labels": text,
    }  # fmt: skip


def read_clock(device: str) -> float:
    """Seconds: a GPU's wall clock once it has finished all its work; on a processor, this process's processor time."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_forward_seconds(model: nn.Module, run: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of the forward pass by component, each finished before the next begins."""
    seconds = dict.fromkeys(TIMED_MODULES, 0.0)
    begun: dict[str, float] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begun[name] = read_clock(device)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seconds[name] += read_clock(device) - begun[name]

        return hook

    modules = dict(model.named_modules())
    hooks = []
    for name, path in TIMED_MODULES.items():
        hooks += [modules[path].register_forward_pre_hook(enter(name))] if path in modules else []
        hooks += [modules[path].register_forward_hook(leave(name))] if path in modules else []
    run()
    for hook in hooks:
        hook.remove()
    return seconds


def find_peak_tflops(device: str, precision: str) -> tuple[float, str]:
    """TFLOP/s that MFU is a share of, and the source of the figure."""
    import torch

    from mirasol.cost.devices import find_data_sheet

    found = find_data_sheet(torch.cuda.get_device_name()) if device == "cuda" else None
    if found is not None:
        return found[1].tflops, f"data sheet of {found[0]}, dense bfloat16"
    size, dtype = (8192 if device == "cuda" else 1024), torch.float32 if precision == "float32" else torch.bfloat16
    left = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(7):
        begin = read_clock(device)
        left @ left
        times.append(read_clock(device) - begin)
    return 2 * size**3 / min(times) / 1e12, f"matmul of {size} x {size} in {dtype}, measured"


def measure(row: Row, device: str) -> dict[str, Any]:
    """One row's figures, or `failed` where the device ran out of memory."""
    import torch

    from mirasol import MirasolConfig

    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    config = MirasolConfig.preset(row.preset, **({"video": {"image_size": row.image_size}} if row.image_size else {}))
    chunks = row.frames // config.video.frames_per_chunk if row.frames else 8
    try:
        return dataclasses.asdict(row) | {"chunks": chunks} | _measure_steps(row, config, chunks, device)
    except torch.OutOfMemoryError as error:
        return dataclasses.asdict(row) | {"chunks": chunks, "failed": f"out of memory: {error}".split("\n")[0][:120]}


def _measure_steps(row: Row, config: MirasolConfig, chunks: int, device: str) -> dict[str, Any]:
    import torch

    from mirasol import MirasolForConditionalGeneration
    from mirasol.cost.counting import count_flops

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device(device):  # a GPU draws billions of weights in a second, a processor in a minute
        model = MirasolForConditionalGeneration(config).train()
    model.set_attn_implementation(row.attention)
    model.recompute_activations(row.recompute)
    if row.precision == "bfloat16":
        model.to(torch.bfloat16)
    if row.compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = make_batch(config, row, chunks, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=row.precision == "autocast"):
            return model(**batch).loss

    def time_step() -> list[float]:
        optimizer.zero_grad(set_to_none=True)
        times = [read_clock(device)]
        loss = forward()
        times.append(read_clock(device))
        loss.backward()
        times.append(read_clock(device))
        optimizer.step()
        times.append(read_clock(device))
        return [end - begin for begin, end in itertools.pairwise(times)]

    # The first two compile and warm up.
    for _ in range(2):
        time_step()
    steps = [time_step() for _ in range(row.steps)]
    if device == "cuda":
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak_gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    seconds = statistics.median(sum(each) for each in steps)
    forward_part, backward_part, update_part = (statistics.median(part) for part in zip(*steps, strict=True))
    peak, source = find_peak_tflops(device, row.precision)
    tflop = 3 * row.microbatch * sum(count_flops(config, chunks, row.text_length).values()) / 1e12
    return {
        "clips_per_second": row.microbatch / seconds,
        "seconds": {"step": seconds, "forward": forward_part, "backward": backward_part, "update": update_part},
        "forward_seconds": measure_forward_seconds(model, forward, device),
        "model_tflop_per_clip": tflop / row.microbatch,
        "mfu": tflop / seconds / peak,
        "peak_tflops": peak,
        "peak_is": source,
        "peak_gib": peak_gib,
        "planned_gib": plan_peak_gib(row, config, chunks, device),
    }


def plan_peak_gib(row: Row, config: MirasolConfig, chunks: int, device: str) -> float:
    """What `mirasol plan` counts for the same step: weights, AdamW's two moments of the same type, and the most that
    lives at a time."""
    import torch

    from mirasol import MirasolForConditionalGeneration
    from mirasol.cost.step import StepShape, count_step_cost

    precision = {"float32": "fp32", "bfloat16": "bf16 weights", "autocast": "bf16"}[row.precision]
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
    shape = StepShape(row.microbatch, chunks, 1, row.text_length, row.text_length)
    cost = count_step_cost(model, shape, precision, row.recompute, device=device, compiled=row.compiled)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (3 * parameters * (2 if row.precision == "bfloat16" else 4) + cost.peak_bytes) / 2**30


def format_report(data: dict[str, Any]) -> str:
    around = data["surroundings"]
    text = f"# A training step\n\n{around['gpu'] or around['cpu']}, torch {around['torch']}, transformers "
    text += f"{around['transformers']}, commit {around['commit']}, {around['date']}. {data['note']}\n\n"
    columns = ["preset", "frames", "pixels", "microbatch", "precision", "recomputed", "attention", "compiled"]
    columns += [
        "clips/s",
        "MFU",
        "peak GiB",
        "planned GiB",
        "forward s",
        "backward s",
        "update s",
        "slowest components (forward)",
    ]
    rows = []
    for row in data["rows"]:
        cells = [row["preset"], row["frames"] or f"{row['chunks']} chunks", row["image_size"] or "preset's"]
        cells += [row[key] for key in ("microbatch", "precision", "recompute", "attention", "compiled")]
        if "failed" in row:
            rows.append([*cells, row["failed"], *[""] * 7])
            continue
        slowest = sorted(row["forward_seconds"].items(), key=lambda pair: -pair[1])[:3]
        cells += [
            f"{row['clips_per_second']:.3g}",
            f"{row['mfu']:.1%}",
            f"{row['peak_gib']:.3g}",
            f"{row['planned_gib']:.3g}",
        ]
        cells += [f"{row['seconds'][part]:.3g}" for part in ("forward", "backward", "update")]
        rows.append([*cells, ", ".join(f"{name} {seconds:.3g} s" for name, seconds in slowest)])
    return text + format_markdown_table(columns, rows)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("train_step", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one")
    parser.add_argument("--preset", choices=("tiny", "1b", "3b"), help="measure this setting instead of the usual rows")
    parser.add_argument("--microbatch", type=int, default=1, help="clips in one step")
    parser.add_argument("--frames", type=int, default=0, help="frames of a clip; 0 is 8 chunks")
    parser.add_argument("--image-size", type=int, default=0, help="pixels; 0 is the preset's")
    parser.add_argument("--text-length", type=int, default=64, help="tokens of a text row")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none")
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16 casts weights and inputs")
    parser.add_argument("--compile", action="store_true", help="compile each layer")
    parser.add_argument("--steps", type=int, default=5, help="steps measured, after two that warm up")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = options.device or find_device()
    if options.one:
        print(json.dumps(measure(Row(**json.loads(options.one)), device)))
        return
    steps = 1 if options.quick else options.steps
    if options.preset:
        rows = [
            Row(options.preset, options.microbatch, options.frames, options.image_size, options.text_length,
                options.recompute, options.attention, options.precision, options.compile, steps)
        ]  # fmt: skip
    else:
        rows = default_rows(device, steps)
    measured = []
    for row in rows:
        measured.append(run_json(__file__, ["--device", device, "--one", json.dumps(dataclasses.asdict(row))]))
        shown = {
            key: round_floats(measured[-1].get(key), 3) for key in ("clips_per_second", "mfu", "peak_gib", "failed")
        }
        print(f"{row.preset} x {row.microbatch}, recompute {row.recompute}, {row.precision}: {shown}", flush=True)
    note = "" if device == "cuda" else "GPU rows are missing: there was no GPU."
    around = describe_surroundings()
    around["threads"] = 1 if device == "cpu" else around["threads"]
    data = {"surroundings": around, "device": device, "note": note, "rows": measured}
    write_results(options.out, data, format_report(data))


if __name__ == "__main__":
    sys.exit(main())
