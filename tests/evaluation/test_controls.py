import pytest
import torch

from mirasol import UserError
from mirasol.evaluation.controls import CONTROLS, apply_control


@pytest.fixture
def clip():
    chunks = 5
    return {
        "video": torch.arange(chunks * 6, dtype=torch.uint8).view(chunks, 1, 3, 1, 2) + 1,
        "audio": torch.arange(1, chunks * 4 + 1).view(chunks, 2, 2).half(),
        "video_mask": torch.tensor([True, True, True, True, False]),
        "audio_mask": torch.tensor([True, False, True, True, True]),
    }


def test_each_control_takes_what_it_names_and_nothing_else(clip):
    for name, gone in {"no_video": ["video"], "no_audio": ["audio"], "no_media": ["video", "audio"]}.items():
        changed = apply_control(name, clip)
        for stream in ("video", "audio"):
            if stream in gone:
                assert not changed[stream].any()
                assert not changed[f"{stream}_mask"].any()
            else:
                assert torch.equal(changed[stream], clip[stream])
                assert torch.equal(changed[f"{stream}_mask"], clip[f"{stream}_mask"])


def test_shifting_moves_all_audio_with_its_mask_by_half_the_chunks(clip):
    changed = apply_control("shifted_audio", clip)
    for chunk in range(5):
        assert torch.equal(changed["audio"][(chunk + 2) % 5], clip["audio"][chunk])
        assert changed["audio_mask"][(chunk + 2) % 5] == clip["audio_mask"][chunk]
        assert not torch.equal(changed["audio"][chunk], clip["audio"][chunk])
    assert torch.equal(changed["video"], clip["video"])


def test_controls_leave_the_clip_they_are_given_alone(clip):
    before = {name: value.clone() for name, value in clip.items()}
    for name in [None, *CONTROLS]:
        changed = apply_control(name, clip)
        assert changed.keys() == clip.keys()
        assert all(changed[key].shape == clip[key].shape and changed[key].dtype == clip[key].dtype for key in clip)
    assert all(torch.equal(before[key], clip[key]) for key in clip)


def test_one_chunk_cannot_be_shifted(clip):
    single = {name: value[:1] for name, value in clip.items()}
    assert torch.equal(apply_control("shifted_audio", single)["audio"], single["audio"])


def test_an_unknown_control_names_those_that_exist(clip):
    with pytest.raises(UserError, match="no_sound.*no_audio"):
        apply_control("no_sound", clip)
