"""Fixtures of all tests. Real clips are not part of the repository: MIRASOL_REAL_DATA says where they lie."""

import os
from pathlib import Path

import pytest
from untrained import shapes, untrained

__all__ = ["shapes", "untrained"]

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data (clips/ with manifest.json); tests that ask for it skip where it is absent."""
    folder = Path(os.environ.get("MIRASOL_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "clips" / "manifest.json").is_file():
        pytest.skip(f"no real clips in {folder}: set MIRASOL_REAL_DATA to the folder that holds clips/manifest.json")
    return folder
