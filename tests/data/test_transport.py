"""What travels between processes: the same tensors come back, and no memory is used again before it was returned."""

import pytest
import torch

from mirasol.data import transport
from mirasol.data.transport import FrameMemory, FrameRows, give_back, packed, unpacked

MIXED_LENGTHS = [(3, 3, 3), (3, 1, 2), (1, 3, 2), (2, 1, 3, 4), (1,)]


def videos_of(lengths) -> list[torch.Tensor]:
    return [torch.randint(1, 256, (length, 2, 3, 4, 4), dtype=torch.uint8) for length in lengths]


def rows_of(videos, memory=None) -> torch.Tensor:
    rows = FrameRows(len(videos), memory)
    for video in videos:
        rows.add(video.clone())
    return rows.batch()


def assert_holds(batch, videos):
    for row, video in zip(batch, videos, strict=True):
        assert torch.equal(row[: len(video)], video)
        assert not row[len(video) :].any()


@pytest.mark.parametrize("limit", [0, 100, 2**20])
def test_tensors_that_travel_together_come_back_each_as_it_was(monkeypatch, limit):
    monkeypatch.setattr(transport, "PACKED_BYTES", limit)
    tensors = {
        "pixels": torch.arange(200, dtype=torch.uint8).view(2, 100), "mask": torch.tensor([True, False, True]),
        "numbers": torch.randn(3, 5), "ids": torch.arange(7), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4),
    }  # fmt: skip
    layouts, travelled = packed(tensors)
    assert set(travelled) == {"", *(name for name, value in tensors.items() if value.nbytes > limit)}
    back = unpacked(layouts, travelled)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in tensors.items())


@pytest.mark.parametrize("lengths", MIXED_LENGTHS)
@pytest.mark.parametrize("limit", [None, 0, 2**20])
def test_frames_become_a_batch_clip_by_clip_padded_to_the_longest(monkeypatch, lengths, limit):
    """Without memory, with memory for large frames, and with memory that is not needed for frames this small."""
    monkeypatch.setattr(transport, "PACKED_BYTES", limit or 0)
    memory = None if limit is None else FrameMemory(2)
    for _ in range(3):  # the second and third time in memory that held other frames
        videos = videos_of(lengths)
        batch = rows_of(videos, memory)
        assert batch.shape == (len(videos), max(lengths), 2, 3, 4, 4)
        assert_holds(batch, videos)
        assert batch.is_shared() == (limit == 0)
        give_back(*packed({"video": batch}))


def test_a_batch_without_frames_has_none():
    assert FrameRows(3).batch() is None


def test_memory_is_used_again_once_it_was_given_back_and_not_before(monkeypatch):
    monkeypatch.setattr(transport, "PACKED_BYTES", 0)
    memory, videos = FrameMemory(2), [videos_of((2, 2)) for _ in range(4)]
    first, second, third = (rows_of(each, memory) for each in videos[:3])
    for batch, wanted in zip((first, second, third), videos, strict=False):
        assert_holds(batch, wanted)
    where = {second.data_ptr()}
    give_back(*packed({"video": second}))
    fourth = rows_of(videos[3], memory)
    assert {fourth.data_ptr()} == where
    for batch, wanted in ((first, videos[0]), (third, videos[2]), (fourth, videos[3])):
        assert_holds(batch, wanted)


def test_frames_of_another_size_take_the_place_of_what_was_given_back(monkeypatch):
    monkeypatch.setattr(transport, "PACKED_BYTES", 0)
    memory = FrameMemory(2)
    for length in (1, 2, 3, 4, 2):
        videos = videos_of((length, 1))
        batch = rows_of(videos, memory)
        assert_holds(batch, videos)
        give_back(*packed({"video": batch}))
        assert len(memory._pieces) == 1


def test_memory_never_given_back_is_not_piled_up(monkeypatch):
    monkeypatch.setattr(transport, "PACKED_BYTES", 0)
    memory = FrameMemory(2)
    for _ in range(5):
        rows_of(videos_of((2, 2)), memory)
    assert len(memory._pieces) == 2


@pytest.mark.parametrize("video", [torch.ones(2, 3), torch.ones(2, 3).share_memory_(), torch.ones(9).byte()])
@pytest.mark.parametrize("limit", [0, 2**20])
def test_only_frames_in_that_memory_are_given_back(monkeypatch, limit, video):
    monkeypatch.setattr(transport, "PACKED_BYTES", limit)
    before = video.clone()
    layouts, travelled = packed({"video": video, "mask": torch.ones(3)})
    give_back(layouts, travelled)
    assert torch.equal(unpacked(layouts, travelled)["video"], before)
    give_back(*packed({"mask": torch.ones(3)}))
