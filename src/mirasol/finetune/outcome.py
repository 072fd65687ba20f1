"""What a fine-tuning has come to: the test split before and after, with intervals, controls and a report."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirasol.checkpoint import Loaded
from mirasol.config.recipe import Recipe
from mirasol.console import count_cores, format_table
from mirasol.data.datasets.registry import read_dataset
from mirasol.evaluation.answer import AnswerSettings
from mirasol.evaluation.baselines import read_training_examples
from mirasol.evaluation.compare import compare_results
from mirasol.evaluation.controls import CONTROLS
from mirasol.evaluation.evaluate import Evaluation, evaluate_dataset, write_evaluation
from mirasol.evaluation.journal import NAME, Journal
from mirasol.evaluation.metrics import CANDIDATES, OPEN, Estimate, ProtocolScores
from mirasol.evaluation.one_clip import examine_evaluated_clip
from mirasol.evaluation.report import ReportExtras, write_report
from mirasol.finetune.folder import FinetuneFolder
from mirasol.finetune.page import ReportPage
from mirasol.training.logging import read_metrics

if TYPE_CHECKING:
    from mirasol.evaluation.compare import Difference

Report = Callable[[int, int], None]
FEW_STEPS = 100


def evaluate_split(
    loaded: Loaded,
    folder: Path,
    recipe: Recipe,
    controls: tuple[str, ...],
    progress: Report | None = None,
    split: str = "test",
) -> Evaluation:
    """Asks the checkpoint a split of the recipe's data; writes results and predictions into the folder. Resumes from
    the folder's journal, which stays until the report is written."""
    folder.mkdir(parents=True, exist_ok=True)
    options = recipe.data.options
    dataset = read_dataset("folder", recipe.data.folder, split, options)
    settings = AnswerSettings(
        root=dataset.root,
        controls=controls,
        classes=dataset.classes,
        max_new_tokens=_count_new_tokens(loaded, dataset.annotated),
        threads=count_cores(),
    )
    known = read_training_examples(dataset, options)
    evaluation = evaluate_dataset(loaded, dataset, settings, folder / NAME, 1, progress, known=known)
    write_evaluation(folder, evaluation)
    return evaluation


def _count_new_tokens(loaded: Loaded, examples: Any, least: int = 16, most: int = 128) -> int:
    """Tokens for the longest answer of the split."""
    texts = [example.target for example in examples]
    lengths = map(len, loaded.processor.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return max(least, min(most, max(lengths, default=0) + 1))


def list_controls() -> tuple[str, ...]:
    """All controls of `mirasol evaluate`."""
    return tuple(CONTROLS)


def write_finetune_report(
    folder: FinetuneFolder, loaded: Loaded, before: Evaluation, after: Evaluation, recipe: Recipe, page: ReportPage
) -> None:
    """Writes the finished report in the place of the page, after which nothing is left to do."""
    training = read_training(folder)
    extras = ReportExtras(
        title=page.title,
        lead=f"{page.lead} {training['steps']:,} steps; the starting checkpoint's answers to the same questions are in "
        "the column before.",
        log=read_metrics(folder.run / "metrics.jsonl"),
        others={"before": before},
        one_clip=examine_evaluated_clip(loaded, after),
        facts={"starting checkpoint": folder.settings.start, **page.facts},
        training_seconds=training["training_seconds"],
        recipe=recipe.to_dict(),
    )
    write_report(page.file.parent, loaded, after, extras)
    for path in (folder.path, folder.before):
        Journal.end(path)


def read_training(folder: FinetuneFolder) -> dict[str, Any]:
    """Steps and seconds of the training."""
    return json.loads((folder.run / "checkpoint" / "training.json").read_text(encoding="utf-8"))


def list_doubts(folder: FinetuneFolder, recipe: Recipe) -> list[str]:
    """What makes the result less than it could be."""
    steps = read_training(folder)["steps"]
    if steps >= FEW_STEPS:
        return []
    return [
        f"note: {steps} steps are a very short training: the answers may hardly have changed; give more --minutes or "
        f"--epochs for at least {FEW_STEPS}, and another --output"
    ]


def format_outcome(folder: FinetuneFolder, before: Evaluation, after: Evaluation) -> str:
    """The headline before and after with intervals, their paired difference, baselines and controls, in percent."""
    rows = [["", "before", "after", "difference"]]
    for protocol in (OPEN, CANDIDATES):
        if protocol in after.protocols and protocol in before.protocols:
            rows += _list_rows(protocol, before, after)
    if {example.id for example in before.examples} & {example.id for example in after.examples}:
        rows[1][3] = _format_difference(compare_results(folder.before, folder.path).rows["All"])
    for name, estimate in after.protocols[OPEN].baselines.items():
        rows.append([f"  {name}", "", format_share(estimate.value), ""])
    # Without evidence a chosen candidate falls to chance, a generated text to nothing.
    protocol = CANDIDATES if CANDIDATES in after.protocols else OPEN
    of_candidates = ", best of the candidates" if protocol == CANDIDATES else ""
    for name, control in after.controls[protocol].items():
        value = control.metrics[_find_headline(after.protocols[protocol])].value
        rows.append([f"  {name.replace('_', ' ')}{of_candidates}", "", format_share(value), ""])
    return format_table(rows)


def _list_rows(protocol: str, before: Evaluation, after: Evaluation) -> list[list[str]]:
    """A row for the answers as they are generated, and for the most likely candidate."""
    one, other = before.protocols[protocol], after.protocols[protocol]
    name = "answers exactly right" if protocol == OPEN else "best of the candidates"
    estimates = [scores.metrics[_find_headline(other)] for scores in (one, other)]
    return [[f"{name} ({estimates[1].n})", *map(_format_estimate, estimates), ""]]


def _find_headline(scores: ProtocolScores) -> str:
    """The number that says how many answers are right; of classes, the headline is another."""
    return "top-1" if "top-1" in scores.metrics else scores.headline


def format_share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _format_estimate(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return format_share(estimate.value)
    return f"{format_share(estimate.value)} [{format_share(estimate.low)}, {format_share(estimate.high)}]"


def _format_difference(row: "Difference") -> str:
    low, high = (f"{100 * bound:+.1f}" if bound is not None else "-" for bound in (row.low, row.high))
    return f"{100 * row.difference:+.1f} [{low}, {high}]"


def list_next_commands(folder: FinetuneFolder, evaluation: Evaluation, recipe: Recipe, report: Path) -> list[str]:
    """Lines to copy: ask about a clip of the test, export, open the report."""
    example = evaluation.examples[0]
    clip = recipe.data.folder / example.media
    window = "".join(
        f" --{name} {value:g}" for name, value in (("start", example.start), ("end", example.end)) if value is not None
    )
    name = shlex.quote(str(folder.path))
    return [
        f"mirasol ask {name} {shlex.quote(str(clip))} {shlex.quote(example.prompt)}{window}",
        f"mirasol export {shlex.quote(str(folder.run))} {shlex.quote(f'shared/{folder.path.name}')} --best",
        f"report: {report}",
    ]
