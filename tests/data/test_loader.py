"""The loader: a step's number to its batch and tensors."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data import workers as worker_status
from mirasol.data.clip_cache import ClipCache
from mirasol.data.loader import BatchTexts, ClipAugment, RowsOfRank, StepBatches, make_loader
from mirasol.data.sampler import BatchPlan
from mirasol.data.workers import WorkerFailed, WorkerStatus
from mirasol.errors import UserError
from mirasol.evaluation.controls import apply_control
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.processor import MirasolProcessor
from mirasol.processes import make_process_context
from mirasol.training.trainer import train

SETTINGS = MirasolConfig.preset("tiny").media_settings()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}


@pytest.fixture
def medium(examples) -> str:
    return examples[0].media


@pytest.fixture
def cache(tmp_path, data_root, medium) -> ClipCache:
    return ClipCache(tmp_path / "cache", data_root, SETTINGS, whole=[medium])


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_dropping_a_modality_never_leaves_a_clip_with_none(values, examples, cache):
    values["stages"] = {"all": {"steps": 2, "clips_per_step": 5, "drop_video": 1.0}}
    batches = StepBatches(BatchPlan(recipe_from_dict(values), examples), cache, MirasolFeatureExtractor(**SETTINGS))
    silent, load = examples[0].media, cache.load

    def without_sound(media, start=None, end=None):
        tensors = load(media, start, end)
        return {**tensors, "audio_mask": tensors["audio_mask"] & (media != silent)}

    cache.load = without_sound
    batch, media = batches[0]
    assert batch.dropped == ("video",) * 5
    assert [clip.media for clip in batch.clips].count(silent) == 1
    for clip, video, audio in zip(batch.clips, media["video_mask"], media["audio_mask"], strict=True):
        assert video.any() == (clip.media == silent)
        assert video.any() or audio.any()


def make_shifting(values, examples, cache, **stage) -> StepBatches:
    values = {**values, "stages": {"all": {"steps": 3, "clips_per_step": 5, "span": "any", **stage}}}
    return StepBatches(BatchPlan(recipe_from_dict(values), examples), cache, MirasolFeatureExtractor(**SETTINGS))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_audio_is_shifted_in_training_as_the_control_of_evaluation_shifts_it(values, examples, cache, share):
    """Clips of several lengths in one batch, padded, some of them without sound or in an odd number of chunks."""
    plain, shifting = (make_shifting(values, examples, cache, shift_audio=one) for one in (0.0, share))
    seen, lengths = [], set()
    for step in range(3):
        (batch, media), (before, unshifted) = shifting[step], plain[step]
        assert batch.clips == before.clips and batch.examples == before.examples and before.shifted == ()
        for row, clip in enumerate(batch.clips):
            own = cache.load(clip.media, clip.start, clip.end)
            chunks = len(own["audio_mask"])
            expected = apply_control("shifted_audio" if batch.shifted[row] else None, own)
            assert torch.equal(media["audio"][row, :chunks], expected["audio"].float())
            assert torch.equal(media["audio_mask"][row, :chunks], expected["audio_mask"])
            assert not media["audio"][row, chunks:].any() and not media["audio_mask"][row, chunks:].any()
            lengths.add(chunks)
        assert torch.equal(media["video"], unshifted["video"])
        assert torch.equal(media["video_mask"], unshifted["video_mask"])
        seen += batch.shifted
    assert len(lengths) > 1 and sum(seen) == (15 if share == 1 else sum(seen)) and (share == 1 or 0 < sum(seen) < 15)


def test_which_clips_are_shifted_follows_from_their_place_alone(values, examples, cache):
    """Whichever process loads which rows, in whatever order, with sound dropped now and then, changed and mixed."""
    settings = {"shift_audio": 0.5, "drop_audio": 0.3, "augment": {"time_shift": 2}}
    whole = make_shifting(values, examples, cache, **settings)
    again = make_shifting(values, examples, cache, **settings)
    again.rows = lambda step: [3, 1]
    for step in (2, 0):
        (batch, media), (part, own) = whole[step], again[step]
        assert part.shifted == (batch.shifted[3], batch.shifted[1])
        for name in ("audio", "audio_mask"):
            chunks = own[name].shape[1]
            assert torch.equal(own[name], media[name][[3, 1], :chunks])
    one = make_shifting(values, examples, cache, shift_audio=1.0, augment={"mixup": 0.5})
    assert same(one[1][1], one[1][1]) and not same(one[1][1], make_shifting(values, examples, cache)[1][1])


def test_a_loading_process_does_without_models_and_compilers(tmp_path, values, examples, cache, untrained):
    """They take longer to import than all else that it needs, and as much memory in each."""
    recipe, extractor = recipe_from_dict(values), MirasolFeatureExtractor(**SETTINGS)
    batches = StepBatches(
        BatchPlan(recipe, examples), cache, extractor, RowsOfRank(recipe, 0, 1), ClipAugment(recipe, 32),
        texts=BatchTexts(MirasolProcessor.from_pretrained(untrained).text_rows),
    )  # fmt: skip
    (tmp_path / "batches").write_bytes(pickle.dumps(batches))
    code = (
        "import pickle, sys\nbatch, media = pickle.load(open(sys.argv[1], 'rb'))[0]\nassert 'labels' in media\n"
        "heavy = {'transformers.modeling_utils', 'torch._dynamo', 'sympy', 'mirasol.model'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "batches")], check=True, env=ENVIRONMENT)


@pytest.mark.usefixtures("forked_helpers")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_steps_in_order_and_leaves_the_global_generator_alone(recipe, examples, cache, workers):
    batches = StepBatches(BatchPlan(recipe, examples), cache, MirasolFeatureExtractor(**SETTINGS))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded = list(make_loader(batches, range(2, 6), workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [batch.step for batch, _ in loaded] == [2, 3, 4, 5]
    for step, (batch, media) in zip(range(2, 6), loaded, strict=True):
        expected_batch, expected = batches[step]
        assert batch == expected_batch
        assert same(media, expected)
        assert media["video"].shape[:2] == media["chunk_mask"].shape


def test_batches_mix_clips_of_different_lengths_padded_at_the_end(recipe, examples, cache):
    batches = StepBatches(BatchPlan(recipe, examples), cache, MirasolFeatureExtractor(**SETTINGS))
    mixed = [media for _, media in (batches[step] for step in range(3, 8)) if not media["chunk_mask"].all()]
    assert mixed
    for media in mixed:
        mask = media["chunk_mask"]
        assert (mask[:, :-1] | ~mask[:, 1:]).all(), "padding lies at the end"
        assert (media["video"][~mask] == 0).all()


@pytest.mark.usefixtures("forked_helpers")
def test_batches_arrive_complete_in_memory_that_is_used_again(values, examples, data_root):
    values["stages"] = {"all": {"steps": 8, "clips_per_step": 3, "span": "clip"}}
    settings = SETTINGS | {"image_size": 256}
    plan = BatchPlan(recipe_from_dict(values), examples)
    batches = StepBatches(plan, ClipCache(None, data_root, settings), MirasolFeatureExtractor(**settings))
    for batch, media in make_loader(batches, range(8), 1, prefetch=2):
        compact = batches.compact(batch.step)[1]
        assert same(media, batches.ready(compact))


def every_second(step: int) -> list[int]:
    return [2, 0]


def marked(tensors, batch, row):
    """An augmentation that shows what it was given."""
    return {**tensors, "audio": torch.full_like(tensors["audio"], batch.step + row / 8 + batch.epochs[row] / 64)}


@pytest.mark.usefixtures("forked_helpers")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_of_the_rows_is_loaded_and_augmentation_sees_each(recipe, examples, cache, workers):
    plan = BatchPlan(recipe, examples)
    share = StepBatches(plan, cache, MirasolFeatureExtractor(**SETTINGS), rows=every_second, augment=marked)
    for batch, media in make_loader(share, range(2, 5), workers):
        whole = plan.batch(batch.step)
        assert batch.clips == tuple(whole.clips[row] for row in (2, 0))
        assert batch.prompts == [whole.prompts[row] for row in (2, 0)]
        for row, (audio, mask) in enumerate(zip(media["audio"], media["chunk_mask"], strict=True)):
            assert (audio[mask] == batch.step + row / 8 + batch.epochs[row] / 64).all()


def test_the_sample_at_hand_is_known_from_outside(recipe, examples, cache):
    plan, status = BatchPlan(recipe, examples), WorkerStatus(0)
    seen = []
    batches = StepBatches(plan, cache, MirasolFeatureExtractor(**SETTINGS), status=status)
    batches.augment = lambda tensors, batch, row: seen.append(status.current()) or tensors
    batch, _ = batches[1]
    expected = [f"step 2, {clip.media} from {clip.start:g} s to {clip.end:g} s" for clip in batch.clips]
    assert [now[os.getpid()] for now in seen] == expected
    assert status.current() == {}


def test_what_travels_is_small_and_becomes_the_same(recipe, examples, cache):
    batches = StepBatches(BatchPlan(recipe, examples), cache, MirasolFeatureExtractor(**SETTINGS))
    for step in range(8):
        batch, media = batches.compact(step)
        assert media["video"].dtype == torch.uint8
        clips = [cache.load(clip.media, clip.start, clip.end) for clip in batch.clips]
        expected = dict(batches.extractor.collate(clips))
        assert same(batches.ready(media), expected)
        assert same(batches[step][1], expected)


def test_a_limit_interrupts_whatever_waits_and_names_the_sample():
    status = WorkerStatus(0)
    status.report("step 3, a.mp4")
    reading, _ = os.pipe()
    told = r"no batch within batch_seconds=0\.1: being loaded: step 3, a\.mp4"
    with pytest.raises(WorkerFailed, match=told), status.limit_wait(0.1):
        os.read(reading, 1)
    before = signal.getsignal(signal.SIGALRM)
    with status.limit_wait(600):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "nothing rings once it is done"
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_batch_that_broke_off_with_its_worker_tells_of_the_worker():
    status = WorkerStatus(1)
    with pytest.raises(EOFError), status.limit_wait(60):  # no worker began
        raise EOFError
    worker = make_process_context().Process(target=_take_a_slot_and_die, args=(status,))
    worker.start()
    # As a connection tells it: before the process itself has ended.
    while not status.current():
        time.sleep(0.01)
    with pytest.raises(WorkerFailed, match="died, out of memory perhaps, at step 4, b.mp4"), status.limit_wait(60):
        raise ConnectionResetError
    worker.join()


def _take_a_slot_and_die(status: WorkerStatus) -> None:
    status.enter(1)
    status.report("step 4, b.mp4")
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


class Reported(Dataset):
    """Numbers; the worker says which it is at."""

    def __init__(self, status: WorkerStatus):
        self.status = status

    def __getitem__(self, index: int) -> int:
        self.status.report(f"number {index}")
        return index

    def __len__(self) -> int:
        return 2


@pytest.fixture
def worker() -> tuple[WorkerStatus, int]:
    """The status of a worker that has loaded its last number, and its process id, after `take_over`."""
    status = WorkerStatus(1)
    loader = DataLoader(
        Reported(status), batch_size=None, num_workers=1, multiprocessing_context=make_process_context()
    )
    items = iter(loader)
    status.take_over()
    while "number 1" not in status.current().values():
        time.sleep(0.01)
    yield status, next(iter(status.current()))
    status.hand_back()
    del items


def end_and_wait(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    time.sleep(60)


def test_a_workers_end_interrupts_the_wait_for_a_batch(worker):
    status, pid = worker
    with pytest.raises(WorkerFailed, match="died, out of memory perhaps, at number 1"), status.limit_wait(60):
        end_and_wait(pid)


def test_a_workers_end_interrupts_nothing_else_and_is_told_before_the_next_wait(worker):
    status, pid = worker
    os.kill(pid, signal.SIGKILL)
    while any(process.pid == pid for process in multiprocessing.active_children()):
        time.sleep(0.01)
    with pytest.raises(WorkerFailed, match="died, out of memory perhaps, at number 1"), status.limit_wait(60):
        pytest.fail("there is no need to wait")


def test_pytorch_tells_of_ends_again_when_it_is_handed_back(worker):
    status, pid = worker
    status.hand_back()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        end_and_wait(pid)


def test_a_run_that_fails_hands_back_too_once_those_it_killed_have_ended(values, console, monkeypatch):
    """PyTorch would tell whatever comes next of their end; and had it nothing in its hands, of no other's."""
    killed = []

    def fail(run, batch):
        run.status.kill_workers()
        killed.append(run.status)
        raise UserError("on purpose")

    monkeypatch.setattr("mirasol.training.trainer.training_step", fail)
    with pytest.raises(UserError, match="on purpose"):
        train(recipe_from_dict({**values, "workers": 1}), console=console)
    assert signal.getsignal(signal.SIGCHLD) is not worker_status._leave
    assert killed[0]._find_ended(), "the worker has ended"
