"""Speed of answering: `python benchmarks/generate.py`.

Decoding: greedy tokens after a short prompt, over latents that are given, against the bandwidth bound: the bytes that a
step must read (the text decoder's weights and vocabulary once for all rows; each row's keys and values) over the
memory's bandwidth, which is the data sheet's for a known GPU and otherwise what a large sum reaches here. Prefill: the
clips from pixels to latents, against their FLOPs at the speed of a large matmul. Tokens are timed as the difference of
a long and a short answer, so that what happens once per call does not count; the short answer is on record too.
Without options: `tiny` on a processor, `3b` and `1b` on a GPU. Needs torch and transformers only. Writes
benchmarks/results/generate.json and generate.md.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, rounded, run_json, surroundings, table, write_results

from mirasol import MirasolConfig, MirasolForConditionalGeneration

# GB/s and dense bfloat16 TFLOP/s of the data sheets.
SHEETS = {"H200": (4800.0, 989.0), "H100 PCIe": (2000.0, 756.0), "H100": (3350.0, 989.0), "A100": (2039.0, 312.0)}
BATCHES = (1, 8, 32)
PROMPT = 4
GOAL = 0.45


def now(device: str) -> float:
    """A GPU's wall clock once it has done all its work; on a processor, one thread's processor seconds."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(work: Any, device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = now(device)
        work()
        times.append(now(device) - begin)
    return min(times)


def machine(device: str, dtype: torch.dtype) -> tuple[float, float, str]:
    """Bytes a second, FLOPs a second, and where the figures are from."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for known, (bandwidth, tflops) in SHEETS.items():
        if known in name:
            return bandwidth * 1e9, tflops * 1e12, f"data sheet of {known}"
    size = 2**28 if device == "cuda" else 2**26
    source = torch.ones(size, device=device)
    # Only reading counts: a sum reads every byte once and writes none.
    bandwidth = size * source.element_size() / best_seconds(source.sum, device, 7)
    width = 8192 if device == "cuda" else 1024
    square = torch.ones(width, width, device=device, dtype=dtype)
    return bandwidth, 2 * width**3 / best_seconds(lambda: square @ square, device, 7), "measured"


def bytes_per_step(model: MirasolForConditionalGeneration, rows: int, latents: int, text: int) -> int:
    """Bytes that one step must read: the decoder's weights, and keys and values of text and latents of every row."""
    stack, element = model.config.text.stack, next(model.parameters()).element_size()
    weights = sum(parameter.numel() for parameter in model.text.parameters())
    crossings = stack.depth // model.config.text.cross_attention_every
    cached = 2 * stack.heads * stack.head_width * (stack.depth * text + crossings * latents)
    return element * (weights + rows * cached)


@torch.no_grad()
def measure(preset: str, chunks: int, rows: int, tokens: int, precision: str, device: str, repeats: int) -> dict:
    """Decoding of `rows` clips at once, and the prefill of as many."""
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = getattr(torch, precision)
    config = MirasolConfig.preset(preset)
    model = MirasolForConditionalGeneration(config).to(device, dtype).eval()
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
    differences, short = [], []
    for _ in range(repeats):
        begin = now(device)
        answer(4)
        middle = now(device)
        answer(4 + tokens)
        short.append(middle - begin)
        differences.append((now(device) - middle - short[-1]) / tokens)
    step = statistics.median(differences)
    prefill = best_seconds(lambda: model.encode(pixels, sound, present, present, present), device, repeats)
    bandwidth, speed, source = machine(device, dtype)
    read = bytes_per_step(model, rows, chunks * config.combiner.m, PROMPT + tokens // 2)
    work = model.flops(chunks, 1)
    flop = rows * sum(work[part] for part in ("vit", "tubes", "audio", "combiner", "latent"))
    return {
        "preset": preset, "chunks": chunks, "batch": rows, "precision": precision, "new_tokens": tokens,
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


def as_text(data: dict[str, Any]) -> str:
    around = data["surroundings"]
    text = f"# Answering\n\n{around['gpu'] or around['cpu']}, torch {around['torch']}, transformers "
    text += f"{around['transformers']}, commit {around['commit']}, {around['date']}. {data['note']}\n\n"
    columns = ["preset", "chunks", "batch", "precision", "tokens/s", "bound", "share", "ms/step"]
    columns += ["prefill ms", "floor ms", "share"]
    rows = [
        [*(row[key] for key in ("preset", "chunks", "batch", "precision")), f"{row['tokens_per_second']:.4g}",
         f"{row['bound_tokens_per_second']:.4g}", f"{row['share_of_bound']:.1%}", f"{row['ms_per_step']:.3g}",
         f"{row['prefill_ms']:.4g}", f"{row['prefill_floor_ms']:.4g}", f"{row['prefill_share_of_floor']:.1%}"]
        for row in data["rows"]
    ]  # fmt: skip
    return text + table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=("tiny", "1b", "3b"), action="append", help="may be given repeatedly")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="clips answered at once")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="float32 on a processor unless given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few tokens, one repeat, for a look whether all works")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    gpu = options.device == "cuda"
    precision = options.precision or ("bfloat16" if gpu else "float32")
    tokens, repeats = (4, 1) if options.quick else (options.new_tokens, options.repeats)
    rows = []
    for preset in options.preset or (("3b", "1b") if gpu else ("tiny",)):
        for batch in options.batch:
            one = [preset, options.chunks, batch, tokens, precision, options.device, repeats]
            rows.append(run_json(__file__, ["--one", json.dumps(one)]))
            shown = {key: rounded(rows[-1][key], 3) for key in ("tokens_per_second", "share_of_bound")}
            print(f"{preset} x {batch}: {shown}", flush=True)
    note = f"The goal on a GPU is {GOAL:.0%} of the bound at batch 1."
    note += "" if gpu else " Rows of a GPU are missing: none was at hand."
    data = {"surroundings": surroundings(), "device": options.device, "note": note, "goal": GOAL, "rows": rows}
    write_results(options.out, data, as_text(data))


if __name__ == "__main__":
    sys.exit(main())
