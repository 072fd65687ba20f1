"""What goes wrong in a training of `trainings.py`, arranged in its process before it begins."""

import atexit
import ctypes
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

from mirasol.data.loader import StepLoader
from mirasol.data.workers import WorkerStatus
from mirasol.training import build, distributed, trainer
from mirasol.training import checkpoint as checkpoints
from mirasol.training.checkpoint import Checkpoints
from mirasol.training.checkpoint_io import ShardWriter
from mirasol.training.distributed import ParallelModel


def signal_after(step: int, name: str) -> None:
    """The training gets a signal in the middle of the step after `step`."""
    take_step = trainer.training_step

    def interrupted(run, batch):
        if batch.step == step:
            os.kill(os.getpid(), getattr(signal, name))
        return take_step(run, batch)

    trainer.training_step = interrupted


def signal_while_decoding(name: str) -> None:
    """The training, and all its helpers, get a signal before its first step."""
    decode = build.decode_clips

    def interrupted(*arguments):
        os.killpg(os.getpgid(0), getattr(signal, name))
        return decode(*arguments)

    build.decode_clips = interrupted


def signals_without_end(name: str) -> None:
    """The training gets a signal again and again within one step."""

    def interrupted(run, batch):
        while True:
            os.kill(os.getpid(), getattr(signal, name))

    trainer.training_step = interrupted


def when_a_worker_hangs(do: str, seconds: float = 0.5) -> None:
    """Once a worker has been at the same clip for so long, it is killed (`kill`), or the loader's time limit is over
    (`limit`); before that a worker may take any time to start."""
    begin, limit_wait = StepLoader.__iter__, WorkerStatus.limit_wait

    def watched(self):
        loaded, worker = begin(self), _hanging(self.dataset.batches.status, seconds)
        if do == "kill":
            os.kill(worker, signal.SIGKILL)
        else:
            WorkerStatus.limit_wait = lambda self, _: limit_wait(self, seconds)
        return loaded

    StepLoader.__iter__ = watched


def _hanging(status: WorkerStatus, seconds: float) -> int:
    """Waits for a process that stays at one text for so long; its id."""
    before, since = {}, time.monotonic()
    while not before or time.monotonic() - since < seconds:
        time.sleep(0.02)
        if status.current() != before:
            before, since = status.current(), time.monotonic()
    return next(iter(before))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_random(steps: int, share: float) -> None:
    """The training is killed after its first `steps` + 1 steps, that share of a step's time later: before the next one
    has ended, however late the timer rings."""
    take_step, taken = trainer.training_step, [time.monotonic()]

    def counted(run, batch):
        values = take_step(run, batch)
        taken.append(time.monotonic())
        if len(taken) == steps + 2:
            threading.Timer(share * (taken[-1] - taken[-2]), _kill).start()
        while len(taken) > steps + 2:
            time.sleep(1)
        return values

    trainer.training_step = counted


def kill_after_part(step: int, part: int) -> None:
    """The training is killed in a step (from 0) once the gradients of one of its microbatches are there."""
    take_step, backward, done = trainer.training_step, ParallelModel.backward, []

    def stepping(run, batch):
        done.append([batch.step])
        return take_step(run, batch)

    def counted(self, *arguments, **named):
        output = backward(self, *arguments, **named)
        done[-1].append(part)
        if done[-1] == [step] + [part] * (part + 1):
            _kill()
        return output

    trainer.training_step, ParallelModel.backward = stepping, counted


def loss_that_is_no_number(step: int) -> None:
    """The losses of this process are no number in one step (from 0)."""
    losses, calls = distributed.compute_stage_losses, []

    def poisoned(*arguments):
        output = losses(*arguments)
        calls.append(output)
        if len(calls) == step + 1:
            output.text_loss, output.loss = output.text_loss * math.nan, output.loss * math.nan
        return output

    distributed.compute_stage_losses = poisoned


def kill_while_saving(step: int, at: str) -> None:
    """The training is killed while it writes the checkpoint of a step: amid its data (`data`), before it says what lies
    where (`metadata`), before the folder has its name (`name`); or amid the first removal of an older one from that
    step on (`removal`): which of them removes one depends on what is there, and on which is the best."""
    write, finish, commit = ShardWriter.write_data, ShardWriter.finish, Checkpoints._commit
    remove = checkpoints.shutil.rmtree

    def writing(self, plan, planner):
        if at == "data" and _is_of(self.folder, step):
            planner = _DeadlyPlanner(planner, len(plan.items) // 2)
        return write(self, plan, planner)

    def finishing(self, *arguments, **named):
        if at == "metadata" and _is_of(self.folder, step):
            _kill()
        return finish(self, *arguments, **named)

    def committing(self, number, *arguments):
        if at == "name" and number == step:
            _kill()
        if at == "removal" and number >= step:
            checkpoints.shutil.rmtree = half_removed
        return commit(self, number, *arguments)

    def half_removed(folder, **options):
        if Path(folder).name == ".removed" and Path(folder).exists():
            next(Path(folder).glob("*.bin")).unlink()
            _kill()
        remove(folder, **options)

    ShardWriter.write_data, ShardWriter.finish, Checkpoints._commit = writing, finishing, committing


def _is_of(folder: Path, step: int) -> bool:
    return f"{step:08d}" in folder.name


class _DeadlyPlanner:
    """Kills the process at one of the tensors it is asked for."""

    def __init__(self, planner, tensors: int):
        self.planner, self.left = planner, tensors

    def resolve_data(self, item):
        self.left -= 1
        if self.left == 0:
            _kill()
        return self.planner.resolve_data(item)


NO_NAMESPACES = 77


def small_disk(folder: str, size: str, keep: str) -> None:
    """`folder` lies on a disk of its own of that size, a tmpfs that this process alone sees; in the end all that is on
    it is copied to `keep`. Ends the process with NO_NAMESPACES where the system does not let users mount."""
    new_namespaces = 0x10000000 | 0x00020000  # CLONE_NEWUSER | CLONE_NEWNS
    Path(folder).mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(new_namespaces):
        os._exit(NO_NAMESPACES)
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path("/proc/self", name).write_text(line)
    if libc.mount(b"none", folder.encode(), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(NO_NAMESPACES)
    atexit.register(shutil.copytree, folder, keep)
