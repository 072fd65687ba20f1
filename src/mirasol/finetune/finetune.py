"""`mirasol finetune`: from a folder of clips to a measured model, in parts that are not done twice."""

import contextlib
import copy
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirasol.checkpoint import Loaded, find_checkpoint, load_checkpoint
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import ModelRecipe, Recipe
from mirasol.config.recipe_io import load_recipe, parse_overrides, recipe_from_dict
from mirasol.console import count_cores, print_line, show_progress
from mirasol.data.text_lengths import count_row_tokens, make_counter
from mirasol.errors import Stopped, UserError
from mirasol.evaluation.evaluate import Evaluation
from mirasol.files import remove_folder, write_file_atomically
from mirasol.finetune.choices import (
    ENCODERS,
    STAGE,
    Choice,
    ClipFacts,
    Wishes,
    check_overrides,
    choose_recipe,
    format_choices,
    make_values,
)
from mirasol.finetune.duration import Pace, count_steps_within, describe_time
from mirasol.finetune.folder import FinetuneFolder
from mirasol.finetune.labels import Labels
from mirasol.finetune.layouts import read_labels
from mirasol.finetune.measure import (
    Decoded,
    bound_step_bytes,
    check_decodable,
    decode_some,
    find_cache_limit,
    find_free_memory,
    fit_memory,
    measure_pace,
)
from mirasol.finetune.outcome import (
    evaluate_split,
    format_outcome,
    list_controls,
    list_doubts,
    list_next_commands,
    write_finetune_report,
)
from mirasol.finetune.page import AFTER, BEFORE, REPORT, SURVEY, TRAINING, ReportPage, draw_training
from mirasol.finetune.settings import Settings
from mirasol.finetune.survey import CLASS_LIST, Survey, survey_folder, write_splits
from mirasol.hub import MODEL, describe_folder_before_hub, name_commit
from mirasol.media.timeline import cut_into_chunks
from mirasol.training.build import pick_device
from mirasol.training.export import export_run
from mirasol.training.features import find_obstacles
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train
from mirasol.training.weights.initial import load_initial

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_ANSWERS = 5
MOST_ASKED_FIRST = 500  # questions to the starting checkpoint: more of them would let the training wait


def finetune(settings: Settings, console: "Console", page: ReportPage | None = None) -> Path:
    """Understands the folder, chooses a recipe, trains it, evaluates the result beside the starting checkpoint, and
    reports. Returns the folder of the best checkpoint. The same settings continue an interrupted fine-tuning; a
    finished one is left unchanged.

    page: shows what is done so far; by default one at the report's place, which the report replaces

    Raises:
        UserError: a folder or checkpoint that cannot be used, another fine-tuning in `output`, and as `train`.
        Stopped: an interruption; the message says how to continue.
    """
    check_overrides(parse_overrides(settings.overrides))
    folder = FinetuneFolder(settings)
    # Of a repository of the hub its commit, which a resumed fine-tuning keeps.
    start = str(load_recipe(folder.recipe).model.init) if folder.is_resumed else name_commit(settings.start, MODEL)
    checkpoint = find_checkpoint(start)
    labels = read_labels(Path(settings.data))
    folder.begin(labels, checkpoint)
    if folder.is_finished:
        _restore_checkpoint(folder)
        print_line(console, f"{folder.path}: this fine-tuning is finished: {folder.report}")
        return folder.checkpoint
    lead = f"{settings.start}, fine-tuned on {settings.data}."
    page = page or ReportPage(folder.report, f"Fine-tuned on {Path(settings.data).resolve().name}", lead)
    page.add_parts((SURVEY, BEFORE, TRAINING, AFTER, REPORT))
    try:
        return _run_parts(folder, start, labels, console, page)
    except KeyboardInterrupt as error:
        raise Stopped(f"{folder.path}: interrupted: run the same command again to continue", signal.SIGINT) from error
    except Stopped as error:
        again = re.sub("(continue|start again) with --resume", "run the same command again to continue", str(error))
        raise Stopped(again, error.signal_number) from error


def _run_parts(folder: FinetuneFolder, start: str, labels: Labels, console: "Console", page: ReportPage) -> Path:
    """What is left to do of a fine-tuning, part by part."""
    if folder.is_resumed:
        print_line(console, f"{folder.path}: continues")
        page.end(SURVEY, "chosen before an interruption: recipe.yaml")
    else:
        page.begin(SURVEY)
        with _discard_if_failed(folder):
            page.end(SURVEY, Beginning(folder, start, console).run(labels))
    recipe = load_recipe(folder.recipe)
    before = _evaluate_start(folder, recipe, console, page) if count_questions(folder) <= MOST_ASKED_FIRST else None
    _train(folder, recipe, console, page)
    before = before or _evaluate_start(folder, recipe, console, page)
    page.begin(AFTER)
    after = _evaluate(folder, recipe, console, str(folder.checkpoint), folder.path, list_controls())
    page.end(AFTER, _print_answers(console, str(folder.path), after))
    page.begin(REPORT)
    loaded = load_checkpoint(folder.checkpoint)
    write_finetune_report(folder, loaded, before, after, recipe, page)
    print_line(console, "\n" + format_outcome(folder, before, after) + "\n")
    for line in [*list_doubts(folder, recipe), *list_next_commands(folder, after, recipe, page.file)]:
        print_line(console, line)
    folder.record({"finished": True})
    return folder.checkpoint


def _train(folder: FinetuneFolder, recipe: Recipe, console: "Console", page: ReportPage) -> None:
    """Trains, or what is left of it, and exports the best checkpoint."""

    def watch() -> None:
        page.show(TRAINING, *draw_training(read_metrics(folder.run / "metrics.jsonl")))

    page.begin(TRAINING)
    train(recipe, resume=True, console=console, watch=watch)
    _restore_checkpoint(folder)
    watch()
    page.end(TRAINING)


def _restore_checkpoint(folder: FinetuneFolder) -> None:
    """Exports the run's best checkpoint unless it is there. Raises UserError where neither is."""
    if (folder.checkpoint / "config.json").is_file():
        return
    if not folder.run.is_dir():
        raise UserError(f"{folder.checkpoint}: is gone, and so is {folder.run}: give another --output to train again")
    export_run(folder.run, folder.checkpoint, best=True)


@contextlib.contextmanager
def _discard_if_failed(folder: FinetuneFolder) -> Iterator[None]:
    """Removes a folder that nothing was trained in where its beginning fails, so that a mended command may use it."""
    try:
        yield
    except Exception:
        remove_folder(folder.data)
        for file in (folder.marker, folder.recipe, folder.report):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.path.rmdir()
        raise


def _evaluate(
    folder: FinetuneFolder, recipe: Recipe, console: "Console", name: str, output: Path, controls: tuple[str, ...]
) -> Evaluation:
    loaded = load_checkpoint(name, pick_device(recipe.device))
    with show_progress(console, f"Answering the test questions ({name})", "clips") as progress:
        return evaluate_split(loaded, output, recipe, controls, progress)


def _evaluate_start(folder: FinetuneFolder, recipe: Recipe, console: "Console", page: ReportPage) -> Evaluation:
    """The starting checkpoint on the same questions, without controls."""
    page.begin(BEFORE)
    evaluation = _evaluate(folder, recipe, console, str(recipe.model.init), folder.before, ())
    page.end(BEFORE, _print_answers(console, folder.settings.start, evaluation))
    return evaluation


def count_questions(folder: FinetuneFolder) -> int:
    """Questions of the test split."""
    with (folder.data / "test.jsonl").open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def _print_answers(console: "Console", name: str, evaluation: Evaluation) -> str:
    """Prints some answers with what is right, and how many are right; returns the same with the tables of scores."""
    judged = next(iter(evaluation.protocols.values())).judged
    right = sum(item.right for item in judged)
    lines = [f"{name}: {right} of {len(judged)} test questions right, for example"]
    for item in judged[:: max(1, len(judged) // SHOWN_ANSWERS)][:SHOWN_ANSWERS]:
        verdict = "right" if item.right else f"wrong: {item.example.target}"
        lines.append(f"  {item.example.media}: {item.example.prompt} {item.shown_answer} ({verdict})")
    for line in lines:
        print_line(console, line)
    return "\n".join([*lines, "", evaluation.format_table()])


class Beginning:
    """What comes before the training: the survey and the recipe, which are written down once."""

    def __init__(self, folder: FinetuneFolder, start: str, console: "Console"):
        self.folder, self.console, self.settings, self.start = folder, console, folder.settings, start
        self.overrides = parse_overrides(self.settings.overrides)
        self.device = pick_device(str(self.overrides.get("device", "auto")))
        self.loaded = load_checkpoint(start)
        self.config, self.parameters = copy.deepcopy(self.loaded.model.config), self.loaded.model.num_params()
        self.printed: list[str] = []

    def run(self, labels: Labels) -> str:
        """Surveys, chooses, measures; writes data/ and last recipe.yaml. Returns what was printed."""
        import yaml

        with show_progress(self.console, "Reading headers", "files") as progress:
            survey = survey_folder(labels, int(self.overrides.get("seed", 0)), progress)
        remarks = [*survey.list_remarks(), *filter(None, [describe_folder_before_hub(self.start)])]
        self._print([*survey.format_lines(), *(f"note:     {remark}" for remark in remarks)])
        write_splits(self.folder.data, survey)
        facts = gather_facts(survey, self.loaded)
        recipe, choices = self._choose(survey, facts, Wishes(self.settings.epochs, None, self.overrides))
        if recipe.model != ModelRecipe(init=self.start):
            self.loaded = load_initial(recipe)
        self._print(["measuring memory and the time of a step"])
        check_decodable(self.loaded, labels.root, survey.clips)
        decoded, chunks = decode_some(self.loaded, labels.root, survey.all_clips), count_chunks(self.loaded, facts)
        self._print(f"note:     {note}" for note in decoded.describe())
        longest = facts.longest_text
        total = sum(self.parameters.values())
        bound = bound_step_bytes(self.loaded.model.config, total, recipe.stages[STAGE], chunks, longest)
        recipe, memory = fit_memory(recipe, find_free_memory(self.device), chunks, longest, bound)
        pace = self._measure(recipe, survey, decoded)
        if self.settings.minutes is not None:
            steps = count_steps_within(60 * self.settings.minutes, recipe, facts, pace)
            chosen, choices = self._choose(survey, facts, Wishes(None, steps, self.overrides))
            recipe = replace(chosen, accumulation=recipe.accumulation, recompute=recipe.recompute)
        time = describe_time(recipe, facts, len(survey.clips["test"]), pace, decoded.seconds)
        name = self.folder.recipe
        self._print(["recipe:", *(f"  {line}" for line in format_choices(choices)), f"memory:   {memory}", time])
        self._print([f"saved as  {name}: `mirasol train --config {name} --output DIR` trains the same"])
        write_file_atomically(name, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        return "\n".join(self.printed)

    def _print(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.printed.append(line)
            print_line(self.console, line)

    def _choose(self, survey: Survey, facts: ClipFacts, wishes: Wishes) -> tuple[Recipe, list[Choice]]:
        """The recipe by the rules, before memory and time are looked at."""
        is_gpu = self.device.type == "cuda"
        choices = choose_recipe(facts, self.config, self.parameters, count_cores(), is_gpu, wishes)
        options = {"annotations": str(self.folder.data)}
        if survey.classes:
            options["class_list"] = str(self.folder.data / CLASS_LIST)
        data: dict[str, Any] = {"root": str(survey.labels.root), "options": options, "cache": str(self.folder.cache)}
        if any(choice.key == "data.decode" and choice.value == "ahead" for choice in choices):
            data["cache_limit"] = find_cache_limit(self.folder.path)
        paths = {"output": str(self.folder.run), "data": data, "model": {"init": self.start}}
        recipe = recipe_from_dict(make_values(choices, paths, self.overrides), "finetune")
        if "feature_cache" not in self.overrides.get("data", {}) and is_encoded_once(recipe, self.config):
            limit = find_cache_limit(self.folder.path)
            why = f"vit, tubes and audio stay as they are: they compute a clip once, into at most {limit:g} GB"
            choices = [*choices, Choice("data.feature_cache", str(self.folder.features), why)]
            kept = replace(recipe.data, feature_cache=str(self.folder.features), feature_cache_limit=limit)
            recipe = replace(recipe, data=kept)
        return recipe, choices

    def _measure(self, recipe: Recipe, survey: Survey, decoded: Decoded) -> Pace:
        """With the longest of the clips that were decoded."""
        if not decoded.tensors:
            return Pace(0.0)
        longest = max(decoded.tensors, key=lambda tensors: len(tensors["video_mask"]))
        return measure_pace(recipe, self.loaded, survey.splits.examples["train"], longest, self.device)


def is_encoded_once(recipe: Recipe, config: MirasolConfig) -> bool:
    """Whether the recipe leaves the encoders as they are, and nothing else makes their features change."""
    trains = recipe.stages[STAGE].trains
    if trains is None or {*trains} & {*ENCODERS} or recipe.parallel.kind == "fsdp":
        return False
    return not find_obstacles(recipe, config, {STAGE: ()})


def gather_facts(survey: Survey, loaded: Loaded) -> ClipFacts:
    """What the rules ask of the clips."""
    clips, count = survey.all_clips, make_counter(loaded.processor.tokenizer)
    rows = count_row_tokens((example for clip in clips for example in clip.examples), count)
    return ClipFacts(
        train=len(survey.clips["train"]),
        validation=len(survey.clips["validation"]),
        questions=tuple(len(clip.examples) for clip in survey.clips["train"]),
        seconds=tuple(survey.seconds),
        longest_text=max(tokens for _, tokens in rows),
        kinds=tuple(sorted({"clip" if clip.start is clip.end is None else "segment" for clip in clips})),
        has_classes=bool(survey.classes),
    )


def count_chunks(loaded: Loaded, facts: ClipFacts) -> int:
    """Chunks of the longest clip."""
    grid = loaded.processor.feature_extractor.grid
    if not facts.seconds:
        return grid.num_chunks or grid.max_chunks
    return cut_into_chunks(0.0, max(facts.seconds[-1], 1e-3), grid).num_chunks
