"""Draws the pictures of docs/combiners.md: what each Combiner reads of one clip.

python docs/images/draw_combiners.py docs/images transformer=tiny cls=runs/cls perceiver=runs/perceiver ttm=runs/ttm

For each NAME=CHECKPOINT one file combiner-NAME.png, and for a Token Turing Machine combiner-NAME-memory.png, of a real
forward pass over a rendered test scene; what they show is printed in words.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from mirasol.checkpoint import load_answerer
from mirasol.evaluation.figures import apply_style
from mirasol.explain import explain
from mirasol.explain.describe import describe_explanation, find_chunk, list_in_words
from mirasol.explain.figures import draw_combiner, draw_memory
from mirasol.synthetic.render import write_clip
from mirasol.synthetic.scenes import make_split_scene

SEED, SCENE = 3, 3  # a test scene of 8 chunks with shapes and sounds
CHUNK = 5  # whose features are shown
QUESTION = "which shape is seen first?"


def draw(name: str, checkpoint: str, clip_file: Path, folder: Path) -> None:
    """The pictures of one Combiner."""
    loaded = load_answerer(checkpoint)
    clip = loaded.processor.feature_extractor.read(clip_file)
    found = explain(loaded.model, loaded.processor, clip, QUESTION)
    chunk = find_chunk(found, CHUNK)
    sys.stdout.write("\n  ".join([name, *list_in_words(describe_explanation(found, chunk))]) + "\n")
    figures = {f"combiner-{name}": draw_combiner(found, chunk)}
    if found.reading.memory is not None:
        figures[f"combiner-{name}-memory"] = draw_memory(found, chunk)
    for stem, figure in figures.items():
        with apply_style():
            figure.savefig(folder / f"{stem}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", nargs="+", metavar="NAME=CHECKPOINT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(make_split_scene(SEED, "test", SCENE), clip)
        for pair in arguments.checkpoint:
            name, _, checkpoint = pair.partition("=")
            draw(name, checkpoint, clip, arguments.folder)


if __name__ == "__main__":
    main()
