"""The report while there is little to report: which parts are done, running and pending, and what is known so far."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirasol.evaluation.figures import convert_to_svg, draw_learning
from mirasol.files import write_file_atomically

REFRESH_SECONDS = 5
PENDING, RUNNING, DONE = "pending", "running", "done"
# The parts of a fine-tuning, in their order.
SURVEY, BEFORE, TRAINING, AFTER, REPORT = (
    "what the clips are, and the recipe",
    "the starting checkpoint's answers",
    "training",
    "answers and controls afterwards",
    "one clip closely, examples, curves",
)


@dataclass
class Part:
    """One part of the page: its name, whether it is done, and what it came to (text, pictures as SVG)."""

    name: str
    state: str = PENDING
    text: str = ""
    pictures: list[str] = field(default_factory=list)


class ReportPage:
    """A page that is written anew, atomically, whenever something is done, and that a browser reads again by itself
    until the finished report takes its place.

    file: of the page; title, lead: heading and first sentence, also of the finished report
    facts: by name, for the end of the finished report
    """

    def __init__(self, file: Path, title: str, lead: str, parts: Sequence[str] = ()):
        self.file, self.title, self.lead = file, title, lead
        self.facts: dict[str, str] = {}
        self.parts = [Part(name) for name in parts]
        self.began = time.time()

    def add_parts(self, names: Sequence[str]) -> None:
        """Adds parts that are not on the page yet."""
        known = {part.name for part in self.parts}
        self.parts += [Part(name) for name in names if name not in known]

    def begin(self, name: str) -> None:
        """Shows that a part has begun."""
        self._find(name).state = RUNNING
        self.write()

    def show(self, name: str, text: str = "", pictures: Sequence[str] = ()) -> None:
        """Shows what a part has come to so far."""
        part = self._find(name)
        part.text, part.pictures = text or part.text, list(pictures) or part.pictures
        self.write()

    def end(self, name: str, text: str = "") -> None:
        """Shows that a part is done."""
        part = self._find(name)
        part.state, part.text = DONE, text or part.text
        self.write()

    def _find(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def write(self) -> None:
        """Replaces the page."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader(
                [jinja2.PackageLoader("mirasol.finetune", "."), jinja2.PackageLoader("mirasol.evaluation", ".")]
            ),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        page = environment.get_template("page.html.jinja").render(
            title=self.title, lead=self.lead, parts=self.parts, refresh=REFRESH_SECONDS,
            minutes=f"{(time.time() - self.began) / 60:.1f}",
        )  # fmt: skip
        write_file_atomically(self.file, page.encode("utf-8", "replace").decode("utf-8"))


def draw_training(log: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """How far a training is, in words, and the curve of its validations as SVG; no words without a logged step."""
    logged = [row for row in log if row["kind"] == "train"]
    if not logged:
        return "", []
    last = logged[-1]
    text = f"{last['step']:,} steps, text loss {last['text_loss']:.3f}"
    figure = draw_learning(log, {})
    return text, [] if figure is None else [convert_to_svg(figure, "learning so far")]
