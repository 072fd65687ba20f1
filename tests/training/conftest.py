"""A small data set of real mp4 files, a recipe that trains on it in a second or two, and its parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainings import Trainings

from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.datasets.folder_reader import read_examples

STACK = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32, "dropout": 0.1}
SMALL_MODEL = {
    "vit": STACK,
    "audio": {"adapter": STACK},
    "combiner": {"stack": STACK},
    "latent": {"stack": STACK},
    "reconstruction": {"stack": STACK},
    "text": {"stack": STACK},
}


@pytest.fixture(scope="session")
def data_root(shapes) -> Path:
    return shapes


@pytest.fixture(scope="session")
def examples(data_root):
    return read_examples(data_root, "train")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clip-cache")


@pytest.fixture
def values(data_root, shared_cache, tmp_path) -> dict[str, Any]:
    """The recipe as plain data, for tests to change."""
    return {
        "seed": 3,
        "output": str(tmp_path / "run"),
        "data": {"root": str(data_root), "cache": str(shared_cache)},
        "model": {"preset": "tiny", "overrides": SMALL_MODEL},
        "tokenizer": {"vocab_size": 300},
        "stages": {
            "slots": {"steps": 3, "window": "slot", "clips_per_step": 4, "questions_per_clip": 1},
            "questions": {"steps": 5, "clips_per_step": 3, "questions_per_clip": 4},
        },
        "optimizer": {"warmup_steps": 2},
        "device": "cpu",
        "log_every": 1,
        "validate_every": 4,
        "validation_clips": 2,
        "checkpoint_every": 2,
        "threads": 1,
    }


@pytest.fixture
def recipe(values) -> Recipe:
    return recipe_from_dict(values)


@pytest.fixture
def console():
    """Swallows progress."""
    import io

    from rich.console import Console

    return Console(file=io.StringIO())


@pytest.fixture(scope="session")
def trainings(tmp_path_factory) -> Iterator[Trainings]:
    """Starts trainings in processes of their own."""
    with Trainings(tmp_path_factory.mktemp("trainings")) as server:
        yield server
