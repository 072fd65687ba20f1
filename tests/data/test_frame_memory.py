"""No memory of a batch's frames is used again before it was released, and no frame is lost on the way."""

import pytest
import torch

from mirasol.data.frame_memory import FrameMemory, FrameRows, release_frames

MIXED_LENGTHS = [(3, 3, 3), (3, 1, 2), (1, 3, 2), (2, 1, 3, 4), (1,)]


def make_videos(lengths) -> list[torch.Tensor]:
    return [torch.randint(1, 256, (length, 2, 3, 4, 4), dtype=torch.uint8) for length in lengths]


def make_batch(videos, memory=None) -> torch.Tensor:
    rows = FrameRows(len(videos), memory)
    for video in videos:
        rows.add(video.clone())
    return rows.batch()


def assert_contains(batch, videos):
    for row, video in zip(batch, videos, strict=True):
        assert torch.equal(row[: len(video)], video)
        assert not row[len(video) :].any()


@pytest.mark.parametrize("lengths", MIXED_LENGTHS)
@pytest.mark.parametrize("shared", [False, True])
def test_frames_become_a_batch_clip_by_clip_padded_to_the_longest(lengths, shared):
    memory = FrameMemory(2) if shared else None
    for _ in range(3):  # the second and third time in memory that contained other frames
        videos = make_videos(lengths)
        batch = make_batch(videos, memory)
        assert batch.shape == (len(videos), max(lengths), 2, 3, 4, 4)
        assert_contains(batch, videos)
        assert batch.is_shared() == shared
        if shared:
            release_frames(batch)


def test_a_batch_without_frames_has_none():
    assert FrameRows(3).batch() is None


def test_memory_is_used_again_once_it_was_released_and_not_before():
    memory, videos = FrameMemory(2), [make_videos((2, 2)) for _ in range(4)]
    first, second, third = (make_batch(each, memory) for each in videos[:3])
    for batch, wanted in zip((first, second, third), videos, strict=False):
        assert_contains(batch, wanted)
    address = second.data_ptr()
    release_frames(second)
    fourth = make_batch(videos[3], memory)
    assert fourth.data_ptr() == address
    for batch, wanted in ((first, videos[0]), (third, videos[2]), (fourth, videos[3])):
        assert_contains(batch, wanted)


def test_frames_of_another_size_take_the_place_of_released_ones():
    memory = FrameMemory(2)
    for length in (1, 2, 3, 4, 2):
        videos = make_videos((length, 1))
        batch = make_batch(videos, memory)
        assert_contains(batch, videos)
        release_frames(batch)
        assert len(memory._pieces) == 1


def test_memory_never_released_is_not_piled_up():
    memory = FrameMemory(2)
    for _ in range(5):
        make_batch(make_videos((2, 2)), memory)
    assert len(memory._pieces) == 2


def test_only_shared_frames_can_be_released():
    with pytest.raises(AssertionError):
        release_frames(make_batch(make_videos((2,))))
