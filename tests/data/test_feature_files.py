"""The files of the feature cache: whose they are, how they are shared, what damage and a full disk do."""

import errno
import os
from pathlib import Path

import pytest
import torch

from mirasol.config.model import MirasolConfig
from mirasol.data.clip_cache import ClipCache
from mirasol.data.feature_cache import FeatureCache, collate_features, complete_features
from mirasol.errors import BadClip, UserError
from mirasol.media.feature_extractor import MirasolFeatureExtractor

SETTINGS = MirasolConfig.preset("tiny").media_settings()


@pytest.fixture
def window(examples):
    return examples[0].media, None, None


@pytest.fixture
def clips(data_root, tmp_path) -> ClipCache:
    return ClipCache(tmp_path / "clips", data_root, SETTINGS)


@pytest.fixture
def cache(clips, tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", clips, "weights")


def make_features(chunks: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "video_features": torch.randn(chunks, 5, 8, generator=draw).bfloat16(),  # as under autocast
        "audio_features": torch.randn(chunks, 2, 8, generator=draw),
        "video_target": torch.randn(chunks, 4, 3, generator=draw),
        "video_mask": torch.rand(chunks, generator=draw) < 0.5,
        "audio_mask": torch.ones(chunks, dtype=torch.bool),
    }


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_what_is_kept_is_found_by_every_process_in_the_dtypes_it_had(cache, clips, window):
    features = make_features(3)
    assert cache.load(window) is None and not cache.has_if_readable(window)
    assert cache.keep(window, features) is None
    again = FeatureCache(cache.folder, clips, "weights")
    assert again.has_if_readable(window) and same(again.load(window), features)
    assert [path.suffix for path in cache.folder.rglob("*") if path.is_file()] == [".safetensors"], "no leftovers"


def test_bf16_takes_half_the_disk_and_is_what_a_step_sees_from_the_start(cache, clips, window):
    features = make_features(50)
    small = FeatureCache(cache.folder, clips, "weights", "bf16")
    rounded = small.round(features)
    assert same(small.round(rounded), rounded) and not same(rounded, features)
    cache.keep(window, features)
    small.keep(window, rounded)
    assert same(small.load(window), rounded) and same(cache.load(window), features)
    assert small.file(window).stat().st_size < 0.75 * cache.file(window).stat().st_size
    assert cache.round(features).keys() == features.keys() and same(cache.round(features), features)


def test_other_weights_media_settings_or_windows_have_files_of_their_own(cache, clips, window, data_root, tmp_path):
    medium = window[0]
    files = {cache.file(window), cache.file((medium, 0.0, 1.0))}
    files.add(FeatureCache(cache.folder, clips, "other weights").file(window))
    files.add(FeatureCache(cache.folder, clips, "weights", "bf16").file(window))
    files.add(
        FeatureCache(cache.folder, ClipCache(None, data_root, {**SETTINGS, "num_mel_bins": 32}), "weights").file(window)
    )
    # Sound at the edges of a segment differs where it is cut out of its whole clip.
    cut = FeatureCache(cache.folder, ClipCache(tmp_path / "clips", data_root, SETTINGS, whole=[medium]), "weights")
    files.add(cut.file((medium, 0.0, 1.0)))
    copy = tmp_path / "copy" / medium
    copy.parent.mkdir(parents=True)
    copy.write_bytes((data_root / medium).read_bytes())
    os.utime(copy, (1, 1))
    files.add(FeatureCache(cache.folder, ClipCache(None, tmp_path / "copy", SETTINGS), "weights").file(window))
    assert len(files) == 7
    with pytest.raises(BadClip, match="no such file"):
        cache.load(("absent.mp4", None, None))
    assert not cache.has_if_readable(("absent.mp4", None, None))


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "junk"])
def test_a_damaged_file_is_counted_and_makes_room_for_a_new_one(cache, clips, window, damage):
    limited = FeatureCache(cache.folder, clips, "weights", limit=10**6)
    features = make_features(3)
    limited.keep(window, features)
    taken = int((limited.folder / "size").read_text())
    file = limited.file(window)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(
        {"cut": bytes(content[:-40]), "empty": b"", "flipped": bytes(content), "junk": b"junk" * 30}[damage]
    )
    with pytest.warns(UserWarning, match=r"damaged file in the feature cache \(.*: computed again"):
        assert limited.load(window) is None
    assert limited.damaged == 1 and not file.exists()
    limited.keep(window, features)
    assert same(limited.load(window), features)
    assert damage != "flipped" or int((limited.folder / "size").read_text()) == taken


def test_the_limit_holds_for_all_that_write_there_and_is_told_once(cache, clips, window):
    medium = window[0]
    cache.keep(window, make_features(3))
    size = cache.file(window).stat().st_size
    cache.file(window).unlink()
    one, other = (FeatureCache(cache.folder, clips, "weights", limit=int(2.5 * size)) for _ in range(2))
    assert one.keep(window, make_features(3)) is None
    assert other.keep((medium, 0.0, 1.0), make_features(3)) is None
    assert (
        one.keep((medium, 1.0, 2.0), make_features(3)) == f"data.feature_cache_limit={2.5 * size / 1e9:g} GB is reached"
    )
    assert one.keep((medium, 2.0, 3.0), make_features(3)) is None and one.load((medium, 2.0, 3.0)) is None
    assert one.load(window) is not None, "what is there stays in use"


def test_a_full_disk_ends_the_adding_and_leaves_nothing_half_written(cache, clips, window, monkeypatch):
    def fill(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    limited = FeatureCache(cache.folder, clips, "weights", limit=10**6)
    monkeypatch.setattr(Path, "write_bytes", fill)
    assert limited.keep(window, make_features(3)) == "No space left on device"
    assert limited.keep(window, make_features(3)) is None, "once is enough"
    monkeypatch.undo()
    assert limited.load(window) is None
    assert [path.name for path in cache.folder.rglob("*") if path.is_file()] == ["size"]
    assert (cache.folder / "size").read_text() == "0"


def test_a_folder_that_cannot_be_made_is_an_error(clips, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.feature_cache=.*file/below: cannot be created \(Not a directory\)"):
        FeatureCache(tmp_path / "file" / "below", clips, "weights")


def test_batches_of_found_and_decoded_clips_of_any_length_are_completed(clips, window, data_root):
    extractor = MirasolFeatureExtractor(**SETTINGS)
    decoded = clips.load(window[0], 0.0, 2.0)
    rows = [make_features(3, 1), decoded, make_features(5, 2), clips.load(window[0], 1.0, 2.0)]
    media = collate_features(rows, extractor)
    assert media["chunk_mask"].sum(1).tolist() == [3, 4, 5, 2]
    asked = []

    def compute(row, tensors):
        asked.append((row, {name: len(value) for name, value in tensors.items()}))
        return make_features(len(tensors["video"]), row)

    full = complete_features(media, compute)
    assert [row for row, _ in asked] == [1, 3]
    assert [set(lengths.values()) for _, lengths in asked] == [{4}, {2}]
    assert not full.keys() & {"video", "audio", "uncached", "uncached_video_mask", "uncached_audio_mask"}
    for row, expected in enumerate([rows[0], make_features(4, 1), rows[2], make_features(2, 3)]):
        for name in ("video_features", "audio_features", "video_target"):
            length = len(expected[name])
            assert torch.equal(full[name][row, :length], expected[name]) and not full[name][row, length:].any()
    without = collate_features([rows[0], rows[2]], extractor)
    assert same(complete_features(without, None), without)
    fresh = complete_features(collate_features([decoded], extractor), compute)
    assert torch.equal(fresh["video_features"][0], make_features(4, 0)["video_features"])
