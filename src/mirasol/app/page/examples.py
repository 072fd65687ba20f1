"""The shipped examples: clips that are rendered when somebody wants to see them."""

from dataclasses import dataclass
from pathlib import Path

from mirasol.synthetic.render import write_clip
from mirasol.synthetic.scenes import make_split_scene
from mirasol.synthetic.synthesize import list_clip_questions

SEED = 7
EXAMPLES = tuple(f"shapes and sounds {number}" for number in range(1, 5))


@dataclass(frozen=True)
class Shown:
    """An example: its file, a question about it, and that question's candidates."""

    path: Path
    question: str
    candidates: tuple[str, ...]


def render_example(name: str, folder: Path) -> Shown:
    """Renders an example of `EXAMPLES` into the folder, unless it is there already."""
    index = EXAMPLES.index(name)
    scene = make_split_scene(SEED, "test", index)
    path = folder / f"example-{index}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"unfinished-{index}.mp4"
        write_clip(scene, unfinished)
        unfinished.replace(path)
    questions = list_clip_questions(scene, SEED, "test", index)
    asked = next((each for each in questions if each.candidates), questions[0])
    return Shown(path, asked.prompt, tuple(sorted({asked.target, *asked.candidates})))
