"""Makes transformers' Auto classes find Mirasol once `mirasol` is imported, without importing either of them.

A finder waits for the modules that hold transformers' mappings, and gives each mapping a place for classes that asks
`mirasol.auto` to register them when somebody looks for a Mirasol model, or for a class by its name. Until then neither
PyTorch nor transformers is imported (transformers 5.17 to 5.23).
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPE = "mirasol"
_AUTO = "transformers.models.auto."
MAPPINGS = {
    f"{_AUTO}configuration_auto": ("CONFIG_MAPPING",),
    f"{_AUTO}modeling_auto": (
        "MODEL_MAPPING",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    ),
    f"{_AUTO}feature_extraction_auto": ("FEATURE_EXTRACTOR_MAPPING",),
    f"{_AUTO}processing_auto": ("PROCESSOR_MAPPING",),
}
PIPELINES = "transformers.pipelines"


class RegisteredClasses(dict):
    """The classes that were registered with a mapping of transformers; Mirasol's are imported when they are needed."""

    def _load(self) -> None:
        importlib.import_module("mirasol.auto")  # which registers them, here among other places

    def _load_for(self, key: Any) -> None:
        if key == MODEL_TYPE or getattr(key, "model_type", None) == MODEL_TYPE:
            self._load()

    def __contains__(self, key: Any) -> bool:
        self._load_for(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self._load_for(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self._load()
        return super().__iter__()

    def keys(self) -> Any:
        self._load()
        return super().keys()

    def values(self) -> Any:
        self._load()
        return super().values()

    def items(self) -> Any:
        self._load()
        return super().items()


def prepare_mappings(module: ModuleType) -> None:
    """Gives each mapping in a module of transformers its `RegisteredClasses`."""
    for name in MAPPINGS[module.__name__]:
        mapping = getattr(module, name, None)
        registered = getattr(mapping, "_extra_content", None)
        if type(registered) is dict:
            mapping._extra_content = RegisteredClasses(registered)


def _after_import(module: ModuleType) -> None:
    if module.__name__ == PIPELINES:
        importlib.import_module("mirasol.pipeline")  # which registers itself
    else:
        prepare_mappings(module)


class TransformersFinder(MetaPathFinder):
    """Finds the modules of transformers with mappings where they are, and prepares those when they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MAPPINGS and fullname != PIPELINES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_prepare(module: ModuleType) -> None:
            execute(module)
            _after_import(module)

        spec.loader.exec_module = execute_and_prepare
        return spec


def install() -> None:
    """Prepares the modules that are imported already, and waits for the others. Does nothing the second time."""
    if any(isinstance(finder, TransformersFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, TransformersFinder())
    for name in (*MAPPINGS, PIPELINES):
        if name in sys.modules:
            _after_import(sys.modules[name])
