"""Trainings in processes of their own."""

from collections.abc import Iterator

import pytest
from trainings import Trainings


@pytest.fixture(scope="session")
def trainings(tmp_path_factory) -> Iterator[Trainings]:
    """Starts trainings in processes of their own."""
    with Trainings(tmp_path_factory.mktemp("trainings")) as server:
        yield server
