"""The runs of a suite: folders, recipes and identities, in an order in which they can be made."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mirasol.ablation.identity import describe_identity, find_change, hash_identity, leave_questions_out
from mirasol.ablation.suite import CANDIDATES, OPEN, Suite
from mirasol.config.checks import suggest_nearest_name
from mirasol.config.recipe import DataSetRecipe, Recipe
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.datasets.registry import read_dataset
from mirasol.errors import UserError
from mirasol.json_values import read_own_object

IDENTITY, DONE, ANSWERS, TRAINED, LOG = "identity.json", "done.json", "answers.json", "trained.json", "log.txt"
STREAM = "stream.json"


@dataclass(frozen=True)
class Run:
    """One training, and for a row the evaluation after it; everything of it is in `folder`.

    name: pretraining/NAME, or ROW/seed-N; identity: what its result depends on
    needs: the pretraining that has to be finished before, None where it needs none
    asked: how it is evaluated, None for a pretraining
    twins: the folder in which finished rows of all suites that share pretrainings are named by their identity
    """

    name: str
    folder: Path
    recipe: Recipe
    identity: dict[str, Any]
    needs: "Run | None" = None
    asked: dict[str, Any] | None = None
    twins: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """The folder of the finished model."""
        return self.folder / "train" / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do. Raises UserError where another run is in the folder."""
        self.check_same()
        return (self.folder / DONE).is_file()

    def check_same(self) -> None:
        """Raises UserError where the folder has a run of another recipe, of other data or code, or of unknown ones."""
        file = self.folder / IDENTITY
        if not file.is_file():
            if (self.folder / DONE).is_file():
                raise UserError(
                    f"{self.folder}: finished, but without {IDENTITY}, so that nothing says of which recipe: remove it"
                )
            return
        before = read_own_object(file, "remove this run's folder")
        if (change := find_change(before, self.identity)) is not None:
            reuse = ""
            if self.twins is not None and leave_questions_out(before) == leave_questions_out(self.identity):
                reuse = f" with --shared {self.twins.parent}, which reuses its weights"
            raise UserError(
                f"{self.folder}: this run was begun with another {change}: restore that, or give another --output"
                f"{reuse}"
            )

    def to_json(self) -> str:
        """The run as text, for another process or machine."""
        needs = None if self.needs is None else self.needs.to_json()
        twins = None if self.twins is None else str(self.twins)
        return json.dumps({
            "name": self.name, "folder": str(self.folder), "recipe": self.recipe.to_dict(), "identity": self.identity,
            "needs": needs, "asked": self.asked, "twins": twins,
        })  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """The run that `to_json` described."""
        values = json.loads(text)
        needs = None if values["needs"] is None else cls.from_json(values["needs"])
        twins = None if values["twins"] is None else Path(values["twins"])
        recipe = recipe_from_dict(values["recipe"])
        return cls(values["name"], Path(values["folder"]), recipe, values["identity"], needs, values["asked"], twins)


class SuiteRuns:
    """All runs of a suite below `output`.

    shared: folder of the pretrainings and of the cache of decoded clips, which several suites may share; rows that two
        of them have in common are trained once
    """

    def __init__(self, suite: Suite, output: Path, shared: Path | None = None):
        self.suite, self.output = suite, Path(output)
        self.shared = self.output / "shared" if shared is None else Path(shared)
        self._pretrainings: dict[str, Run] = {}
        self._rows: dict[str, tuple[Recipe, dict[str, Any]]] = {}

    def list_rows(self, rows: Collection[str] | None = None, seeds: Sequence[int] | None = None) -> list[Run]:
        """The runs of the rows, seed by seed, so that whole tables come early. Raises UserError for an unknown row."""
        for name in rows or ():
            if name not in self.suite.rows:
                raise UserError(f"--rows: {name!r} is not a row{suggest_nearest_name(name, list(self.suite.rows))}")
        chosen = [name for name in self.suite.rows if rows is None or name in rows]
        return [self.make_row(name, seed) for seed in seeds or self.suite.seeds for name in chosen]

    def list_needed(self, runs: Sequence[Run]) -> list[Run]:
        """The pretrainings that the runs need, each once, those first that others need."""
        found: dict[str, Run] = {}
        for run in runs:
            chain = []
            while run.needs is not None:
                run = run.needs
                chain.append(run)
            found |= {one.name: one for one in reversed(chain)}
        return list(found.values())

    def list_with_needed(self, chosen: Sequence[Run]) -> list[Run]:
        """The runs, after the pretrainings that they need."""
        return [*self.list_needed(chosen), *chosen]

    def list_left(self, chosen: Sequence[Run]) -> list[Run]:
        """What there is to make, pretrainings first: the chosen runs that are not finished, and what those need."""
        rows = [run for run in chosen if not run.finished]
        return [run for run in self.list_with_needed(rows) if not run.finished]

    def make_pretraining(self, name: str) -> Run:
        """The run of a pretraining. Its folder is named after its identity, so that suites can share it."""
        if name not in self._pretrainings:
            recipe, after = self.suite.build_pretraining(name), self.suite.pretraining[name].after
            needs = None if after is None else self.make_pretraining(after)
            recipe = self._place(recipe, needs)
            identity = describe_identity(recipe, needs and hash_identity(needs.identity), None, None)
            folder = self.shared / "pretraining" / f"{name}-{hash_identity(identity)[:10]}"
            recipe = dataclasses.replace(recipe, output=str(folder / "train"))
            self._pretrainings[name] = Run(f"pretraining/{name}", folder, recipe, identity, needs)
        return self._pretrainings[name]

    def make_row(self, name: str, seed: int) -> Run:
        """The run of a row with a seed: of all runs of that seed the data order is the same."""
        row = self.suite.rows[name]
        needs = None if row.pretraining is None else self.make_pretraining(row.pretraining)
        if name not in self._rows:
            recipe = self._place(self.suite.build_recipe(name), needs)
            tested = self._find_tested(recipe)
            if not self._rows:
                self._check_questions(*tested)
            asked = self.suite.describe_asking(name)
            identity = describe_identity(recipe, needs and hash_identity(needs.identity), asked, tested)
            self._rows[name] = recipe, identity
        recipe, identity = self._rows[name]
        folder = self.output / "runs" / name / f"seed-{seed}"
        recipe = dataclasses.replace(recipe, seed=seed, output=str(folder / "train"))
        identity = {**identity, "recipe": {**identity["recipe"], "seed": seed}}
        asked = self.suite.describe_asking(name)
        return Run(f"{name}/seed-{seed}", folder, recipe, identity, needs, asked, self.shared / "rows")

    def _place(self, recipe: Recipe, needs: Run | None) -> Recipe:
        """The recipe with the start and the cache that its place among the runs decides."""
        model, data = recipe.model, recipe.data
        if needs is not None:
            model = dataclasses.replace(model, init=str(needs.checkpoint))
        if data.cache is None and data.decode == "before":
            data = dataclasses.replace(data, cache=str(self.shared / "cache"))
        return dataclasses.replace(recipe, model=model, data=data)

    def _find_tested(self, recipe: Recipe) -> tuple[DataSetRecipe, str]:
        if recipe.data.mixture:
            raise UserError(f"{self.suite.name}: data.mixture: a suite asks the questions of a single data set")
        return recipe.data.data_sets[""], self.suite.metric.split

    def _check_questions(self, data: DataSetRecipe, split: str) -> None:
        """Raises UserError where the data have no questions as the metric wants them, before anything is trained."""
        metric = self.suite.metric
        if metric.question_types is None and metric.protocol == OPEN:
            return
        examples = read_dataset(data.dataset, Path(data.root), split, data.options, open_media=False).examples
        types = sorted({one.question_type for one in examples if one.question_type is not None})
        for name in metric.question_types or ():
            if name not in types:
                raise UserError(
                    f"metric.question_types: {data.root} has no {name!r}{suggest_nearest_name(name, types)}"
                )
        if metric.protocol == CANDIDATES and not any(one.candidates for one in examples):
            raise UserError(f"metric.protocol={CANDIDATES}: the questions of {data.root} have none: use {OPEN}")

    @cached_property
    def names(self) -> list[str]:
        """Names of all runs of rows."""
        return [run.name for run in self.list_rows()]


def choose_task(runs: Sequence[Run], task: str | None) -> list[Run]:
    """The runs of task I of N (`I/N`, I from 0), every run in exactly one task; all without a task.

    Raises UserError for anything else.
    """
    if task is None:
        return list(runs)
    index, slash, count = task.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--task {task}: give I/N with I from 0 to N - 1, e.g. --task $SLURM_ARRAY_TASK_ID/8")
    return list(runs[int(index) :: int(count)])
