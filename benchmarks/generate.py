"""Speed of answering: `python benchmarks/generate.py`.

Decoding: greedy tokens after a short prompt, over given latents, compared with the bandwidth bound: the bytes that a
step must read (the text decoder's weights and vocabulary once for all rows; each row's keys and values) divided by the
memory's bandwidth, from the data sheet of a known GPU, otherwise measured with a large sum. Prefill: the clips from
pixels to latents, compared with their FLOPs at the speed of a large matmul. A token's time is the difference between a
long and a short answer, so that the cost of a call is left out; the short answer's time is recorded too. Without
options: `tiny` on a processor, `3b` and `1b` on a GPU. Needs torch and transformers only. Writes
benchmarks/results/generate.json and generate.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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

    from mirasol import MirasolForConditionalGeneration

BATCHES = (1, 8, 32)
PROMPT = 4
GOAL = 0.45


def read_clock(device: str) -> float:
    """Seconds: a GPU's wall clock once it has finished all its work; on a processor, this process's processor time."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_best_seconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of the fastest of some repeats."""
    times = []
    for _ in range(repeats):
        begin = read_clock(device)
        work()
        times.append(read_clock(device) - begin)
    return min(times)


def measure_machine(device: str, dtype: torch.dtype) -> tuple[float, float, str]:
    """Bytes a second, FLOPs a second, and the source of both."""
    import torch

    from mirasol.cost.devices import find_data_sheet

    found = find_data_sheet(torch.cuda.get_device_name()) if device == "cuda" else None
    if found is not None:
        name, sheet = found
        return sheet.gb_per_second * 1e9, sheet.tflops * 1e12, f"data sheet of {name}"
    size = 2**28 if device == "cuda" else 2**26
    source = torch.ones(size, device=device)
    # Only reading counts: a sum reads every byte once and writes none.
    bandwidth = size * source.element_size() / measure_best_seconds(source.sum, device, 7)
    width = 8192 if device == "cuda" else 1024
    square = torch.ones(width, width, device=device, dtype=dtype)
    return bandwidth, 2 * width**3 / measure_best_seconds(lambda: square @ square, device, 7), "measured"


def count_step_bytes(model: MirasolForConditionalGeneration, rows: int, latents: int, text: int) -> int:
    """Bytes that one step must read: the decoder's weights, and keys and values of text and latents of every row."""
    stack, element = model.config.text.stack, next(model.parameters()).element_size()
    weights = sum(parameter.numel() for parameter in model.text.parameters())
    crossings = stack.depth // model.config.text.cross_attention_every
    cached = 2 * stack.heads * stack.head_width * (stack.depth * text + crossings * latents)
    return element * (weights + rows * cached)


def measure(**row: Any) -> dict:
    """Decoding for `rows` clips at once, and the prefill of the same number."""
    import torch

    with torch.no_grad():
        return _measure(**row)


def _measure(
    preset: str, chunks: int, rows: int, tokens: int, precision: str, device: str, repeats: int, compiled: bool
) -> dict:
    import torch

    from mirasol import MirasolConfig, MirasolForConditionalGeneration
    from mirasol.cost.counting import STREAMED, count_flops

    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = getattr(torch, precision)
    config = MirasolConfig.preset(preset)
    with torch.device(device):
        model = MirasolForConditionalGeneration(config).to(dtype).eval()
    if compiled:
        model.compile_blocks()
    video, audio = config.video, config.audio
    present = torch.ones(rows, chunks, dtype=torch.bool, device=device)
    pixels = torch.randn(
        rows, chunks, video.frames_per_chunk, 3, video.image_size, video.image_size, device=device, dtype=dtype
    )
    sound = torch.randn(rows, chunks, audio.spectrogram_frames, audio.num_mel_bins, device=device, dtype=dtype)
    encoded = model.encode(pixels, sound, present, present, present)
    prompt = torch.full((rows, PROMPT), config.decoder_start_token_id, device=device)

    def answer(count: int) -> None:
        answers = model.generate(
            encoder_outputs=encoded, decoder_input_ids=prompt, max_new_tokens=count, min_new_tokens=count,
            do_sample=False,
        )  # fmt: skip
        assert answers.shape == (rows, PROMPT + count), answers.shape

    answer(4)
    answer(4 + tokens)
    differences, short = [], []
    for _ in range(repeats):
        begin = read_clock(device)
        answer(4)
        middle = read_clock(device)
        answer(4 + tokens)
        short.append(middle - begin)
        differences.append((read_clock(device) - middle - short[-1]) / tokens)
    step = statistics.median(differences)
    prefill = measure_best_seconds(lambda: model.encode(pixels, sound, present, present, present), device, repeats)
    bandwidth, speed, source = measure_machine(device, dtype)
    read = count_step_bytes(model, rows, chunks * config.combiner.m, PROMPT + tokens // 2)
    counts = count_flops(config, chunks, 1)
    flop = rows * sum(counts[part] for part in STREAMED)
    return {
        "preset": preset, "chunks": chunks, "batch": rows, "precision": precision, "compiled": compiled,
        "new_tokens": tokens,
        "tokens_per_second": rows / step,
        "bound_tokens_per_second": rows * bandwidth / read,
        "share_of_bound": read / bandwidth / step,
        "ms_per_step": step * 1000,
        "ms_of_a_4_token_answer": statistics.median(short) * 1000,
        "prefill_ms": prefill * 1000,
        "prefill_floor_ms": flop / speed * 1000,
        "prefill_share_of_floor": flop / speed / prefill,
        "machine": {"gb_per_second": bandwidth / 1e9, "tflops": speed / 1e12, "source": source},
    }  # fmt: skip


def format_report(data: dict[str, Any]) -> str:
    around = data["surroundings"]
    text = f"# Answering\n\n{around['gpu'] or around['cpu']}, torch {around['torch']}, transformers "
    text += f"{around['transformers']}, commit {around['commit']}, {around['date']}. {data['note']}\n\n"
    columns = ["preset", "chunks", "batch", "precision", "compiled", "tokens/s", "bound", "share", "ms/step"]
    columns += ["prefill ms", "floor ms", "share"]
    settings = ("preset", "chunks", "batch", "precision", "compiled")
    rows = [
        [*(row[key] for key in settings), f"{row['tokens_per_second']:.4g}", f"{row['bound_tokens_per_second']:.4g}",
         f"{row['share_of_bound']:.1%}", f"{row['ms_per_step']:.3g}",
         f"{row['prefill_ms']:.4g}", f"{row['prefill_floor_ms']:.4g}", f"{row['prefill_share_of_floor']:.1%}"]
        for row in data["rows"]
    ]  # fmt: skip
    return text + format_markdown_table(columns, rows)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("generate", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one")
    parser.add_argument("--preset", choices=("tiny", "1b", "3b"), action="append", help="may be given repeatedly")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="clips answered at once")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="float32 on a processor unless given")
    parser.add_argument("--compile", action="store_true", help="compile each layer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    device = options.device or find_device()
    gpu = device == "cuda"
    precision = options.precision or ("bfloat16" if gpu else "float32")
    tokens, repeats = (4, 1) if options.quick else (options.new_tokens, options.repeats)
    rows = []
    for preset in options.preset or (("3b", "1b") if gpu else ("tiny",)):
        for batch in options.batch:
            one = {
                "preset": preset, "chunks": options.chunks, "rows": batch, "tokens": tokens, "precision": precision,
                "device": device, "repeats": repeats, "compiled": options.compile,
            }  # fmt: skip
            rows.append(run_json(__file__, ["--one", json.dumps(one)]))
            shown = {key: round_floats(rows[-1][key], 3) for key in ("tokens_per_second", "share_of_bound")}
            print(f"{preset} x {batch}: {shown}", flush=True)
    note = f"The goal on a GPU is {GOAL:.0%} of the bound at batch 1."
    note += "" if gpu else " GPU rows are missing: there was no GPU."
    data = {"surroundings": describe_surroundings(), "device": device, "note": note, "goal": GOAL, "rows": rows}
    write_results(options.out, data, format_report(data))


if __name__ == "__main__":
    sys.exit(main())
