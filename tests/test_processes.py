"""Helper processes do not care how the program that starts them is run."""

import subprocess
import sys

import pytest

# Without `if __name__ == "__main__"`: run again in a helper, it would start helpers of its own.
SCRIPT = """
from concurrent.futures import ProcessPoolExecutor
from mirasol.processes import process_context
print("main", flush=True)
with ProcessPoolExecutor(2, mp_context=process_context()) as pool:
    print(sum(pool.map(abs, [-1, -2, -3])), flush=True)
"""


@pytest.mark.parametrize("way", ["file", "stdin", "-c"])
def test_the_main_module_is_not_run_again_in_a_helper(way, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = {"file": [str(tmp_path / "script.py")], "stdin": ["-"], "-c": ["-c", SCRIPT]}[way]
    ended = subprocess.run([sys.executable, *arguments], input=SCRIPT, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["main", "6"], ended.stderr
