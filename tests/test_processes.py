"""Helper processes do not care how the program that starts them is run, nor for signals, and never outlive it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mirasol.processes import make_process_context

# Without `if __name__ == "__main__"`: run again in a helper, it would start helpers of its own.
SCRIPT = """
from concurrent.futures import ProcessPoolExecutor
from mirasol.processes import make_process_context
print("main", flush=True)
with ProcessPoolExecutor(2, mp_context=make_process_context()) as pool:
    print(sum(pool.map(abs, [-1, -2, -3])), flush=True)
"""


@pytest.mark.parametrize("way", ["file", "stdin", "-c"])
def test_the_main_module_is_not_run_again_in_a_helper(way, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = {"file": [str(tmp_path / "script.py")], "stdin": ["-"], "-c": ["-c", SCRIPT]}[way]
    ended = subprocess.run([sys.executable, *arguments], input=SCRIPT, capture_output=True, text=True, timeout=600)
    assert ended.stdout.split() == ["main", "6"], ended.stderr


# Two helpers that sleep, and their process ids on stdout.
SLEEPERS = """
import time
from mirasol.processes import make_process_context
context = make_process_context()
helpers = [context.Process(target=time.sleep, args=(900,)) for _ in range(2)]
for helper in helpers:
    helper.start()
print(*(helper.pid for helper in helpers), flush=True)
for helper in helpers:
    helper.join()
"""


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(listed.strip()) and not listed.startswith("Z")


def test_helpers_leave_signals_to_their_parent_and_end_with_it():
    parent = subprocess.Popen([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, text=True)
    helpers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(helpers) == 2
    # At any moment, while they still start too.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for pid in helpers:
            os.kill(pid, number)
        time.sleep(0.3)
    assert all(map(is_running, helpers))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 300
    while any(map(is_running, helpers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, helpers))


def test_a_helper_can_be_ended():
    helper = make_process_context().Process(target=time.sleep, args=(900,), daemon=True)
    helper.start()
    helper.terminate()
    helper.join(timeout=300)
    assert helper.exitcode == -signal.SIGKILL


# Its helper holds on to the interpreter's lock, so that nothing within it can end it.
STUCK = """
import os, sys
from mirasol.processes import make_process_context
helper = make_process_context().Process(target=sum, args=(range(10**15),), daemon=True)
helper.start()
print(helper.pid, flush=True)
"""


def test_a_helper_that_hangs_does_not_keep_the_program_from_ending():
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert not is_running(int(ended.stdout))
