"""`mirasol info`: parameters and FLOPs of a preset, compared with the paper's figures."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from mirasol.cli.common import check_positive_options
from mirasol.config.presets import LISTED_PRESETS, PAPER_PARAMETERS, PAPER_SIDES, SIDES, check_preset
from mirasol.console import format_table
from mirasol.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.cli.common import MakeParser
    from mirasol.config.model import MirasolConfig
    from mirasol.config.parts import StackConfig

HELP = "sizes of a preset: parameters and FLOPs by component"
DESCRIPTION = """Prints the components of a preset: their settings, their parameters here and in the paper, and the
FLOPs of a forward pass over one clip and one text. No weights are allocated: the largest preset takes seconds.

  mirasol info 3b
  mirasol info 1b --frames 512 --resolution 448 --json"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("preset", metavar="PRESET", help=LISTED_PRESETS)
    parser.add_argument("--frames", type=int, help="video frames of the clip; by default those of 16 chunks")
    parser.add_argument("--resolution", type=int, help="side of a frame in pixels; by default the preset's")
    parser.add_argument("--text-length", type=int, default=64, help="tokens of prompt and target together")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: Namespace) -> None:
    """Counts and prints."""
    check_positive_options(options, "frames", "resolution", "text_length")
    check_preset(options.preset)
    info, settings = describe_preset(options.preset, options.frames, options.resolution, options.text_length)
    text = json.dumps(info) if options.json else format_info(info, settings)
    sys.stdout.write(text + "\n")


def describe_preset(
    preset: str, frames: int | None, resolution: int | None, text_length: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers (`components`, `sides`, `total`, `flops`), and each component's settings in words.

    Raises:
        UserError: an unknown preset, a number of frames that is not a multiple of a chunk's, or a resolution that no
            tube fits.
    """
    from mirasol.config.model import MirasolConfig
    from mirasol.cost.counting import build_on_meta, count_flops

    config = MirasolConfig.preset(preset, **({"video": {"image_size": resolution}} if resolution else {}))
    per_chunk = config.video.frames_per_chunk
    frames = 16 * per_chunk if frames is None else frames
    if frames % per_chunk:
        raise UserError(f"--frames {frames}: must be a multiple of video.frames_per_chunk={per_chunk}")
    counts, paper = build_on_meta(config).num_params(), PAPER_PARAMETERS.get(preset, {})
    flops = count_flops(config, frames // per_chunk, text_length)
    info = {
        "components": {name: {"parameters": n, "paper": paper.get(name)} for name, n in counts.items()},
        "sides": {
            side: {"parameters": sum(counts[name] for name in names), "paper": PAPER_SIDES.get(preset, {}).get(side)}
            for side, names in SIDES.items()
        },
        "total": {"parameters": sum(counts.values()), "paper": paper.get("total")},
        "flops": {
            **flops,
            "total": sum(flops.values()),
            "frames": frames,
            "resolution": config.video.image_size,
            "text_length": text_length,
        },
    }
    return info, _describe_settings(config)


def _describe_settings(config: MirasolConfig) -> dict[str, str]:
    def describe_stack(part: StackConfig) -> str:
        inner = f"{part.depth} x {part.width}/{part.hidden}, {part.heads} heads x {part.head_width}"
        return inner + (", gated" if part.gated else "")

    video, audio, text = config.video, config.audio, config.text
    every = f"every {text.cross_attention_every} layers"
    return {
        "vit": describe_stack(config.vit),
        "tubes": f"{len(video.tubes)} kinds, {video.tokens} tokens a chunk",
        "audio": f"{audio.tokens} tokens a chunk, {describe_stack(audio.adapter)}",
        "combiner": f"{config.combiner.kind}, m={config.combiner.m}, {describe_stack(config.combiner.stack)}",
        "latent": "none" if config.latent.kind == "none" else describe_stack(config.latent.stack),
        "reconstruction": f"{config.reconstruction.image_size} px, {describe_stack(config.reconstruction.stack)}",
        "text": describe_stack(text.stack),
        "cross_attention": every + (", with feed-forward" if text.cross_attention_ffn else ""),
        "vocabulary": f"{text.vocab_size:,} pieces, tied",
        **{side: " + ".join(names) for side, names in SIDES.items()},
    }


def format_info(info: dict[str, Any], settings: dict[str, str]) -> str:
    """The numbers as text: one line for each component, then the paper's sums of several, then the total."""
    flops = info["flops"] | {side: sum(info["flops"][name] for name in names) for side, names in SIDES.items()}
    rows = [["component", "settings", "parameters", "paper", "difference", "GFLOP"]]
    for name, sizes in [*info["components"].items(), *info["sides"].items(), ("total", info["total"])]:
        here, paper = sizes["parameters"], sizes["paper"]
        compared = [f"{paper / 1e6:,.1f}M", f"{here / paper - 1:+.1%}"] if paper else ["-", "-"]
        rows.append([name, settings.get(name, ""), f"{here:,}", *compared, f"{flops[name] / 1e9:,.2f}"])
    note = (
        f"GFLOP: one forward pass over {flops['frames']} frames of {flops['resolution']} pixels and "
        f"{flops['text_length']} text tokens, masked attention counted"
    )
    return f"{format_table(rows, left_columns=2)}\n{note}"
