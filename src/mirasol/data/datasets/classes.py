"""What the data sets of classes share: their class lists."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import read_names
from mirasol.errors import UserError


@dataclass(frozen=True)
class ClassList:
    """The class names in the order of their index."""

    names: tuple[str, ...]

    @cached_property
    def _known(self) -> dict[str, str]:
        # Some lists write blanks as underscores.
        return {**{name.replace(" ", "_"): name for name in self.names}, **{name: name for name in self.names}}

    def find(self, label: str) -> str | None:
        """The class that a label names, None where it names none."""
        return self._known.get(label) or self._known.get(label.strip())


def find_class_list(files: Files, options: DatasetOptions, *names: str) -> tuple[str, ...] | None:
    """The class list that the user names, or the annotation file with one of `names`; None without one."""
    if options.class_list is not None:
        path = Path(options.class_list)
        path = path if path.is_file() else files.root / path
        if not path.is_file():
            raise UserError(
                f"class_list={options.class_list}: no such file: give a text file with one class name per line"
            )
        return read_names(path, str(options.class_list))
    found = files.annotation(*names) if names else None
    return read_names(found, files.shown(found)) if found is not None else None
