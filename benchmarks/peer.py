"""This project and the public peer, mirasol-pytorch, on the same work: `python benchmarks/peer.py --peer DIR`.

Both models alternate in one process per item, on one thread; figures are processor time, medians with quartiles. The
work is the forward and backward pass of the sum of all losses, with gradients for every weight and no optimizer; for
the decoding items it is greedy tokens after a start token, over given latents. FLOPs are counted by torch with
attention forced to plain matmuls (it counts none for its CPU flash kernel) and agree within 2% per item;
`_peer_models.py` says how. bfloat16 casts weights and inputs, for both models. Each item runs between two calibrations;
if these differ by more than 10% it is run again.

The peer is installed in its own folder, with this project's torch:
  pip install --no-deps --target DIR mirasol-pytorch==0.0.16 x-transformers==1.28.5 einops==0.8.2 beartype packaging
Writes benchmarks/results/peer.json and peer.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _measure import (
    calibrate,
    compute_quartiles,
    count_saved_bytes,
    describe_surroundings,
    format_markdown_table,
    make_parser,
    measure_peak_mib,
    run_json,
    write_results,
)
from _peer_items import DECODING_ITEMS, ITEMS, Item

if TYPE_CHECKING:
    import torch
    from _peer_models import Ours, Peer

GOALS = {
    "float32 speed, geometric mean": 1.0,
    "float32 speed, slowest item": 0.97,
    "bfloat16 speed, geometric mean": 1.05,
    "bfloat16 bytes for backward, geometric mean": 0.65,
    "decoding speed, 64 latents": 1.6,
    "decoding speed, 2048 latents": 10.0,
}
TOLERANCE, DRIFT = 0.02, 0.10
PRECISIONS = ("float32", "bfloat16")
SIDES = ("ours", "peer")


def build_sides(item: Item) -> dict[str, Ours | Peer]:
    """Both models at the item's sizes."""
    from _peer_models import Ours, Peer

    return dict(zip(SIDES, (Ours(item), Peer(item)), strict=True))


def count_gflop(side: Ours | Peer) -> float:
    """GFLOP of one forward and backward pass, attention as plain matmuls, no discount for causal masks."""
    import torch

    from mirasol.cost.counting import count_products

    with count_products() as counter:
        side.compute_loss(side.make_batch(torch.float32)).backward()
    side.model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 1e9


def time_step(side: Ours | Peer, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Processor seconds of one forward and one backward pass."""
    side.model.zero_grad(set_to_none=True)
    begin = time.process_time()
    loss = side.compute_loss(batch)
    middle = time.process_time()
    loss.backward()
    return middle - begin, time.process_time() - middle


def choose_repeats(seconds: float, first: float) -> int:
    """Repeats of a step that first took `first` seconds: 3 to 15, about `seconds` in total."""
    return max(3, min(15, int(seconds / max(first, 1e-6))))


def measure_steps(item: Item, precision: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Both sides' training step at one precision, alternated."""
    import torch

    sides, dtype, batches = build_sides(item), getattr(torch, precision), {}
    for name, side in sides.items():
        side.model.to(dtype)
        batches[name] = side.make_batch(dtype)
    first = sum(sum(time_step(sides[name], batches[name])) for name in sides)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(choose_repeats(seconds, first)):
        for name in sides:
            times[name].append(time_step(sides[name], batches[name]))
    results = {}
    for name, side in sides.items():
        side.model.zero_grad(set_to_none=True)
        forward, backward = zip(*times[name], strict=True)
        parameters = list(side.model.parameters())
        results[name] = {
            "ms_per_clip": compute_quartiles([sum(both) * 1000 / item.batch for both in times[name]]),
            "forward_ms_per_clip": compute_quartiles([each * 1000 / item.batch for each in forward]),
            "backward_ms_per_clip": compute_quartiles([each * 1000 / item.batch for each in backward]),
            "saved_mib": count_saved_bytes(lambda s=side, n=name: s.compute_loss(batches[n]), parameters) / 2**20,
            "peak_mib": measure_peak_mib(lambda s=side, n=name: time_step(s, batches[n])),
            "repeats": len(times[name]),
        }
    return results


def measure_decoding(item: Item, seconds: float) -> dict[str, dict[str, Any]]:
    """Both sides' milliseconds for each new token, float32, one clip, without the encoding of the clip."""
    import torch

    sides = build_sides(item)
    latents = torch.randn(item.batch, item.chunks, item.m, item.width)
    times: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.process_time()
    while len(times["peer"]) < 3 or (time.process_time() - begin < seconds and len(times["peer"]) < 15):
        for name, side in sides.items():
            start = time.process_time()
            tokens = side.decode(latents, item.new_tokens)
            times[name].append((time.process_time() - start) * 1000 / item.new_tokens)
            assert tokens.shape == (item.batch, item.new_tokens), (name, tokens.shape)
    # The first call of each warms up.
    return {
        name: {"ms_per_token": compute_quartiles(each[1:]), "repeats": len(each) - 1} for name, each in times.items()
    }


def measure_item(name: str, seconds: float, quick: bool) -> dict[str, Any]:
    """All figures of one item, from the first of at most three tries whose calibrations agree."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    decoding = name in DECODING_ITEMS
    item = DECODING_ITEMS[name] if decoding else ITEMS[name]
    if quick and decoding:
        item = dataclasses.replace(item, new_tokens=4)
    gflop = {} if decoding else {name: count_gflop(side) for name, side in build_sides(item).items()}
    for _ in range(1 if quick else 3):
        before = calibrate()
        if decoding:
            measured = {"float32": measure_decoding(item, seconds)}
        else:
            measured = {each: measure_steps(item, each, seconds) for each in PRECISIONS}
        after = calibrate()
        drift = max(before, after) / min(before, after) - 1
        if drift <= DRIFT:
            break
    result = {
        "config": dataclasses.asdict(item),
        "calibration_gflop_per_second": {"before": before, "after": after, "valid": drift <= DRIFT},
    }
    if not decoding:
        ratio = gflop["ours"] / gflop["peer"]
        result["gflop"] = gflop | {"ratio": ratio, "equal": abs(ratio - 1) <= TOLERANCE}
    return result | {precision: _with_ratios(sides, gflop) for precision, sides in measured.items()}


def _with_ratios(sides: dict[str, dict[str, Any]], gflop: dict[str, float]) -> dict[str, Any]:
    """Adds derived figures: ms per GFLOP, and ours compared with the peer, per GFLOP where the work is unequal."""
    ours, peer = sides["ours"], sides["peer"]
    if not gflop:
        return sides | {"speed": peer["ms_per_token"]["median"] / ours["ms_per_token"]["median"]}
    for name, side in sides.items():
        side["ms_per_gflop"] = side["ms_per_clip"]["median"] / gflop[name]
    equal = abs(gflop["ours"] / gflop["peer"] - 1) <= TOLERANCE
    speed = peer["ms_per_clip"]["median"] / ours["ms_per_clip"]["median"]
    return sides | {
        "speed": speed if equal else peer["ms_per_gflop"] / ours["ms_per_gflop"],
        "speed_of": "ms per clip" if equal else "ms per GFLOP",
        "saved_bytes": ours["saved_mib"] / peer["saved_mib"],
    }


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each goal whose items ran: what was wanted, what was reached, and whether it was met."""

    def mean(values: list[float]) -> float:
        return math.exp(sum(map(math.log, values)) / len(values))

    steps = {name: results[name] for name in ITEMS if name in results}
    reached = {}
    if steps:
        speeds = {each: [result[each]["speed"] for result in steps.values()] for each in PRECISIONS}
        saved = [result["bfloat16"]["saved_bytes"] for result in steps.values()]
        values = [mean(speeds["float32"]), min(speeds["float32"]), mean(speeds["bfloat16"]), mean(saved)]
        reached = dict(zip(GOALS, values, strict=False))
    for name, goal in (("gen-T8", "decoding speed, 64 latents"), ("gen-T64-m32", "decoding speed, 2048 latents")):
        if name in results:
            reached[goal] = results[name]["float32"]["speed"]
    return {
        goal: {"goal": GOALS[goal], "reached": value, "met": (value <= GOALS[goal]) == ("bytes" in goal)}
        for goal, value in reached.items()
    }


def format_report(data: dict[str, Any]) -> str:
    """The results as Markdown."""

    def number(value: float) -> str:
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"

    def spread(values: dict[str, float]) -> str:
        return f"{number(values['median'])} ({number(values['low'])}-{number(values['high'])})"

    around = data["surroundings"]
    text = "# This project and mirasol-pytorch on the same work\n\n"
    text += f"{around['cpu']}, one thread, processor time; torch {around['torch']}, transformers "
    text += f"{around['transformers']}, commit {around['commit']}, {around['date']}. Medians, quartiles in brackets. "
    text += "Speed is the peer's time over ours; saved bytes are ours over the peer's.\n\n"
    goals = [[name, each["goal"], f"{each['reached']:.3f}", each["met"]] for name, each in data["summary"].items()]
    text += format_markdown_table(["goal", "wanted", "reached", "met"], goals) + "\n"
    rows, decoded = [], []
    for name, result in data["results"].items():
        valid = "" if result["calibration_gflop_per_second"]["valid"] else " (calibration drifted)"
        for precision in (each for each in PRECISIONS if each in result):
            ours, peer = (result[precision][side] for side in SIDES)
            if name in DECODING_ITEMS:
                times = [spread(each["ms_per_token"]) for each in (ours, peer)]
                decoded.append([name + valid, *times, number(result[precision]["speed"])])
                continue
            row = [name + valid, precision, *(number(result["gflop"][side]) for side in SIDES)]
            row += [spread(ours["ms_per_clip"]), spread(peer["ms_per_clip"])]
            row += [number(side["ms_per_gflop"]) for side in (ours, peer)]
            row += [f"{result[precision]['speed']:.3f}", *(number(side["saved_mib"]) for side in (ours, peer))]
            row += [f"{result[precision]['saved_bytes']:.3f}", *(number(side["peak_mib"]) for side in (ours, peer))]
            rows.append(row)
    columns = ["item", "precision", "GFLOP ours", "peer", "ms/clip ours", "peer", "ms/GFLOP ours", "peer", "speed"]
    columns += ["saved MiB ours", "peer", "ratio", "peak MiB ours", "peer"]
    text += format_markdown_table(columns, rows) + "\n" if rows else ""
    text += format_markdown_table(["decoding", "ms/token ours", "peer", "speed"], decoded) if decoded else ""
    return text


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("peer", __doc__)
    names = [*ITEMS, *DECODING_ITEMS]
    parser.add_argument(
        "--peer", type=Path, help="folder where the peer is installed; not needed if it can be imported already"
    )
    parser.add_argument("--items", nargs="+", choices=names, default=names, metavar="ITEM", help=", ".join(names))
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="about how long each item's repeats take at each precision"
    )
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)

    import torch
    from _peer_models import find_peer

    problem = find_peer(options.peer)
    if problem and options.peer is None:
        print(f"skipped: {problem}")  # so that `make bench` goes on to the other benchmarks
        return
    if problem:
        sys.exit(problem)
    if options.one:
        print(json.dumps(measure_item(options.one, options.seconds, options.quick)))
        return
    passed_on = ["--seconds", "0" if options.quick else str(options.seconds)]
    passed_on += ["--quick"] * options.quick + (["--peer", str(options.peer)] if options.peer else [])
    results = {}
    for name in options.items:
        results[name] = run_json(__file__, ["--one", name, *passed_on])
        speeds = {each: round(results[name][each]["speed"], 3) for each in PRECISIONS if each in results[name]}
        print(f"{name}: speed {speeds}", flush=True)
    torch.set_num_threads(1)
    data = {"surroundings": describe_surroundings(), "goals": GOALS, "summary": summarise(results), "results": results}
    for name, each in data["summary"].items():
        print(f"{name}: {each['reached']:.3f} (goal {each['goal']})")
    write_results(options.out, data, format_report(data))


if __name__ == "__main__":
    main()
