"""Fixtures of suites that train in seconds."""

from pathlib import Path
from typing import Any

import pytest
from made_once import make_once
from suite_making import make_all, make_suite_values, write_suite_files

from mirasol.ablation.runs import SuiteRuns
from mirasol.ablation.suite import read_suite


@pytest.fixture
def suite_values(data_root, shared_cache) -> dict[str, Any]:
    """The suite as plain data, for tests to change."""
    return make_suite_values(data_root, shared_cache)


@pytest.fixture
def suite_file(suite_values, data_root, shared_cache, tmp_path) -> Path:
    return write_suite_files(tmp_path / "suite", suite_values, data_root, shared_cache)


@pytest.fixture(scope="session")
def finished_suite(data_root, shared_cache, tmp_path_factory) -> Path:
    """The folder of a finished suite, next to the suite's files, for tests to read."""

    def make(folder: Path) -> None:
        values = make_suite_values(data_root, shared_cache)
        file = write_suite_files(folder / "suite", values, data_root, shared_cache)
        make_all(SuiteRuns(read_suite(file), folder / "output"))

    return make_once(tmp_path_factory, "finished-suite", make) / "output"
