"""`mirasol init`: writes a checkpoint initialised from pretrained image and text models."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mirasol.checkpoint import STARTING_WEIGHTS
from mirasol.cli.common import check_no_results, check_positive_options
from mirasol.config.presets import LISTED_PRESETS, PRESETS, check_preset
from mirasol.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from transformers import PreTrainedTokenizerBase

    from mirasol.cli.common import MakeParser
    from mirasol.config.model import MirasolConfig
    from mirasol.model.hf import MirasolForConditionalGeneration
    from mirasol.pretrained.report import PretrainedReport

HELP = "start from a CLIP, SigLIP, ViT or openMaMMUT model"
DESCRIPTION = """Writes a checkpoint of a preset whose image encoder, and with openMaMMUT also text decoder and
cross-attention, have pretrained weights. Fields of the preset are adapted to the pretrained models and printed; a
record of every tensor is written to OUT/starting_weights.json. A source is a local path, or a repository of the Hugging
Face hub as org/name or org/name@REVISION, of which only safetensors are read.

  mirasol init 1b start --image clip-vit-large-patch14 --tokenizer tiny
  mirasol init base start --image google/siglip-base-patch16-224@main --tokenizer openai/clip-vit-base-patch16
  mirasol init 1b start --openmammut openMaMMUT-ViT-L-14 --tokenizer clip-vit-large-patch14 --inflate-tubes"""
REPORT = STARTING_WEIGHTS


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("preset", metavar="PRESET", help=f"{LISTED_PRESETS}, or your own config.json")
    parser.add_argument("output", metavar="OUT", help="new folder for the checkpoint; nothing is overwritten")
    parser.add_argument(
        "--image", metavar="DIR", help="a CLIP, SigLIP or ViT checkpoint of transformers, or its name on the hub"
    )
    parser.add_argument("--openmammut", metavar="FILE", help="openMaMMUT's open_clip state dict, its folder, or name")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of a tokenizer or of a Mirasol checkpoint, a name on the hub, or tiny",
    )
    parser.add_argument(
        "--inflate-tubes", action="store_true", help="initialise the other tubes from the 2D patches' kernel"
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of a frame; by default the preset's")
    parser.add_argument("--resolution", help=argparse.SUPPRESS)  # its name in version 0.1.0
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read .bin and .pt files, which are pickles and can run code"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights that stay random")


def run(options: Namespace) -> None:
    """Reads, builds, writes, and prints the source of each component's weights."""
    output = check_no_results(options.output)
    if options.resolution is not None:
        raise UserError(f"--resolution {options.resolution}: this option is now called --image-size")
    check_positive_options(options, "image_size")
    if not Path(options.preset).is_file():
        check_preset(options.preset)
    if options.image is None and options.openmammut is None:
        raise UserError("nothing to start from: give an image model (--image) or an openMaMMUT one (--openmammut)")

    from mirasol.hub import TOKENIZER, describe_folder_before_hub, name_commit
    from mirasol.pretrained.assemble import assemble

    tokenizer = read_tokenizer(options.tokenizer) if options.tokenizer else None
    model, report = assemble(
        read_preset(options.preset),
        image=options.image,
        openmammut=options.openmammut,
        tokenizer=tokenizer,
        inflate_tubes=options.inflate_tubes,
        image_size=options.image_size,
        allow_pickle=options.allow_pickle,
        seed=options.seed,
    )
    if tokenizer is not None:
        report.sources["tokenizer"] = name_commit(options.tokenizer, TOKENIZER)
    given = (options.image, options.openmammut, options.tokenizer)
    report.remarks += filter(None, (describe_folder_before_hub(name) for name in given if name))
    write_checkpoint(output, model, tokenizer, report)
    lines = [*report.lines(), f"every tensor: {output / REPORT}", f"checkpoint: {output}"]
    if tokenizer is None:
        lines.append(
            f"{output} has no tokenizer, so `mirasol train` and `mirasol ask` cannot use it; "
            f"from_pretrained can: give --tokenizer for a complete checkpoint"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def read_preset(name: str) -> str | MirasolConfig:
    """The name itself if it is a preset's, otherwise the config in the file of that name."""
    from mirasol.config.model import MirasolConfig

    file = Path(name)
    if name in PRESETS or not file.is_file():
        return name
    try:
        return MirasolConfig.from_pretrained(file)
    except (UserError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a Mirasol config: {' '.join(str(error).split())[:200]}") from error


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or that of a checkpoint shipped with the package."""
    from transformers import AutoTokenizer

    from mirasol.checkpoint import SHIPPED, find_checkpoint
    from mirasol.hub import TOKENIZER, find_on_hub

    folder = find_checkpoint(name) if name in SHIPPED else find_on_hub(name, TOKENIZER) or Path(name)
    if not folder.is_dir():
        raise UserError(f"--tokenizer {folder}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--tokenizer {folder}: cannot load a tokenizer from this folder ({' '.join(str(error).split())[:200]})"
        ) from error


def write_checkpoint(
    output: Path,
    model: MirasolForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PretrainedReport,
) -> None:
    """Writes the checkpoint's folder, which gets its name only once it is complete."""
    from mirasol.files import write_folder_atomically
    from mirasol.media.feature_extractor import MirasolFeatureExtractor
    from mirasol.media.processor import MirasolProcessor

    def fill(folder: Path) -> None:
        # One file: `load_checkpoint` reads no sharded weights.
        model.save_pretrained(folder, max_shard_size="1TB")
        extractor = MirasolFeatureExtractor.for_config(model.config)
        if tokenizer is None:
            extractor.save_pretrained(folder)
        else:
            MirasolProcessor(extractor, tokenizer, model.config.text.longest_text).save_pretrained(folder)
        (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")

    write_folder_atomically(output, fill)
