"""The demo: the whole path once, from rendering data to a report. After an interruption, what is done is kept."""

import importlib.resources
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mirasol.console import cores, progress
from mirasol.errors import UserError
from mirasol.files import write_whole

METRICS, REPORT, MARKER = "metrics.json", "report.html", "demo.json"


@dataclass(frozen=True)
class DemoSettings:
    """output: folder for everything; recipe: its output and data.root are replaced, None is the package's own; seed and
    numbers of clips: the data."""

    output: str
    recipe: str | None
    seed: int
    train: int
    validation: int
    test: int


class DemoFolder:
    """The demo's folder: data/, train/ (the run), metrics.json, report.html, and demo.json, which tells what it was
    started with and the seconds each finished part took.

    Raises:
        UserError: the folder holds a finished demo, something else, or a demo of other settings.
    """

    def __init__(self, settings: DemoSettings):
        self.path = Path(settings.output)
        self.data, self.run = self.path / "data", self.path / "train"
        self.metrics, self.report, self.marker = (self.path / name for name in (METRICS, REPORT, MARKER))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file: give a folder with --output")
        if self.report.exists():
            raise UserError(
                f"{self.path}: already holds a finished demo ({self.report}): give another folder (mirasol demo "
                f"--output runs/demo-2, or make demo OUTPUT=runs/demo-2) or remove this one"
            )
        chosen = {key: value for key, value in asdict(settings).items() if key != "output"}
        self.state: dict[str, Any] = {"settings": chosen, "seconds": {}}
        self.resumed = self.marker.exists()
        if self.resumed:
            self.state = json.loads(self.marker.read_text(encoding="utf-8"))
            changed = [key for key in chosen if chosen[key] != self.state["settings"].get(key)]
            if changed:
                before = self.state["settings"].get(changed[0])
                raise UserError(
                    f"{self.path}: holds a demo begun with {changed[0]}={before}, now it is {chosen[changed[0]]}: "
                    f"give the same, or another --output"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path}: holds something that is no demo: give another folder with --output")

    def begin(self) -> None:
        """Makes the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._save()

    def add_seconds(self, part: str, seconds: float) -> None:
        """Notes that a part took (also in an earlier, interrupted attempt) so many seconds."""
        self.state["seconds"][part] = round(self.state["seconds"].get(part, 0.0) + seconds, 1)
        self._save()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part, and in total."""
        parts = dict(self.state["seconds"])
        return {**parts, "total": round(sum(parts.values()), 1)}

    def _save(self) -> None:
        write_whole(self.marker, json.dumps(self.state, indent=1) + "\n")


def demo_recipe() -> Path:
    """The package's own recipe for the demo. Raises UserError where the package was installed without it."""
    file = Path(str(importlib.resources.files("mirasol"))) / "recipes" / "demo.yaml"
    if not file.is_file():
        raise UserError(f"{file}: is not part of this installation: name a recipe with --recipe")
    return file


def run_demo(settings: DemoSettings, console: Any) -> None:
    """Renders, trains, evaluates, asks and reports; says on the `rich` console what it does and how long it took.

    Raises:
        UserError: see `DemoFolder`; a recipe that cannot be used.
    """
    from mirasol.config.recipe_io import load_recipe

    recipe = load_recipe(settings.recipe or demo_recipe())
    folder = DemoFolder(settings)
    recipe = replace(recipe, output=str(folder.run), data=replace(recipe.data, root=str(folder.data)))
    folder.begin()
    if folder.resumed:
        console.print(f"{folder.path}: going on with an interrupted demo")
    Demo(settings, recipe, folder, console).run()


class Demo:
    """The parts of the demo in their order; each prints its heading, its result and its seconds."""

    def __init__(self, settings: DemoSettings, recipe: Any, folder: DemoFolder, console: Any):
        self.settings, self.recipe, self.folder, self.console = settings, recipe, folder, console
        self.number = 0

    def run(self) -> None:
        """All parts, one after the other."""
        self._part("data", "Rendering shapes and sounds", self.render)
        checkpoint = self._part("train", "Training", self.train)
        results = self._part("evaluate", "Evaluating on unseen clips", lambda: self.evaluate(checkpoint))
        shipped = self._part("evaluate_shipped", "Evaluating the shipped weights on the same clips", self.shipped)
        exhibit = self._part("ask", "Asking about one unseen clip", lambda: self.ask(checkpoint, results))
        self._part("report", "Writing the report", lambda: self.report(results, shipped, exhibit))
        score = f"{results.test.accuracy:.1%} of {results.test.n} questions right, chance {results.chance.accuracy:.1%}"
        self.console.print(f"\nDone in {_minutes(self.folder.seconds['total'])}: {score}.", style="bold")
        self.console.print(f"Look at {self.folder.report.resolve()}")

    def _part(self, name: str, title: str, work: Callable[[], Any]) -> Any:
        self.number += 1
        self.console.print(f"\n{self.number}. {title}", style="bold")
        began = time.monotonic()
        try:
            return work()
        finally:
            seconds = time.monotonic() - began
            self.folder.add_seconds(name, seconds)
            self.console.print(f"   {_minutes(seconds)}", style="dim")

    def render(self) -> None:
        """The data set, unless an earlier attempt completed it."""
        from mirasol.synthetic.synthesize import synthesize

        chosen = self.settings
        if (self.folder.data / "manifest.json").exists():
            self.console.print(f"{self.folder.data}: is there already")
            return
        with progress(self.console, "Rendering", "clips") as report:
            synthesize(
                self.folder.data, seed=chosen.seed, train=chosen.train, validation=chosen.validation, test=chosen.test,
                workers=cores(), progress=report,
            )  # fmt: skip
        self.console.print(f"{chosen.train} training, {chosen.validation} validation and {chosen.test} test clips")

    def train(self) -> Path:
        """The checkpoint, from scratch or from where an earlier attempt stopped."""
        from mirasol.training.trainer import train

        return train(self.recipe, resume=True, console=self.console)

    def evaluate(self, checkpoint: str | Path) -> Any:
        """Results on the test clips, controls included; prints the table."""
        from mirasol.checkpoint import load_checkpoint
        from mirasol.data.clip_cache import ClipCache
        from mirasol.data.datasets.folder_reader import read_examples
        from mirasol.data.example import group_by_clip
        from mirasol.evaluation.protocol import decode_and_evaluate

        loaded = load_checkpoint(checkpoint)
        clips = group_by_clip(read_examples(self.folder.data, "test"))
        settings = loaded.model.config.media_settings()
        cache = ClipCache(self.folder.run / "cache", self.folder.data, settings)
        results = decode_and_evaluate(loaded.model, loaded.processor, clips, self.folder.data, cache, self.console)
        self.console.print(results.table(), markup=False)
        return results

    def shipped(self) -> Any | None:
        """Results of the shipped weights, None where the package has none."""
        from mirasol.checkpoint import shipped_checkpoint

        if shipped_checkpoint("tiny") is None:
            self.console.print("this installation ships no weights")
            return None
        return self.evaluate("tiny")

    def ask(self, checkpoint: Path, results: Any) -> Any:
        """Asks about one test clip: a first question as `mirasol ask` does, the answer streamed, then all of them at
        once; prints answers and what is right, returns the clip's exhibit."""
        from mirasol.checkpoint import load_checkpoint
        from mirasol.evaluation.answer import AnswerStreamer, answer_clips
        from mirasol.evaluation.exhibit import look_closely, most_telling
        from mirasol.evaluation.metrics import Answered

        media = most_telling(results.test.answers)
        examples = [item.example for item in results.test.answers if item.example.media == media]
        file = self.folder.data / media
        loaded = load_checkpoint(checkpoint)
        clip = loaded.processor.feature_extractor.read(file, threads=0)
        tensors = loaded.processor.feature_extractor.tensors(clip)
        prompts = [example.prompt for example in examples]
        self.console.print(f'mirasol ask {self.folder.path} {file} "{prompts[0]}"', markup=False)
        streamer = AnswerStreamer(loaded.processor, lambda text: self.console.print(text, end="", markup=False))
        answer_clips(loaded.model, loaded.processor, [tensors], [prompts[:1]], streamer=streamer)
        [answers] = answer_clips(loaded.model, loaded.processor, [tensors], [prompts])
        answered = [Answered(example, answer) for example, answer in zip(examples, answers, strict=True)]
        self.console.print(f"\n\nAll {len(answered)} questions about this clip:")
        for item in answered:
            verdict = "" if item.right else f"  (right: {item.example.target})"
            self.console.print(f"  {item.example.prompt}  {item.answer}{verdict}", markup=False)
        return look_closely(loaded.model, loaded.processor, clip, media, answered)

    def report(self, results: Any, shipped: Any | None, exhibit: Any) -> None:
        """metrics.json, then report.html, which marks the demo as finished."""
        from mirasol.data.datasets.folder_reader import read_examples
        from mirasol.evaluation.metrics import blind
        from mirasol.evaluation.report import ReportData, render_report
        from mirasol.training.logging import read_metrics

        metrics = {
            "test": results.test.to_dict(),
            "chance": results.chance.to_dict(),
            "controls": {name: control.to_dict() for name, control in results.controls.items()},
            "shipped": None,
            "seconds": self.folder.seconds,
        }
        if shipped is not None:
            controls = {name: control.to_dict() for name, control in shipped.controls.items()}
            metrics["shipped"] = {"test": shipped.test.to_dict(), "controls": controls}
        write_whole(self.folder.metrics, json.dumps(metrics, indent=1) + "\n")
        surroundings = json.loads((self.folder.run / "run.json").read_text(encoding="utf-8"))
        asked = [item.example for item in results.test.answers]
        page = render_report(
            ReportData(
                metrics=metrics,
                blind=blind(read_examples(self.folder.data, "train"), asked),
                log=read_metrics(self.folder.run / "metrics.jsonl"),
                answered=results.test.answers,
                exhibit=exhibit,
                clips={name: getattr(self.settings, name) for name in ("train", "validation", "test")},
                unusable=results.test.unusable,
                surroundings=surroundings,
                recipe=self.recipe.to_dict(),
            )
        )
        write_whole(self.folder.report, page)


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
