"""`mirasol init`: a checkpoint that begins with the weights of models that others have trained."""

import json
import sys
from pathlib import Path
from typing import Any

HELP = "start from a CLIP, SigLIP, ViT or openMaMMUT model"
DESCRIPTION = """Writes a checkpoint of a preset whose image side, and with openMaMMUT also text decoder and
cross-attention, are those of models that others have trained. Fields of the preset that these models need are adapted
and printed; what became of every tensor is written to OUT/starting_weights.json. Nothing is downloaded.

  mirasol init 1b start --image clip-vit-large-patch14 --tokenizer tiny
  mirasol init 1b start --openmammut openMaMMUT-ViT-L-14 --tokenizer clip-vit-large-patch14 --inflate-tubes"""
REPORT = "starting_weights.json"


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument("preset", metavar="PRESET", help="3b, 1b or tiny, or a config.json of your own")
    parser.add_argument("output", metavar="OUT", help="new folder for the checkpoint; nothing is overwritten")
    parser.add_argument("--image", metavar="DIR", help="a CLIP, SigLIP or ViT checkpoint of transformers")
    parser.add_argument("--openmammut", metavar="FILE", help="openMaMMUT's open_clip state dict, or its folder")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer, or of a Mirasol checkpoint, or tiny")
    parser.add_argument("--inflate-tubes", action="store_true", help="make the other tubes from the 2D patches' kernel")
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="side of a frame; the preset's by default")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt files, too: they are pickles")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that stay at random")


def run(options: Any) -> None:
    """Reads, builds, writes, and prints what came from where."""
    from mirasol.cli.common import check_no_results, check_positive
    from mirasol.model.mirasol import MirasolForConditionalGeneration

    output = check_no_results(options.output)
    if options.resolution is not None:
        check_positive("--resolution", options.resolution)
    tokenizer = read_tokenizer(options.tokenizer) if options.tokenizer else None
    model, report = MirasolForConditionalGeneration.from_parts(
        read_preset(options.preset),
        image=options.image,
        openmammut=options.openmammut,
        tokenizer=tokenizer,
        inflate_tubes=options.inflate_tubes,
        resolution=options.resolution,
        allow_pickle=options.allow_pickle,
        seed=options.seed,
    )
    write(output, model, tokenizer, report)
    lines = [*report.lines(), f"every tensor: {output / REPORT}", f"checkpoint: {output}"]
    if tokenizer is None:
        lines.append(
            f"{output} has no tokenizer, so `mirasol train` and `mirasol ask` cannot use it; "
            f"from_pretrained can: give --tokenizer for a whole checkpoint"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def read_preset(name: str) -> Any:
    """A preset's name as it is, or the config in a file."""
    from mirasol.config.model import MirasolConfig
    from mirasol.config.presets import PRESETS
    from mirasol.errors import UserError

    file = Path(name)
    if name in PRESETS or not file.is_file():
        return name
    try:
        return MirasolConfig.from_pretrained(file)
    except (UserError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: no config of Mirasol: {' '.join(str(error).split())[:200]}") from error


def read_tokenizer(name: str) -> Any:
    """The tokenizer in a folder, or that of a checkpoint shipped with the package."""
    from transformers import AutoTokenizer

    from mirasol.checkpoint import SHIPPED, find_checkpoint
    from mirasol.errors import UserError

    folder = find_checkpoint(name) if name in SHIPPED else Path(name)
    if not folder.is_dir():
        raise UserError(f"--tokenizer {folder}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--tokenizer {folder}: holds no tokenizer ({' '.join(str(error).split())[:200]})") from error


def write(output: Path, model: Any, tokenizer: Any, report: Any) -> None:
    """The checkpoint's folder, under its name only once it is whole."""
    import shutil

    from mirasol.cli.common import make_folder
    from mirasol.files import open_as_folder
    from mirasol.media.feature_extractor import MirasolFeatureExtractor
    from mirasol.media.processor import MirasolProcessor

    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished)
    # One file: that is what a checkpoint of Mirasol is read from.
    model.save_pretrained(unfinished, max_shard_size="1TB")
    extractor = MirasolFeatureExtractor.for_config(model.config)
    if tokenizer is None:
        extractor.save_pretrained(unfinished)
    else:
        MirasolProcessor(extractor, tokenizer, model.config.text.max_length).save_pretrained(unfinished)
    for path in unfinished.iterdir():
        open_as_folder(path)
    (unfinished / REPORT).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    if output.exists():
        output.rmdir()
    unfinished.rename(output)
