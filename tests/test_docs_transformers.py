"""docs/transformers.md is executed, and `import mirasol` does what it says."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mirasol.checkpoint import find_checkpoint

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_examples_run(shapes, tmp_path, monkeypatch):
    clip = sorted((shapes / "clips" / "test").iterdir())[0]
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        for example in EXAMPLES:
            exec(compile(example, "transformers.md", "exec"), names)
    answers = said.getvalue().split("\n")
    assert len(EXAMPLES) == 2 and answers[0] and answers[0] == answers[1].strip()


LOADS = "for auto in (AutoConfig, AutoFeatureExtractor, AutoProcessor): print(type(auto.from_pretrained(F)).__name__)"
NAMES = ["MirasolConfig", "MirasolFeatureExtractor", "MirasolProcessor"]
AUTO = "from transformers import AutoConfig, AutoFeatureExtractor, AutoProcessor\n"
LIGHT = "import mirasol, sys\nprint({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
OTHERS = "import sys\nAutoConfig.for_model('bert')\nprint('mirasol.auto' in sys.modules)\n"
PROGRAMS = {
    "light": (LIGHT, ["set()"]),
    "before": (f"import mirasol\n{AUTO}{OTHERS}{LOADS}", ["False", *NAMES]),
    "after": (f"{AUTO}import mirasol\n{LOADS}", NAMES),
}


@pytest.mark.parametrize(("program", "expected"), PROGRAMS.values(), ids=PROGRAMS)
def test_importing_mirasol_registers_it_without_importing_anything(program, expected):
    code = f"F = {str(find_checkpoint('tiny'))!r}\n{program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected
