"""Files that crash, stall or flood the decoder, by decoder processes that really do."""

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import decoder_faults as faults
import numpy as np
import pytest
import torch
from media_making import Audio, Video, ramp, steady, tone, write_media

from mirasol import MirasolConfig, MirasolFeatureExtractor
from mirasol.errors import BadClip, UserError
from mirasol.media.isolation import decoders as isolation
from mirasol.media.isolation.decoders import Decoder, run_isolated, start_decoder
from mirasol.media.limits import DEFAULT_LIMITS, Limits

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of others is known on Linux only")
SOON = Limits(max_idle_seconds=0.5)


@pytest.fixture
def pool(monkeypatch):
    """The decoders of this test alone."""
    fresh = isolation._Pool()
    monkeypatch.setattr(isolation, "_pool", fresh)
    yield fresh
    fresh.close()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_ended(pid: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (faults.crash, "the decoder crashed: SIGSEGV"),
        (faults.kill, r"the decoder crashed: SIGKILL \(out of memory perhaps\)"),
        (faults.leave, "the decoder ended with exit code 3"),
        (faults.hang, r"the decoder made no progress for 0.5 s: .*max_idle_seconds"),
        (faults.fail, "the reader failed: IndexError: tuple index out of range$"),
    ],
)
def test_a_fault_is_one_bad_clip_and_the_next_file_is_read(pool, fault, reason):
    with pytest.raises(BadClip, match=f"^some.mp4: {reason}") as raised:
        run_isolated(SOON, "some.mp4", fault)
    assert "\n" not in str(raised.value)
    assert raised.value.file == "some.mp4"
    assert run_isolated(SOON, "next.mp4", faults.work, 0.0) == "done"


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@LINUX
@pytest.mark.parametrize("call", ["socket.socketpair", "os.pipe", "subprocess.Popen", "make_memory"])
def test_a_decoder_that_cannot_be_started_is_one_line(pool, monkeypatch, call):
    """What the system refuses where processes, memory or open files have run out."""

    def refuse(*given, **named):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    gc.collect()
    before = count_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(f"mirasol.media.isolation.decoders.{call}", refuse)
        for start in (start_decoder, lambda: run_isolated(SOON, "some.mp4", faults.work, 0.0)):
            with pytest.raises(UserError, match="^no process can be started to decode media .Resource temp") as raised:
                start()
            assert not isinstance(raised.value, BadClip), "no file is to blame"
            assert "\n" not in str(raised.value)
            del raised
    gc.collect()
    assert count_descriptors() == before
    assert run_isolated(SOON, "next.mp4", faults.work, 0.0) == "done"


@LINUX
def test_too_few_open_files_for_a_decoder(pool):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        free = file.fileno()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, limits[1]))
        with pytest.raises(UserError, match=r"no process can be started to decode media \(.*open files"):
            Decoder()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert run_isolated(SOON, "next.mp4", faults.work, 0.0) == "done"


@LINUX
def test_a_file_that_takes_too_much_memory_is_a_bad_clip(pool):
    small = Limits(max_memory=2**28)
    with pytest.raises(BadClip, match=r"takes more than 256 MiB of memory: .*Limits\(max_memory=\.\.\.\)"):
        run_isolated(small, "some.mp4", faults.allocate)
    assert run_isolated(small, "next.mp4", faults.allocate, 2**26) == 2**26


@LINUX
def test_memory_that_a_file_leaves_is_not_the_next_ones(pool):
    run_isolated(DEFAULT_LIMITS, "some.mp4", faults.work, 0.0)
    [decoder] = pool.idle
    pool.give_back(pool.take(), Limits(max_memory=4 * decoder.measure_private_bytes() - 4096))
    assert not pool.idle
    wait_until_ended(decoder.pid)


def test_work_that_gets_on_may_take_any_time(pool):
    assert run_isolated(SOON, "some.mp4", faults.work, 1.5) == "done"


def test_what_the_user_did_wrong_is_raised_as_it_is(pool):
    with pytest.raises(BadClip) as bad:
        run_isolated(SOON, "outer", faults.refuse, "inner", "clip")
    assert (bad.value.file, bad.value.reason) == ("inner", "reason")
    with pytest.raises(UserError, match="^a setting$"):
        run_isolated(SOON, "outer", faults.refuse, "inner", "setting")
    assert run_isolated(SOON, "a", faults.pid) == run_isolated(SOON, "b", faults.pid)


def test_one_decoder_serves_one_thread_after_another_and_several_at_a_time(pool):
    pids = {run_isolated(SOON, "a", faults.pid) for _ in range(5)}
    assert len(pids) == 1
    assert pids != {os.getpid()}
    with ThreadPoolExecutor(3) as threads:
        barrier = threading.Barrier(3)

        def together(_: int) -> int:
            barrier.wait()
            run_isolated(DEFAULT_LIMITS, "a", faults.wait, 0.3)
            return run_isolated(SOON, "a", faults.pid)

        list(threads.map(together, range(3)))
    assert len(pool.idle) == 3


def test_a_decoder_that_is_started_ahead_is_the_one_that_reads(pool):
    start_decoder()
    [ahead] = pool.idle
    start_decoder()
    assert pool.idle == [ahead]
    assert run_isolated(SOON, "a", faults.pid) == ahead.pid


def test_arrays_of_any_size_arrive_and_their_memory_is_used_again(pool):
    counts = (0, 1, 2**15, 2**16, 2**16 + 1, 2**21, 2**21 + 4097)
    for _ in range(3):
        found = run_isolated(DEFAULT_LIMITS, "a", faults.arrays, *counts)
        assert [len(array) for array in found] == list(counts)
        assert all((array == 1).all() for array in found)
        assert all(array.flags.writeable for array in found)
    del found
    for _ in range(30):
        run_isolated(DEFAULT_LIMITS, "a", faults.arrays, *counts)
    [decoder] = pool.idle
    assert len(decoder._regions) <= 2 * len(counts)


def test_an_array_in_use_is_never_written_again(pool):
    kept = [run_isolated(DEFAULT_LIMITS, "a", faults.arrays, 2**17)[0] for _ in range(5)]
    for number, array in enumerate(kept):
        array[:] = number
    views = [torch.from_numpy(array)[100:200] for array in kept]
    del kept, array
    gc.collect()
    for _ in range(10):
        run_isolated(DEFAULT_LIMITS, "a", faults.arrays, 2**17)[0][:] = 77
    assert [set(view.tolist()) for view in views] == [{number} for number in range(5)]


def test_arrays_outlive_the_decoder_they_came_from(pool):
    [array] = run_isolated(DEFAULT_LIMITS, "a", faults.arrays, 2**20)
    with pytest.raises(BadClip, match="SIGSEGV"):
        run_isolated(DEFAULT_LIMITS, "b", faults.crash)
    gc.collect()
    assert (array == 1).all()


@pytest.mark.parametrize("at_work", [False, True])
def test_a_decoder_ends_with_a_reader_that_is_killed(tmp_path, at_work):
    file = tmp_path / "pid"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(faults.__file__).parent)!r})\n"
        "import decoder_faults as faults, os, time\n"
        "from mirasol.media.isolation.decoders import _pool, run_isolated\n"
        "from mirasol.media.limits import DEFAULT_LIMITS\n"
        "pid = run_isolated(DEFAULT_LIMITS, 'a', faults.pid)\n"
        f"open({str(file)!r} + '.new', 'w').write(str(pid)); os.rename({str(file)!r} + '.new', {str(file)!r})\n"
        + ("run_isolated(DEFAULT_LIMITS, 'a', faults.hang)\n" if at_work else "time.sleep(100)\n")
    )
    reader = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not file.exists():
            assert reader.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        pid = int(file.read_text())
        assert is_running(pid)
    finally:
        reader.kill()
        reader.wait()
    wait_until_ended(pid)


def test_signals_that_stop_the_reader_leave_the_decoder_at_work(pool):
    pid = run_isolated(SOON, "a", faults.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    assert run_isolated(SOON, "a", faults.pid) == pid


def test_a_reader_that_is_interrupted_starts_over_with_another_decoder(pool):
    before = run_isolated(SOON, "a", faults.pid)
    # Processes that a shell starts in the background ignore SIGINT.
    theirs = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            run_isolated(DEFAULT_LIMITS, "a", faults.wait, 60.0)
    finally:
        signal.signal(signal.SIGINT, theirs)
    wait_until_ended(before)
    assert run_isolated(SOON, "a", faults.pid) != before


def test_a_forked_process_has_decoders_of_its_own(pool):
    pid = run_isolated(SOON, "a", faults.pid)
    child = os.fork()
    if not child:
        theirs = run_isolated(DEFAULT_LIMITS, "a", faults.pid)
        os._exit(0 if theirs != pid else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert run_isolated(SOON, "a", faults.pid) == pid


def test_a_decoder_that_cannot_start_is_no_fault_of_the_file(pool, monkeypatch):
    monkeypatch.setattr(isolation, "format_decoder_program", lambda descriptors: "raise SystemExit(7)")
    with pytest.raises(UserError, match=r"no process can be started to decode media \(exit code 7: its errors"):
        run_isolated(SOON, "a", faults.pid)


def test_a_decoder_imports_neither_torch_nor_the_models(pool):
    loaded = run_isolated(SOON, "a", faults.loaded_modules)
    assert "av" in loaded
    assert not {"torch", "transformers"} & set(loaded)


def test_decoders_leave_no_descriptors_behind(pool):
    def cycle() -> None:
        run_isolated(DEFAULT_LIMITS, "a", faults.arrays, 2**17, 2**18)
        with pytest.raises(BadClip):
            run_isolated(DEFAULT_LIMITS, "b", faults.leave)

    cycle()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        cycle()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    video = Video(ramp(50), steady(50, 25))
    return write_media(tmp_path_factory.mktemp("clip") / "a.mp4", video, Audio([(0.0, tone(2.0))]))


def test_a_clip_is_the_same_as_read_in_this_process(pool, clip):
    from mirasol.media.clip import Clip
    from mirasol.media.reader import read_clip, read_window
    from mirasol.media.timeline import ChunkGrid

    grid = ChunkGrid(4, 0.5)
    here = read_clip(clip, grid, image_size=96)
    there = Clip.from_decoded(run_isolated(DEFAULT_LIMITS, clip, read_window, clip, grid, image_size=96))
    for name in ("frames", "frame_times", "waveform", "audio_present", "video_present"):
        assert torch.equal(getattr(here, name), getattr(there, name)), name
    assert (here.notes, here.timeline, here.video_counts) == (there.notes, there.timeline, there.video_counts)
    assert isinstance(there.frames.numpy(), np.ndarray)


def test_decoders_are_for_one_process_only():
    decoder = Decoder()
    assert decoder.alive
    decoder.kill()
    wait_until_ended(decoder.pid)


def test_relative_paths_start_where_the_reader_is_now(shapes, tmp_path, monkeypatch):
    clip = next(shapes.glob("clips/test/*.mp4"))
    start_decoder()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(clip, tmp_path / "elsewhere" / "clip.mp4")
    extractor = MirasolFeatureExtractor.for_config(MirasolConfig.preset("tiny"))
    monkeypatch.chdir(clip.parent)
    before = extractor.read(clip.name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    after = extractor.read("clip.mp4")
    assert (before.frames == after.frames).all() and len(after.frames)
