"""What a suite will cost: runs, steps, FLOPs, hours and disk, before anything of it is made, and kept with it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mirasol.ablation.identity import hash_code, hash_identity, leave_questions_out
from mirasol.ablation.result import PLAN, SUITE
from mirasol.ablation.runs import Run, SuiteRuns
from mirasol.checkpoint import find_checkpoint, load_processor
from mirasol.config.checks import merge_mappings
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import ModelRecipe, Recipe
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.plan import plan_run
from mirasol.data.splits import read_data
from mirasol.errors import UserError
from mirasol.files import hold_folder, write_file_atomically
from mirasol.json_values import read_own_object

_SPECIAL_TOKENS = 3
_COUNTED = "counted_from"  # in a row of plan.json, next to its cost: a hash of what was counted
_TOKENIZED = 10_000  # texts, those with the most characters: one of them has the most tokens, or nearly


@dataclass(frozen=True)
class RunCost:
    """What one run takes: FLOPs and seconds of its training, bytes on disk; `parameters` of its model."""

    steps: int
    parameters: int
    flops: int
    seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class SuitePlan:
    """The costs of a suite.

    left: names of the runs that are not finished; runs: costs by name, the pretrainings first
    cache_bytes: of the decoded clips that the runs share; notes: what was assumed
    """

    runs: dict[str, RunCost]
    left: tuple[str, ...]
    cache_bytes: int
    gigaflops: float
    notes: tuple[str, ...]

    def sum_left(self, name: str) -> float:
        """The sum of a cost over the runs that are left."""
        return sum(getattr(self.runs[run], name) for run in self.left)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "left": list(self.left), "notes": list(self.notes)}


def plan_suite(runs: SuiteRuns, chosen: Sequence[Run], given: Assumptions) -> SuitePlan:
    """The costs of the chosen runs and of the pretrainings that they need; recipes that are alike are counted once.

    Raises UserError as `plan_run`, and for a folder with another run.
    """
    wanted = runs.list_with_needed(chosen)
    costs: dict[str, RunCost] = {}
    counted: dict[str, tuple[RunCost, int]] = {}
    caches: dict[str, int] = {}
    notes: list[str] = []
    for run in wanted:
        key = _name_row(run)
        if key not in counted:
            plan = plan_run(*_stand_in(runs, run, given))
            flops = sum(stage.step_flops * stage.steps for stage in plan.stages.values())
            steps = sum(stage.steps for stage in plan.stages.values())
            counted[key] = RunCost(steps, plan.parameters, flops, plan.seconds, plan.disk_bytes), plan.clip_bytes
            given = dataclasses.replace(given, peak_tflops=plan.peak_tflops)  # measured once
            notes += [f"{key}: {note}" for note in plan.notes if not note.startswith("text rows are")]
            caches |= _count_cache(run, plan.clip_bytes)
        costs[run.name] = counted[key][0]
    notes += _list_alike(chosen)
    left = tuple(run.name for run in runs.list_left(chosen))
    assert given.peak_tflops is not None
    return SuitePlan(
        costs, left, sum(caches.values()), 1e3 * given.mfu * given.peak_tflops, tuple(dict.fromkeys(notes))
    )


def read_costs(runs: SuiteRuns, chosen: Sequence[Run]) -> dict[str, RunCost] | None:
    """What `plan_suite` counted for the same runs before, which takes minutes for some models; None where it has not,
    or where recipe, data or code changed since. Raises UserError where plan.json is damaged."""
    rows, costs = _read_rows(runs), {}
    for run in runs.list_with_needed(chosen):
        row = dict(rows.get(_name_row(run), {}))
        if row.pop(_COUNTED, None) != _hash_counted(runs, run):
            return None
        costs[run.name] = RunCost(**row)
    return costs


def write_suite(runs: SuiteRuns, costs: Mapping[str, RunCost]) -> None:
    """suite.json and plan.json: all that the result needs besides the runs. Rows of earlier plans stay."""
    new = {
        _name_row(run): {**dataclasses.asdict(costs[run.name]), _COUNTED: _hash_counted(runs, run)}
        for run in runs.list_with_needed(runs.list_rows())
        if run.name in costs
    }
    with hold_folder(runs.output):  # tasks of one suite that begin together write one after another
        rows = {**_read_rows(runs), **new}
        write_file_atomically(runs.output / SUITE, json.dumps(runs.suite.to_dict(), indent=1) + "\n")
        write_file_atomically(runs.output / PLAN, json.dumps({"rows": rows}, indent=1) + "\n")


def _read_rows(runs: SuiteRuns) -> dict[str, dict[str, Any]]:
    file = runs.output / PLAN
    return read_own_object(file, "remove it", ("rows",))["rows"] if file.is_file() else {}


def _name_row(run: Run) -> str:
    return run.name.partition("/seed-")[0]


def _hash_counted(runs: SuiteRuns, run: Run) -> str:
    """SHA-256 of all that the cost of a run depends on: not its seed or questions, but the code that counts."""
    identity = leave_questions_out(run.identity)
    recipe = {key: value for key, value in identity["recipe"].items() if key != "seed"}
    code = hash_code(("cost", "ablation/plan.py"))
    return hash_identity({**identity, "recipe": recipe, "preset": runs.suite.preset, "counted by": code})


def _list_alike(chosen: Sequence[Run]) -> list[str]:
    """A note for rows that are the same run, whose numbers will be the same: perhaps an override has no effect."""
    alike: dict[str, list[str]] = {}
    for run in chosen:
        alike.setdefault(hash_identity(run.identity), []).append(_name_row(run))
    groups = dict.fromkeys(tuple(names) for names in alike.values() if len(names) > 1)
    return [f"{', '.join(names)}: the same run in every respect: their numbers will be the same" for names in groups]


def _stand_in(runs: SuiteRuns, run: Run, given: Assumptions) -> tuple[Recipe, Assumptions]:
    """A recipe that costs what the run does and needs no pretraining to exist: its model is described by the presets
    and overrides of all runs before it. And the assumptions: the length of its texts."""
    recipe, chain = run.recipe, []
    while run.needs is not None:
        run = run.needs
        chain.append(run.recipe)
    if chain:
        first = chain[-1]
        if first.model.init is not None:
            return recipe, dataclasses.replace(given, preset=runs.suite.preset)
        overrides: dict[str, Any] = {}
        for one in (*reversed(chain), recipe):
            overrides = merge_mappings(overrides, _describe_changes(one.model))
        recipe = dataclasses.replace(
            recipe, model=ModelRecipe(first.model.preset, overrides=overrides), tokenizer=first.tokenizer
        )
    elif recipe.model.init is not None and not _exists(recipe.model.init):
        given = dataclasses.replace(given, preset=given.preset or runs.suite.preset)
    length = given.text_length or _find_text_length(recipe)
    return recipe, dataclasses.replace(given, text_length=length)


def _describe_changes(model: ModelRecipe) -> dict[str, Any]:
    changes: Mapping[str, Any] = model.overrides
    if model.image_size is not None:
        changes = merge_mappings(changes, {"video": {"image_size": model.image_size}})
    if model.num_chunks is not None:
        changes = merge_mappings(changes, {"chunking": {"num_chunks": model.num_chunks}})
    return dict(changes)


def _exists(checkpoint: str) -> bool:
    try:
        find_checkpoint(checkpoint)
    except UserError:
        return False
    return True


def _find_text_length(recipe: Recipe) -> int | None:
    """Tokens of the longest row of text in the training data, which rows are padded to in nearly every batch; None
    where the data or the tokenizer do not exist yet."""
    name = recipe.tokenizer.init or recipe.model.init
    if name is None or not _exists(name):
        return None
    try:
        examples = [one for own in read_data(recipe.data, "train")[0].values() for one in own]
    except (UserError, OSError):
        return None
    tokenizer = load_processor(name).tokenizer
    texts = [f"{one.prompt}\n{one.target}" for one in examples]
    some = sorted(set(texts), key=lambda text: (len(text), text))[-_TOKENIZED:]
    longest = max(map(len, tokenizer(some, add_special_tokens=False)["input_ids"]))
    most = recipe.data.max_text_length or MirasolConfig.preset(recipe.model.preset).text.max_length
    return min(longest + _SPECIAL_TOKENS, most)


def _count_cache(run: Run, clip_bytes: int) -> dict[str, int]:
    """Bytes of the decoded clips of a run, by what the cache tells apart: data, chunks and frames."""
    recipe = run.recipe
    if recipe.data.decode != "before":
        return {}
    try:
        windows = {
            (one.media, one.start, one.end) for own in read_data(recipe.data, "train")[0].values() for one in own
        }
    except (UserError, OSError):
        return {}
    media = {part: recipe.model.overrides.get(part) for part in ("chunking", "video", "audio")}
    spans = sorted(stage.span for stage in recipe.stages.values())
    key = str((sorted((d.root, d.train_split) for d in recipe.data.data_sets.values()), media, spans))
    wanted = {"clip": [True], "segment": [False], "any": [True, False]}
    whole = {kind for span in spans for kind in wanted[span]}
    return {key: clip_bytes * sum((start is None) in whole for _, start, _ in windows)}
