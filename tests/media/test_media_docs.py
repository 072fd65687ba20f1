"""docs/media.md says what is true: its tests exist, its example runs."""

import re
from pathlib import Path

from media_making import Audio, Video, ramp, steady, tone, write_media

HERE = Path(__file__).resolve().parent
DOCUMENT = (HERE.parent.parent / "docs" / "media.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists():
    defined = {name for file in HERE.glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    files = {file.stem for file in HERE.glob("test_*.py")}
    named = set(re.findall(r"\btest_\w+", DOCUMENT))
    assert len(named) > 40
    assert not named - defined - files


def test_its_example_runs(tmp_path, monkeypatch):
    write_media(tmp_path / "clip.mp4", Video(ramp(200), steady(200, 25)), Audio([(0, tone(8))]))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert names["batch"]["video"].shape == (1, 8, 4, 3, 32, 32)
    assert names["clip"].timeline.start == 2.0
