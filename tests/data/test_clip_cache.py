"""The cache of decoded clips."""

import errno
import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch

from mirasol.config.model import MirasolConfig
from mirasol.data.clip_cache import ClipCache, UnreadableWindow
from mirasol.data.workers import WorkerFailed
from mirasol.errors import BadClip
from mirasol.media.feature_extractor import MirasolFeatureExtractor

SETTINGS = MirasolConfig.preset("tiny").media_settings()


@pytest.fixture
def medium(examples) -> str:
    return examples[0].media


@pytest.fixture
def cache(tmp_path, data_root, medium) -> ClipCache:
    return ClipCache(tmp_path / "cache", data_root, SETTINGS, whole=[medium])


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_comes_out_is_what_the_extractor_gives(cache, data_root, medium):
    extractor = MirasolFeatureExtractor(**SETTINGS)
    expected = extractor.tensors(extractor.read(data_root / medium))
    assert same(cache.load(medium), expected)
    assert same(cache.load(medium), expected)


def test_whoever_may_read_the_folder_may_read_the_clips(cache, medium):
    cache.load(medium)
    file = cache.file((medium, None, None))
    assert file.stat().st_mode & 0o777 == file.parent.stat().st_mode & 0o666


def test_a_clip_is_decoded_once(cache, medium, monkeypatch):
    cache.fill([(medium, None, None)])
    stamp = cache.file((medium, None, None)).stat().st_mtime_ns
    monkeypatch.setattr(MirasolFeatureExtractor, "read", None)
    again = ClipCache(cache.folder, cache.root, SETTINGS)
    again.fill([(medium, None, None)])
    again.load(medium)
    assert again.file((medium, None, None)).stat().st_mtime_ns == stamp


def test_a_changed_file_or_other_settings_are_decoded_anew(cache, medium, tmp_path):
    window = (medium, None, None)
    other = ClipCache(cache.folder, cache.root, {**SETTINGS, "image_size": 16})
    assert other.file(window) != cache.file(window)
    copy = tmp_path / "copy"
    (copy / medium).parent.mkdir(parents=True)
    shutil.copy2(cache.root / medium, copy / medium)
    assert ClipCache(cache.folder, copy, SETTINGS).file(window) == cache.file(window)
    os.utime(copy / medium, (1, 1))
    assert ClipCache(cache.folder, copy, SETTINGS).file(window) != cache.file(window)


def test_files_appear_whole_or_not_at_all(cache, medium, monkeypatch):
    def cut_short(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mirasol.data.clip_cache.save_file", cut_short)
    with pytest.raises(KeyboardInterrupt):
        cache.load(medium)
    monkeypatch.undo()
    assert not cache.file((medium, None, None)).exists()
    assert len(cache.load(medium)["video_mask"]) > 0


@pytest.mark.parametrize("damage", [b"junk", b"", None])
def test_a_damaged_cache_file_is_decoded_again_with_a_warning(cache, medium, damage):
    whole, slot = (medium, None, None), (medium, 0.5, 1.5)
    expected = [cache.load(*window) for window in (whole, slot)]
    file = cache.file(whole)
    for place, window in enumerate((whole, slot)):
        damaged = file.read_bytes()[:-100] if damage is None else damage
        file.unlink()  # what was loaded may still be mapped from it
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged file in the clip cache .*: decoded again"):
            assert same(cache.load(*window), expected[place])
        assert same(cache.load(*window), expected[place])


def test_without_a_folder_nothing_is_kept(cache, medium, data_root):
    assert same(ClipCache(None, data_root, SETTINGS).load(medium), cache.load(medium))


def test_a_full_cache_keeps_what_it_has_and_decodes_the_rest(examples, data_root, tmp_path):
    media = list(dict.fromkeys(example.media for example in examples))[:5]
    free = ClipCache(tmp_path / "free", data_root, SETTINGS)
    expected = [free.load(medium) for medium in media]
    size = free.file((media[0], None, None)).stat().st_size
    full = ClipCache(tmp_path / "full", data_root, SETTINGS, limit=int(2.9 * size))
    for _ in range(2):
        assert all(same(full.load(medium), tensors) for medium, tensors in zip(media, expected, strict=True))
        assert 0 < full.size() <= full.limit
    # Another process's cache on the same folder counts on from there, also where the count was lost.
    (full.folder / "size").unlink()
    again = ClipCache(full.folder, data_root, SETTINGS, limit=full.limit)
    stored = full.size()
    assert all(same(again.load(medium), tensors) for medium, tensors in zip(media, expected, strict=True))
    assert full.size() == stored


def test_a_limit_on_a_disk_without_locks_holds_with_a_warning(examples, data_root, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    media = list(dict.fromkeys(example.media for example in examples))[:2]
    cache = ClipCache(tmp_path, data_root, SETTINGS, limit=1)
    with pytest.warns(UserWarning, match=r"this disk has no locks: .* data\.cache_limit"):
        assert cache.load(media[0]).keys() == {"video", "audio", "video_mask", "audio_mask"}
    assert cache.size() == 0


@pytest.mark.usefixtures("forked_helpers")
def test_a_pool_decodes_the_same(examples, data_root, tmp_path):
    windows = list(dict.fromkeys((e.media, e.start, e.end) for e in examples if e.start is not None))
    assert len(windows) >= 16
    one, two = (ClipCache(tmp_path / name, data_root, SETTINGS) for name in ("one", "two"))
    seen = []
    one.fill(windows, workers=2, on_progress=lambda done, total: seen.append((done, total)))
    two.fill(windows, workers=1)
    assert seen == [(done, len(windows)) for done in range(1, len(windows) + 1)]
    assert all(same(one.load(*window), two.load(*window)) for window in windows)


@pytest.mark.parametrize(
    ("number", "seconds", "said"),
    [
        (signal.SIGKILL, 600, "a process that decodes clips died, out of memory perhaps; being decoded were "),
        (signal.SIGSTOP, 2, "no clip decoded within batch_seconds=2: being decoded are "),
    ],
)
def test_a_pool_whose_process_dies_or_stands_still_ends_and_names_what_was_decoded(
    data_root, medium, tmp_path, number, seconds, said
):
    """Its processes get the signal once the first clip is there."""
    cache = ClipCache(tmp_path / "cache", data_root, SETTINGS)

    def signalled(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)

    with pytest.raises(WorkerFailed, match=said):
        cache.fill([(medium, start / 10, start / 10 + 1.5) for start in range(30)], 2, "error", signalled, seconds)


def test_a_slot_cut_from_the_clip_is_the_slot_decoded_on_its_own(examples, data_root, tmp_path):
    slots = [(e.media, e.start, e.end) for e in examples if e.start is not None][:6]
    cutting = ClipCache(tmp_path / "cut", data_root, SETTINGS, whole={media for media, _, _ in slots})
    decoding = ClipCache(tmp_path / "own", data_root, SETTINGS)
    cutting.fill(slots)
    decoding.fill(slots)
    stored = {path.name for path in cutting.folder.rglob("*.safetensors")}
    assert stored == {cutting.file((media, None, None)).name for media, _, _ in slots}, "slots were decoded again"
    for slot in slots:
        cut, own = cutting.load(*slot), decoding.load(*slot)
        for name in ("video", "video_mask", "audio_mask"):
            assert torch.equal(cut[name], own[name]), name
        # Spectrograms lie in about [-1, 1]. Their windows reach over the edges of a slot, where a slot decoded on its
        # own has silence; inside, only the resampler's phase differs.
        difference = (cut["audio"].float() - own["audio"].float()).abs().flatten(0, 1)
        assert difference[1:-1].mean() < 0.01
        assert difference.max() < 0.5


def test_a_window_off_the_grid_is_decoded_on_its_own(cache, medium):
    window = (medium, 0.25, 1.25)
    cache.fill([(medium, None, None), window])
    assert cache.file(window).exists()
    extractor = MirasolFeatureExtractor(**SETTINGS)
    assert same(cache.load(*window), extractor.tensors(extractor.read(cache.root / medium, 0.25, 1.25)))


def test_what_a_window_gives_does_not_depend_on_what_was_decoded_before(data_root, examples, tmp_path):
    slot = next((e.media, e.start, e.end) for e in examples if e.start is not None)
    fresh = ClipCache(tmp_path / "fresh", data_root, SETTINGS).load(*slot)
    used = ClipCache(tmp_path / "used", data_root, SETTINGS)
    used.load(slot[0])
    assert same(used.load(*slot), fresh)


@pytest.fixture
def broken_root(data_root, medium, tmp_path):
    root = tmp_path / "broken"
    (root / "clips").mkdir(parents=True)
    shutil.copy(data_root / medium, root / "clips" / "good.mp4")
    (root / "clips" / "text.mp4").write_text("no video")
    return root


def test_bad_clips_stop_or_are_listed(broken_root, tmp_path):
    cache = ClipCache(tmp_path / "cache", broken_root, SETTINGS)
    windows = [
        ("clips/good.mp4", None, None),
        ("clips/text.mp4", None, None),
        ("clips/text.mp4", 1.0, 2.0),
        ("clips/absent.mp4", None, None),
        ("clips/good.mp4", 900.0, 901.0),
    ]
    with pytest.raises(BadClip, match=r"(text|absent)\.mp4: "):
        cache.fill(windows, on_bad="error")
    bad = cache.fill(windows, on_bad="skip")
    assert [(entry.media, entry.start) for entry in bad] == [(media, start) for media, start, _ in windows[1:]]
    assert all(entry.reason and "\n" not in entry.reason for entry in bad)
    assert json.dumps(bad[0].reason)


def test_the_window_that_stopped_is_named_whole(broken_root, tmp_path):
    cache = ClipCache(tmp_path / "cache", broken_root, SETTINGS)
    with pytest.raises(UnreadableWindow) as caught:
        cache.fill([("clips/good.mp4", 900.0, 901.0)], on_bad="error")
    window = caught.value.window
    assert (window.media, window.start, window.end) == ("clips/good.mp4", 900.0, 901.0)
    assert window.reason in str(caught.value)
