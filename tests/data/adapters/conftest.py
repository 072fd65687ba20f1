"""Data sets of a few rows, written in the formats of the real ones; files whose content does not matter are empty."""

from pathlib import Path

import pytest


class Folder:
    """A data set's root that tests put files into."""

    def __init__(self, root: Path):
        self.root = root

    def put(self, name: str, content: str | bytes = b"") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@pytest.fixture
def data(tmp_path) -> Folder:
    root = tmp_path / "data"
    root.mkdir()
    return Folder(root)
