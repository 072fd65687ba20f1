"""Fixtures of all tests. Real clips are not part of the repository: MIRASOL_REAL_DATA says where they lie."""

import copy
import io
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made_once import make_once
from rich.console import Console
from untrained import image_shapes, shapes, untrained

if TYPE_CHECKING:  # this file is read before jaxtyping's import hook is there, so fixtures import mirasol themselves
    from mirasol.config.recipe import Recipe
    from mirasol.data.example import Example

__all__ = ["image_shapes", "shapes", "untrained"]

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; torch, which reads it, is not imported before
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell leaves it to what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
STACK = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32, "dropout": 0.1}
SMALL_MODEL = {
    "vit": STACK,
    "audio": {"adapter": STACK},
    "combiner": {"stack": STACK},
    "latent": {"stack": STACK},
    "reconstruction": {"stack": STACK},
    "text": {"stack": STACK},
}


@pytest.fixture
def real_data(request) -> Path:
    """The folder of real data (clips/ with manifest.json); tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MIRASOL_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "clips" / "manifest.json").is_file():
        unshown = request.node.originalname.removeprefix("test_").replace("_", " ")
        pytest.skip(f"MIRASOL_REAL_DATA names no folder with clips/manifest.json; not shown: {unshown}")
    return folder


@pytest.fixture(scope="session")
def data_root(shapes) -> Path:
    return shapes


@pytest.fixture(scope="session")
def examples(data_root) -> list["Example"]:
    from mirasol.data.datasets.folder import read_examples

    return read_examples(data_root, "train")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    return make_once(tmp_path_factory, "clip-cache", Path.mkdir)


def recipe_values(root: Path, cache: Path, output: Path) -> dict[str, Any]:
    """A recipe that trains in a second or two, as plain data."""
    return {
        "seed": 3,
        "output": str(output),
        "data": {"root": str(root), "cache": str(cache)},
        "model": {"preset": "tiny", "overrides": copy.deepcopy(SMALL_MODEL)},
        "tokenizer": {"vocab_size": 300},
        "stages": {
            "slots": {"steps": 3, "span": "segment", "clips_per_step": 4, "questions_per_clip": 1},
            "questions": {"steps": 5, "clips_per_step": 3, "questions_per_clip": 4},
        },
        "optimizer": {"warmup_steps": 2},
        "device": "cpu",
        "log_every": 1,
        "validate_every": 4,
        "validation_clips": 2,
        "checkpoint_every": 2,
        "samples": 0,
        "threads": 1,
    }


@pytest.fixture
def values(data_root, shared_cache, tmp_path) -> dict[str, Any]:
    """The recipe as plain data, for tests to change."""
    return recipe_values(data_root, shared_cache, tmp_path / "run")


@pytest.fixture(scope="session")
def finished_once(data_root, shared_cache, tmp_path_factory) -> Path:
    """The folder of a finished run of the recipe, for tests to read."""
    from mirasol.config.recipe_io import recipe_from_dict
    from mirasol.training.trainer import train

    def make(folder: Path) -> None:
        values = recipe_values(data_root, shared_cache, folder)
        train(recipe_from_dict(values), console=Console(file=io.StringIO()))

    return make_once(tmp_path_factory, "finished-run", make)


@pytest.fixture
def finished_run(finished_once, values) -> Path:
    """A copy of the finished run in the recipe's output folder, for tests to change."""
    return Path(shutil.copytree(finished_once, values["output"]))


@pytest.fixture
def recipe(values) -> "Recipe":
    from mirasol.config.recipe_io import recipe_from_dict

    return recipe_from_dict(values)


@pytest.fixture
def console() -> Console:
    """Swallows progress."""
    return Console(file=io.StringIO())


@pytest.fixture
def forked_helpers(monkeypatch) -> None:
    """Starts helper processes in milliseconds: forked from a server that has imported what they need. For tests of
    what helpers do; how they begin and end is tested with new interpreters, as users have them."""
    from multiprocessing import forkserver, popen_forkserver

    from mirasol.processes import HelperProcess

    forkserver.set_forkserver_preload(["torch", "mirasol.data.loader", "mirasol.data.shards.write"])
    monkeypatch.setattr(HelperProcess, "_Popen", staticmethod(popen_forkserver.Popen))
