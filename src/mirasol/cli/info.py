"""`mirasol info`: what a preset weighs and computes, beside the paper's own figures."""

import json
import sys
from typing import Any

HELP = "sizes of a preset: parameters and FLOPs by component"
DESCRIPTION = """Prints the components of a preset: their settings, their parameters here and in the paper, and the
FLOPs of a forward pass over one clip and one text. Nothing is allocated: the largest preset takes seconds.

  mirasol info 3b
  mirasol info 1b --frames 512 --resolution 448 --json"""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument("preset", metavar="PRESET", help="3b, 1b or tiny")
    parser.add_argument("--frames", type=int, help="video frames of the clip; as many as 16 chunks hold by default")
    parser.add_argument("--resolution", type=int, help="side of a frame in pixels; the preset's by default")
    parser.add_argument("--text-length", type=int, default=64, help="tokens of prompt and target together")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: Any) -> None:
    """Builds the model without memory, counts, prints."""
    from mirasol.cli.common import check_positive

    for name in ("frames", "resolution", "text_length"):
        if options[name] is not None:
            check_positive(f"--{name.replace('_', '-')}", options[name])
    info, settings = describe(options.preset, options.frames, options.resolution, options.text_length)
    text = json.dumps(info) if options.json else table(info, settings)
    sys.stdout.write(text + "\n")


def describe(
    preset: str, frames: int | None, resolution: int | None, text_length: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers (`components`, `total`, `flops`), and each component's settings in words.

    Raises UserError for an unknown preset, frames that are no whole chunks, and a resolution no tube fits.
    """
    import torch

    from mirasol.config.model import MirasolConfig
    from mirasol.config.presets import PAPER_PARAMETERS
    from mirasol.errors import UserError
    from mirasol.model.mirasol import MirasolForConditionalGeneration

    config = MirasolConfig.preset(preset, **({"video": {"image_size": resolution}} if resolution else {}))
    per_chunk = config.video.frames_per_chunk
    frames = 16 * per_chunk if frames is None else frames
    if frames % per_chunk:
        raise UserError(f"--frames {frames}: must be a multiple of video.frames_per_chunk={per_chunk}")
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
    counts, paper = model.num_params(), PAPER_PARAMETERS.get(preset, {})
    flops = model.flops(frames // per_chunk, text_length)
    info = {
        "components": {name: {"parameters": n, "paper": paper.get(name)} for name, n in counts.items()},
        "total": {"parameters": sum(counts.values()), "paper": paper.get("total")},
        "flops": {
            **flops,
            "total": sum(flops.values()),
            "frames": frames,
            "resolution": config.video.image_size,
            "text_length": text_length,
        },
    }
    return info, _settings(config)


def _settings(config: Any) -> dict[str, str]:
    def stack(part: Any) -> str:
        inner = f"{part.depth} x {part.width}/{part.hidden}, {part.heads} heads x {part.head_width}"
        return inner + (", gated" if part.gated else "")

    video, audio, text = config.video, config.audio, config.text
    every = f"every {text.cross_attention_every} layers"
    return {
        "vit": stack(config.vit),
        "tubes": f"{len(video.tubes)} kinds, {video.tokens} tokens a chunk",
        "audio": f"{audio.tokens} tokens a chunk, {stack(audio.adapter)}",
        "combiner": f"{config.combiner.kind}, m={config.combiner.m}, {stack(config.combiner.stack)}",
        "latent": stack(config.latent.stack),
        "reconstruction": f"{config.reconstruction.image_size} px, {stack(config.reconstruction.stack)}",
        "text": stack(text.stack),
        "cross_attention": every + (", with feed-forward" if text.cross_attention_ffn else ""),
        "vocabulary": f"{text.vocab_size:,} pieces, tied",
    }


def table(info: dict[str, Any], settings: dict[str, str]) -> str:
    """The numbers as text: one line a component, then the total."""
    flops = info["flops"]
    rows = [("component", "settings", "parameters", "paper", "difference", "GFLOP")]
    for name, sizes in [*info["components"].items(), ("total", info["total"])]:
        here, paper = sizes["parameters"], sizes["paper"]
        rows.append((
            name, settings.get(name, ""), f"{here:,}", f"{paper / 1e6:,.1f}M" if paper else "-",
            f"{here / paper - 1:+.1%}" if paper else "-", f"{flops[name] / 1e9:,.2f}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.append(
        f"GFLOP: one forward pass over {flops['frames']} frames of {flops['resolution']} pixels and "
        f"{flops['text_length']} text tokens, masked attention counted"
    )
    return "\n".join(lines)
