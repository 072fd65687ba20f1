"""The data sets that a suite renders where they do not exist yet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirasol.ablation.suite import Rendered, Suite
from mirasol.errors import UserError
from mirasol.json_values import read_own_object
from mirasol.synthetic.synthesize import synthesize


def list_unrendered(suite: Suite) -> dict[str, Rendered]:
    """The suite's data sets that are not on disk, by name. Raises UserError for a folder with another one."""
    left = {}
    for name, one in suite.render.items():
        file = Path(one.root) / "manifest.json"
        if not file.is_file():
            left[name] = one
            continue
        manifest = read_own_object(file, "remove the folder, to render it again")
        for key, value in _describe(one).items():
            if manifest.get(key) != value:
                raise UserError(
                    f"{one.root}: was rendered with {key}={manifest.get(key)!r}, render.{name} asks for {value!r}: "
                    "give another root, or change render"
                )
    return left


def _describe(one: Rendered) -> dict[str, Any]:
    clips = {"train": one.train, "validation": one.validation, "test": one.test}
    return {"kind": one.kind, "seed": one.seed, "clips": clips}


def render_data_set(one: Rendered, workers: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Renders a data set in `workers` processes. Raises UserError as `synthesize` does."""
    synthesize(
        Path(one.root), seed=one.seed, train=one.train, validation=one.validation, test=one.test, kind=one.kind,
        workers=workers, progress=progress,
    )  # fmt: skip
