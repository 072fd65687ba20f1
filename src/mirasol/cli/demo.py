"""`mirasol demo`: the complete path once, from rendering data to a report; resumable."""

from __future__ import annotations

import importlib.resources
import json
import shlex
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mirasol.console import print_line
from mirasol.errors import Stopped, UserError
from mirasol.files import write_file_atomically

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console

    from mirasol.checkpoint import Loaded
    from mirasol.cli.common import MakeParser
    from mirasol.config.recipe import Recipe
    from mirasol.evaluation.evaluate import Evaluation
    from mirasol.evaluation.metrics import TypeScore
    from mirasol.evaluation.one_clip import OneClip

T = TypeVar("T")
METRICS, REPORT, MARKER = "metrics.json", "report.html", "demo.json"
HELP = "fine-tune the shipped weights on a world they have not seen, measure them, and write a report"
DESCRIPTION = """Fine-tuning from beginning to end, on a CPU, in some minutes: renders clips of a world that the shipped
weights have not seen (signs and signals), shows what `tiny` answers there, runs `mirasol finetune` on them, and shows
what it answers then. OUTPUT/report.html exists from the first minute on and fills up.

With --scratch everything is trained from random weights instead, on shapes and sounds, which takes several times as
long. Starting an interrupted demo again resumes it. A finished one is never overwritten."""
CLIPS = {"train": 600, "validation": 40, "test": 100}
SCRATCH_CLIPS = {"train": 2400, "validation": 100, "test": 200}
# What the demo changes in the recipe of `mirasol finetune`: docs/shapes-and-sounds.md says why.
CHANGES = (
    "stages.finetune.steps=500",
    "stages.finetune.clips_per_step=8",
    "stages.finetune.questions_per_clip=20",
    "stages.finetune.type_weights={sight: 2, bound: 2, order: 2, story: 3, pairs: 2}",
    "optimizer.learning_rate=1.5e-3",
    "optimizer.warmup_steps=20",
    "optimizer.schedule=plateau",
    "optimizer.final_scale=0.05",
    "validate_every=50",
)
# What all of the demo takes, in products of matrices: the processor seconds of a run times the speed measured then.
DEMO_GFLOP = 60_000
MACHINE, FIRST, RENDERING = "the machine", "what the shipped weights answer about one clip", "rendering clips"


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--output", type=str, default="runs/demo", help="folder for everything the demo makes")
    parser.add_argument("--scratch", action="store_true", help="train from random weights, on shapes and sounds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, and of the fine-tuning")
    for split, count in CLIPS.items():
        default = f"by default {count}, with --scratch {SCRATCH_CLIPS[split]}"
        parser.add_argument(f"--{split}", type=int, help=f"number of {split} clips, {default}")
    parser.add_argument(
        "--recipe", type=str, help="with --scratch: what to train, by default demo.yaml of this package"
    )
    parser.add_argument(
        "--figures", type=str, metavar="pdf|png", help="with --scratch: also write the report's figures as files"
    )


def run(options: Namespace) -> None:
    """Runs the demo."""
    from mirasol.console import make_console
    from mirasol.evaluation.figures import check_figure_format

    check_figure_format(options.figures)
    for name in ("recipe", "figures"):
        if options[name] is not None and not options.scratch:
            raise UserError(f"--{name} {options[name]}: has no effect without --scratch")
    usual = SCRATCH_CLIPS if options.scratch else CLIPS
    counts = {split: count if options[split] is None else options[split] for split, count in usual.items()}
    settings = DemoSettings(options.output, options.recipe, options.seed, **counts, scratch=options.scratch)
    if options.scratch:
        run_scratch_demo(settings, make_console(), options.figures)
    else:
        run_demo(settings, make_console())


@dataclass(frozen=True)
class DemoSettings:
    """output: folder for everything; recipe: of a demo from scratch; its output and data.root are replaced, None is the
        package's own
    seed, train, validation, test: seed and numbers of clips of the data
    changes: keys of the recipe of a fine-tuning
    """

    output: str
    recipe: str | None
    seed: int
    train: int
    validation: int
    test: int
    scratch: bool = False
    changes: tuple[str, ...] = CHANGES


class DemoFolder:
    """The demo's folder: metrics.json, report.html, and demo.json, which records the settings and the seconds of each
    finished part; signs/ (clips) and finetuned/ of a fine-tuning; data/ and train/ (the run) of one from scratch.

    Raises:
        UserError: the folder has a finished demo, something else, or a demo with other settings.
    """

    def __init__(self, settings: DemoSettings):
        self.path = Path(settings.output)
        self.data, self.run = self.path / "data", self.path / "train"
        self.metrics, self.report, self.marker = (self.path / name for name in (METRICS, REPORT, MARKER))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file: give a folder with --output")
        self.clips, self.finetuned = self.path / "signs", self.path / "finetuned"
        if self.metrics.exists():
            raise UserError(
                f"{self.path}: already has a finished demo ({self.report}): give another folder (mirasol demo "
                f"--output runs/demo-2, or make demo OUTPUT=runs/demo-2) or remove this one"
            )
        chosen = json.loads(json.dumps({key: value for key, value in asdict(settings).items() if key != "output"}))
        self.state: dict[str, Any] = {"settings": chosen, "seconds": {}}
        self.is_resumed = self.marker.exists()
        if self.is_resumed:
            self.state = json.loads(self.marker.read_text(encoding="utf-8"))
            changed = [key for key in chosen if chosen[key] != self.state["settings"].get(key)]
            if changed:
                before = self.state["settings"].get(changed[0])
                raise UserError(
                    f"{self.path}: has a demo started with {changed[0]}={before}, now it is {chosen[changed[0]]}: "
                    f"give the same value, or another --output"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path}: not a demo folder, and not empty: give another folder with --output")

    def create(self) -> None:
        """Creates the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._save()

    def record(self, **facts: Any) -> None:
        """Adds to demo.json."""
        self.state |= facts
        self._save()

    def add_seconds(self, part: str, seconds: float) -> None:
        """Adds to the seconds of a part, which may also have run in an earlier, interrupted attempt."""
        self.state["seconds"][part] = round(self.state["seconds"].get(part, 0.0) + seconds, 1)
        self._save()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part, and in total."""
        parts = dict(self.state["seconds"])
        return {**parts, "total": round(sum(parts.values()), 1)}

    def _save(self) -> None:
        write_file_atomically(self.marker, json.dumps(self.state, indent=1) + "\n")


def find_demo_recipe() -> Path:
    """The package's own recipe for the demo. Raises UserError where the package was installed without it."""
    file = Path(str(importlib.resources.files("mirasol"))) / "recipes" / "demo.yaml"
    if not file.is_file():
        raise UserError(f"{file}: missing from this installation: name a recipe with --recipe")
    return file


def run_scratch_demo(settings: DemoSettings, console: Console, figures: str | None = None) -> None:
    """Renders, trains from random weights, evaluates, asks and reports; prints each part, its result and its time.

    Raises:
        UserError: see `DemoFolder`; a recipe that cannot be used.
    """
    from mirasol.config.recipe_io import load_recipe

    recipe = load_recipe(settings.recipe or find_demo_recipe())
    folder = DemoFolder(settings)
    recipe = replace(recipe, output=str(folder.run), data=replace(recipe.data, root=str(folder.data)))
    folder.create()
    if folder.is_resumed:
        console.print(f"{folder.path}: resuming an interrupted demo")
    ScratchDemo(settings, recipe, folder, console, figures).run()


class ScratchDemo:
    """The parts of the demo from random weights in their order; each prints its heading, its result and its time."""

    def __init__(
        self, settings: DemoSettings, recipe: Recipe, folder: DemoFolder, console: Console, figures: str | None = None
    ):
        self.settings, self.recipe, self.folder, self.console, self.figures = settings, recipe, folder, console, figures
        self.number = 0

    def run(self) -> None:
        """All parts, one after the other."""
        self._run_part("data", "Rendering shapes and sounds", self.render)
        checkpoint = self._run_part("train", "Training", self.train)
        loaded, evaluation = self._run_part("evaluate", "Evaluating on unseen clips", lambda: self.evaluate(checkpoint))
        shipped = self._run_part(
            "evaluate_shipped", "Evaluating the shipped weights on the same clips", self.evaluate_shipped
        )
        one_clip = self._run_part("ask", "Asking about one unseen clip", lambda: self.ask(loaded, evaluation))
        self._run_part("report", "Writing the report", lambda: self.write_report(loaded, evaluation, shipped, one_clip))
        score, chance = score_demo(evaluation)
        right = f"{score.accuracy:.1%} of {score.n} questions right, chance {chance.accuracy:.1%}"
        self.console.print(f"\nDone in {_format_minutes(self.folder.seconds['total'])}: {right}.", style="bold")
        self.console.print(f"The report is {self.folder.report.resolve()}")

    def _run_part(self, name: str, title: str, work: Callable[[], T]) -> T:
        self.number += 1
        self.console.print(f"\n{self.number}. {title}", style="bold")
        began = time.monotonic()
        try:
            return work()
        finally:
            seconds = time.monotonic() - began
            self.folder.add_seconds(name, seconds)
            self.console.print(f"   {_format_minutes(seconds)}", style="dim")

    def render(self) -> None:
        """Renders the data set, unless an earlier attempt completed it."""
        from mirasol.console import count_cores, show_progress
        from mirasol.synthetic.synthesize import synthesize

        chosen = self.settings
        if (self.folder.data / "manifest.json").exists():
            self.console.print(f"{self.folder.data}: already complete")
            return
        with show_progress(self.console, "Rendering", "clips") as report:
            synthesize(
                self.folder.data,
                seed=chosen.seed,
                train=chosen.train,
                validation=chosen.validation,
                test=chosen.test,
                workers=count_cores(),
                progress=report,
            )
        self.console.print(f"{chosen.train} training, {chosen.validation} validation and {chosen.test} test clips")

    def train(self) -> Path:
        """Trains from scratch, or from where an earlier attempt stopped; returns the checkpoint."""
        from mirasol.training.trainer import train

        return train(self.recipe, resume=True, console=self.console)

    def evaluate(self, checkpoint: str | Path) -> tuple[Loaded, Evaluation]:
        """Evaluates on the test clips, with controls, as `mirasol evaluate` does; prints the table.

        Candidates are not scored: what the demo reports is open generation.
        """
        from mirasol.checkpoint import load_checkpoint
        from mirasol.config.recipe import DatasetOptions
        from mirasol.console import count_cores, show_progress
        from mirasol.data.datasets.registry import read_dataset
        from mirasol.evaluation.answer import AnswerSettings
        from mirasol.evaluation.baselines import read_training_examples
        from mirasol.evaluation.controls import CONTROLS
        from mirasol.evaluation.evaluate import evaluate_dataset

        loaded = load_checkpoint(checkpoint)
        dataset = read_dataset("folder", self.folder.data, "test")
        known = read_training_examples(dataset, DatasetOptions())
        settings = AnswerSettings(dataset.root, tuple(CONTROLS), score_candidates=False, threads=count_cores())
        with show_progress(self.console, "Answering", "clips") as report:
            evaluation = evaluate_dataset(loaded, dataset, settings, progress=report, known=known)
        self.console.print(evaluation.format_table(), markup=False)
        return loaded, evaluation

    def evaluate_shipped(self) -> Evaluation | None:
        """Evaluates the shipped weights; None where the package has none."""
        from mirasol.checkpoint import find_shipped_checkpoint

        if find_shipped_checkpoint("tiny") is None:
            self.console.print("this installation has no shipped weights")
            return None
        return self.evaluate("tiny")[1]

    def ask(self, loaded: Loaded, evaluation: Evaluation) -> OneClip:
        """Asks about one test clip: a first question as `mirasol ask` does, the answer streamed, then all of them at
        once; prints the answers and what is right."""
        from mirasol.evaluation.answer import AnswerStreamer, answer_clips
        from mirasol.evaluation.metrics import OPEN
        from mirasol.evaluation.one_clip import choose_clip, examine_clip

        judged = choose_clip(evaluation.protocols[OPEN].judged)
        media, prompts = judged[0].example.media, [item.example.prompt for item in judged]
        file = self.folder.data / media
        clip = loaded.processor.feature_extractor.read(file, threads=0)
        tensors = loaded.processor.feature_extractor.tensors(clip)
        self.console.print(f'mirasol ask {self.folder.path} {file} "{prompts[0]}"', markup=False)
        streamer = AnswerStreamer(loaded.processor, lambda text: self.console.print(text, end="", markup=False))
        answer_clips(loaded.model, loaded.processor, [tensors], [prompts[:1]], streamer=streamer)
        self.console.print(f"\n\nAll {len(judged)} questions about this clip:")
        for item in judged:
            verdict = "" if item.right else f"  (right: {item.example.target})"
            self.console.print(f"  {item.example.prompt}  {item.shown_answer}{verdict}", markup=False)
        return examine_clip(loaded, clip, media, judged)

    def write_report(
        self, loaded: Loaded, evaluation: Evaluation, shipped: Evaluation | None, one_clip: OneClip
    ) -> None:
        """Writes report.html, then metrics.json, which marks the demo as finished."""
        from mirasol.evaluation.report import ReportExtras, write_report
        from mirasol.training.logging import read_metrics

        metrics = describe_metrics(evaluation, shipped, self.folder.seconds)
        clips, asked = self.settings, metrics["test"]["n"]
        extras = ReportExtras(
            title="Shapes and sounds",
            lead=f"A Mirasol model learns to watch and listen: trained from scratch on {clips.train:,} rendered video "
            f"files, asked {asked:,} questions about {clips.test:,} it has never seen. An answer counts when it is "
            f"exactly right.",
            log=read_metrics(self.folder.run / "metrics.jsonl"),
            others={} if shipped is None else {"shipped weights": shipped},
            one_clip=one_clip,
            facts=self._collect_facts(),
            training_seconds=self.folder.seconds.get("train"),
            recipe=self.recipe.to_dict(),
        )
        write_report(self.folder.path, loaded, evaluation, extras, self.figures)
        write_file_atomically(self.folder.metrics, json.dumps(metrics, indent=1) + "\n")

    def _collect_facts(self) -> dict[str, str]:
        """What the end of the report lists: seconds by part, numbers of clips, the run's hardware and commit."""
        from mirasol.evaluation.report import format_seconds

        surroundings = json.loads((self.folder.run / "run.json").read_text(encoding="utf-8"))
        facts = {name.replace("_", " "): format_seconds(value) for name, value in self.folder.seconds.items()}
        facts |= {f"{name} clips": f"{getattr(self.settings, name):,}" for name in ("train", "validation", "test")}
        facts |= {
            name.replace("_", " "): str(value)
            for name, value in surroundings.get("hardware", {}).items()
            if value is not None
        }
        return {**facts, "commit": surroundings["commit"][:10]} if surroundings.get("commit") else facts


def run_demo(settings: DemoSettings, console: Console) -> None:
    """Renders signs and signals, fine-tunes the shipped weights on them, and reports; prints each part.

    Raises:
        UserError: see `DemoFolder`, and as `finetune`.
        Stopped: an interruption; the message says how to continue.
    """
    from mirasol.checkpoint import find_checkpoint

    folder = DemoFolder(settings)
    find_checkpoint("tiny")
    folder.create()
    if folder.is_resumed:
        print_line(console, f"{folder.path}: resuming an interrupted demo")
    demo = Demo(settings, folder, console)
    try:
        demo.run()
    except KeyboardInterrupt as error:
        raise Stopped(f"{folder.path}: interrupted: run the same command again to continue", signal.SIGINT) from error


class Demo:
    """The parts of the demo in their order; each prints its result, and the page shows it."""

    def __init__(self, settings: DemoSettings, folder: DemoFolder, console: Console):
        from mirasol.finetune.folder import FinetuneFolder
        from mirasol.finetune.page import AFTER, BEFORE, SURVEY, TRAINING, ReportPage
        from mirasol.finetune.page import REPORT as REPORT_PART
        from mirasol.finetune.settings import Settings

        self.settings, self.folder, self.console = settings, folder, console
        changes = (*settings.changes, f"seed={settings.seed}")
        self.finetuning = Settings(str(folder.clips), "tiny", str(folder.finetuned), overrides=changes)
        self.is_finetuned = FinetuneFolder(self.finetuning).is_finished
        lead = f"tiny knows shapes and sounds; here it learns signs and signals from {settings.train:,} rendered clips."
        parts = (MACHINE, FIRST, RENDERING, SURVEY, BEFORE, TRAINING, AFTER, REPORT_PART)
        self.page = ReportPage(folder.report, "Signs and signals", lead, parts)

    def run(self) -> None:
        """All parts, one after the other."""
        from mirasol.finetune.finetune import finetune

        if not self.is_finetuned:  # else the report is complete
            self._run_part("machine", MACHINE, self.measure)
            self._run_part("first answers", FIRST, self.ask_first)
            self._run_part("rendering", RENDERING, self.render)
            print_line(self.console, f"\n{self.format_command()}\n")
            began = time.monotonic()
            try:
                finetune(self.finetuning, self.console, self.page)
            finally:
                self.folder.add_seconds("finetune", time.monotonic() - began)
        metrics = {**collect_metrics(self.folder), "machine": self.folder.state["machine"]}
        write_file_atomically(self.folder.metrics, json.dumps(metrics, indent=1) + "\n")
        before, after, chance = (metrics[name]["accuracy"] for name in ("before", "after", "chance"))
        took = _format_minutes(self.folder.seconds["total"])
        n = metrics["after"]["n"]
        right = f"{after:.1%} of {n} questions right, before {before:.1%}, chance {chance:.1%}"
        self.console.print(f"\nDone in {took}: {right}.", style="bold")
        print_line(self.console, f"The report is {self.folder.report.resolve()}")

    def _run_part(self, key: str, name: str, work: Callable[[], str]) -> None:
        self.page.begin(name)
        began = time.monotonic()
        try:
            text = work()
        finally:
            self.folder.add_seconds(key, time.monotonic() - began)
        self.page.end(name, text)

    def format_command(self) -> str:
        """The line that does the same by hand."""
        chosen = self.finetuning
        return shlex.join(["mirasol", "finetune", chosen.data, "--output", chosen.output, *chosen.overrides])

    def measure(self) -> str:
        """Measures the processor, and says how long everything will take."""
        from mirasol.console import count_cores
        from mirasol.cost.devices import measure_tflops

        cores, speed = count_cores(), 1000 * measure_tflops()
        self.folder.record(machine={"cores": cores, "gflops": round(speed, 1)})
        text = (
            f"{cores} cores, together {speed:.0f} GFLOP/s in a float32 product: about "
            f"{_format_minutes(DEMO_GFLOP / speed)} if nothing else runs"
        )
        print_line(self.console, text)
        print_line(self.console, f"the report fills up meanwhile: {self.folder.report.resolve()}")
        self.page.facts["machine"] = f"{cores} cores, {speed:.0f} GFLOP/s"
        return text

    def ask_first(self) -> str:
        """Asks the shipped weights about the first test clip, before anything else takes time."""
        if "first" not in self.folder.state:
            self.folder.record(first=answer_one_scene(self.settings.seed))
        lines = ["what tiny answers about a clip of signs and signals:", *self.folder.state["first"]]
        for line in lines:
            print_line(self.console, line)
        return "\n".join(lines)

    def render(self) -> str:
        """Renders the clips, unless an earlier attempt did."""
        from mirasol.console import count_cores, show_progress
        from mirasol.synthetic.synthesize import synthesize
        from mirasol.synthetic.worlds import SIGNS_AND_SIGNALS

        chosen = self.settings
        counts = {split: getattr(chosen, split) for split in CLIPS}
        text = f"{self.folder.clips}: clips to " + ", ".join(f"{split} {count}" for split, count in counts.items())
        if not (self.folder.clips / "manifest.json").exists():
            with show_progress(self.console, "Rendering", "clips") as report:
                synthesize(
                    self.folder.clips, seed=chosen.seed, **counts, kind="whole", world=SIGNS_AND_SIGNALS,
                    workers=count_cores(), progress=report,
                )  # fmt: skip
        print_line(self.console, text)
        return text


def answer_one_scene(seed: int) -> list[str]:
    """Each question about the first test scene of signs and signals, the shipped weights' answer, and the right one."""
    from mirasol.checkpoint import load_checkpoint
    from mirasol.evaluation.answer import answer_clips
    from mirasol.synthetic.render import write_clip
    from mirasol.synthetic.scenes import make_split_scene
    from mirasol.synthetic.synthesize import list_clip_questions
    from mirasol.synthetic.worlds import SIGNS_AND_SIGNALS

    scene = make_split_scene(seed, "test", 0, SIGNS_AND_SIGNALS)
    asked, loaded = list_clip_questions(scene, seed, "test", 0), load_checkpoint("tiny")
    with tempfile.TemporaryDirectory() as folder:
        write_clip(scene, Path(folder) / "clip.mp4")
        extractor = loaded.processor.feature_extractor
        tensors = extractor.tensors(extractor.read(Path(folder) / "clip.mp4"))
    [answers] = answer_clips(loaded.model, loaded.processor, [tensors], [[question.prompt for question in asked]])
    lines = []
    for question, answer in zip(asked, answers, strict=True):
        verdict = "right" if answer.text == question.target else f"wrong: {question.target}"
        lines.append(f"  {question.prompt}  {answer.text}  ({verdict})")
    return lines


def collect_metrics(folder: DemoFolder) -> dict[str, Any]:
    """The content of metrics.json, from the results of the fine-tuning; scores are `{"accuracy", "by_type", "n"}`."""
    from mirasol.evaluation.metrics import OPEN

    def describe(rows: dict[str, Any]) -> dict[str, Any]:
        types = {name: row["value"] for name, row in rows.items() if name != "All"}
        return {"accuracy": rows["All"]["value"], "by_type": types, "n": rows["All"]["n"]}

    files = {"before": folder.finetuned / "before", "after": folder.finetuned}
    results = {
        name: json.loads((file / "results.json").read_text(encoding="utf-8"))["protocols"][OPEN]
        for name, file in files.items()
    }
    after = results["after"]
    return {
        **{name: describe(scores["metrics"]) for name, scores in results.items()},
        "chance": {"accuracy": after["baselines"]["chance"]["value"]},
        "controls": {name: describe(rows) for name, rows in after["controls"].items()},
        "seconds": folder.seconds,
    }


def score_demo(evaluation: Evaluation) -> tuple[TypeScore, TypeScore]:
    """The score of the answers, and that of chance."""
    from mirasol.evaluation.metrics import OPEN, score_chance

    scores = evaluation.protocols[OPEN]
    return scores.by_type, score_chance(item.example for item in scores.judged)


def describe_metrics(evaluation: Evaluation, shipped: Evaluation | None, seconds: dict[str, float]) -> dict[str, Any]:
    """The content of metrics.json; every score is `{"accuracy", "by_type", "n"}`."""
    test, chance = score_demo(evaluation)
    return {
        "test": test.to_dict(),
        "chance": chance.to_dict(),
        "controls": _describe_controls(evaluation),
        "shipped": None
        if shipped is None
        else {"test": score_demo(shipped)[0].to_dict(), "controls": _describe_controls(shipped)},
        "seconds": seconds,
    }


def _describe_controls(evaluation: Evaluation) -> dict[str, Any]:
    from mirasol.evaluation.metrics import OPEN

    return {name: scores.by_type.to_dict() for name, scores in evaluation.controls[OPEN].items()}


def _format_minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
