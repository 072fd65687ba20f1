"""Sample files of media that were once read wrongly; they are not part of the repository."""

from pathlib import Path

import pytest


@pytest.fixture
def faults(request) -> Path:
    """The folder faults/ of the real data."""
    folder = request.getfixturevalue("real_data") / "faults"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: it would show that files of public bug reports are read right")
    return folder
