"""Augmentation of a clip: a pure function of tensors, settings and seed, that keeps picture and sound together."""

import dataclasses
import random

import pytest
import torch

from mirasol.errors import UserError
from mirasol.media.augment import (
    Augment,
    SpecAugment,
    augment_clip,
    compute_decode_size,
    compute_shift_step,
    crop_video,
    draw_crop_box,
    draw_shift,
    mask_spectrogram,
    shift_clip,
)
from mirasol.media.spectrogram import SILENCE

CHUNKS, FRAMES, BANDS, BINS, SIDE = 3, 4, 16, 64, 24
EVERYTHING = Augment(SpecAugment(2, 20, 2, 10), crop=0.5, flip=0.5, time_shift=3)


@pytest.fixture
def clip() -> dict[str, torch.Tensor]:
    """Every frame and every mel frame holds the number of its place (from 1), so that one sees where each went."""
    generator = torch.Generator().manual_seed(0)
    video = torch.arange(1, CHUNKS * FRAMES + 1, dtype=torch.uint8).view(CHUNKS, FRAMES, 1, 1, 1)
    audio = torch.arange(1, CHUNKS * BANDS + 1).view(CHUNKS, BANDS, 1).half()
    noise = torch.randint(0, 100, (CHUNKS, FRAMES, 3, SIDE, SIDE), generator=generator).to(torch.uint8)
    return {
        "video": video.expand(CHUNKS, FRAMES, 3, SIDE, SIDE) + noise * 0,
        "audio": audio.expand(CHUNKS, BANDS, BINS).clone(),
        "video_mask": torch.ones(CHUNKS, dtype=torch.bool),
        "audio_mask": torch.ones(CHUNKS, dtype=torch.bool),
    }


@pytest.fixture
def noise(clip) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, clip["video"].shape, dtype=torch.uint8)
    return clip | {"video": pixels, "audio": torch.randn(clip["audio"].shape).half()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def numbers(clip) -> tuple[list[int], list[float]]:
    return clip["video"][:, :, 0, 0, 0].flatten().tolist(), clip["audio"][:, :, 0].flatten().tolist()


def test_nothing_is_on_by_default(noise):
    assert same(augment_clip(noise, Augment(), SIDE, seed=5), noise)


def test_the_same_seed_gives_the_same_and_another_another(noise):
    before = {name: value.clone() for name, value in noise.items()}
    first = augment_clip(noise, EVERYTHING, SIDE, seed=5)
    assert same(augment_clip(noise, EVERYTHING, SIDE, seed=5), first)
    assert same(noise, before), "the clip itself was changed"
    others = [augment_clip(noise, EVERYTHING, SIDE, seed) for seed in range(6, 12)]
    assert not any(same(other, first) for other in others)


def test_global_generators_have_no_say_and_are_left_alone(noise):
    first = augment_clip(noise, EVERYTHING, SIDE, seed=5)
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    assert same(augment_clip(noise, EVERYTHING, SIDE, seed=5), first)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize(("name", "off"), [("crop", 1.0), ("flip", 0.0), ("spec_augment", SpecAugment())])
def test_each_draws_for_itself(noise, name, off):
    """Switching one off leaves what the others do to the other modality."""
    other = "video" if name == "spec_augment" else "audio"
    without = dataclasses.replace(EVERYTHING, **{name: off})
    assert torch.equal(augment_clip(noise, EVERYTHING, SIDE, 3)[other], augment_clip(noise, without, SIDE, 3)[other])


@pytest.mark.parametrize("frames", [-5, -1, 0, 2, 4])
def test_a_shift_moves_picture_and_sound_together(clip, frames):
    pictures, sounds = numbers(shift_clip(clip, frames))
    for place, picture in enumerate(pictures):
        inside = 0 <= place - frames < CHUNKS * FRAMES
        heard = sounds[4 * place : 4 * place + 4]
        if inside:
            assert picture == place - frames + 1
            assert heard == [4 * (picture - 1) + part for part in (1, 2, 3, 4)], "sound belongs to its picture"
        elif abs(frames) % FRAMES and picture:
            assert picture == (1 if frames > 0 else CHUNKS * FRAMES), "the edge is held"
            assert heard == [SILENCE] * 4


def test_what_lies_wholly_outside_is_absent(clip):
    later = shift_clip(clip, FRAMES)
    assert later["video_mask"].tolist() == later["audio_mask"].tolist() == [False, True, True]
    assert not later["video"][0].any() and not later["audio"][0].any()


def test_a_shift_carries_what_is_missing_along(clip):
    clip["audio_mask"][1], clip["audio"][1] = False, 0
    clip["video_mask"][2], clip["video"][2] = False, 0
    moved = shift_clip(clip, -2)
    pictures, sounds = numbers(moved)
    assert moved["video_mask"].tolist() == [True, True, False]
    assert pictures == [3, 4, 5, 6, 7, 8, 8, 8, 0, 0, 0, 0], "the last frame is held to the end of its chunk"
    assert moved["audio_mask"].tolist() == [True, True, True]
    assert sounds[:16] == [*range(9, 17), *[SILENCE] * 8]
    assert sounds[16:] == [*[SILENCE] * 8, *range(33, 41), *range(41, 49), *[SILENCE] * 8]


def test_a_clip_without_pictures_or_sound_can_be_shifted(clip):
    for name in ("video", "audio"):
        silent = clip | {name: torch.zeros_like(clip[name]), f"{name}_mask": torch.zeros(CHUNKS, dtype=torch.bool)}
        moved = shift_clip(silent, 2)
        assert not moved[name].any() and not moved[f"{name}_mask"].any()


def test_shifts_come_in_steps_that_both_modalities_have():
    rates = [(4, 16), (8, 32), (32, 32), (64, 32), (6, 4)]
    assert [compute_shift_step(*rate) for rate in rates] == [1, 1, 1, 2, 3]
    drawn = {draw_shift(5, 2, random.Random(seed)) for seed in range(200)}
    assert drawn == {-4, -2, 0, 2, 4}


def test_boxes_keep_the_share_and_the_shape_and_stay_inside():
    shares, ratios = [], []
    for seed in range(500):
        top, left, height, width = draw_crop_box(0.3, 100, random.Random(seed))
        assert 0 <= top <= top + height <= 100 and 0 <= left <= left + width <= 100
        shares.append(height * width / 10_000)
        ratios.append(width / height)
    assert 0.28 < min(shares) < 0.35 and 0.95 < max(shares) <= 1
    assert 0.73 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.36


def test_all_frames_share_one_crop(noise):
    still = noise | {"video": noise["video"][:1, :1].expand(CHUNKS, FRAMES, 3, SIDE, SIDE)}
    video = augment_clip(still, Augment(crop=0.3), 16, seed=2)["video"]
    assert video.shape == (CHUNKS, FRAMES, 3, 16, 16) and video.dtype == torch.uint8
    assert (video == video[:1, :1]).all() and not (video[0, 0, 0] == video[0, 0, 0, 0, 0]).all()


def test_a_crop_is_that_part_of_the_picture():
    ramp = torch.arange(0, 240, 2, dtype=torch.uint8).expand(1, 1, 3, 120, 120)
    part = crop_video(ramp, (0, 20, 60, 60), 30)
    torch.testing.assert_close(part[0, 0, 0, 0].float(), 40 + 4 * torch.arange(30).float() + 1, atol=2, rtol=0)
    assert torch.equal(crop_video(ramp, (0, 0, 120, 120), 120), ramp)


def test_crops_are_decoded_large_enough():
    assert [compute_decode_size(224, crop) for crop in (1.0, 0.5, 0.25, 0.08)] == [224, 317, 448, 448]


def test_a_flip_mirrors_every_frame_of_its_share_of_the_clips(noise):
    outcomes = [augment_clip(noise, Augment(flip=0.3), SIDE, seed)["video"] for seed in range(400)]
    mirrored = [torch.equal(video, noise["video"].flip(-1)) for video in outcomes]
    assert all(was or torch.equal(video, noise["video"]) for was, video in zip(mirrored, outcomes, strict=True))
    assert 0.2 < sum(mirrored) / 400 < 0.4


def test_masks_hide_bands_over_all_chunks_at_the_mean(noise):
    audio, mask = noise["audio"], noise["audio_mask"]
    result = mask_spectrogram(audio, mask, SpecAugment(1, 20), random.Random(1))
    hidden = (result != audio).view(-1, BINS)
    assert hidden.all(0).sum() == hidden.any(0).sum() > 0, "a band of frequency lasts from beginning to end"
    assert result[result != audio].unique().tolist() == pytest.approx([float(audio.float().mean())], abs=1e-3)
    result = mask_spectrogram(audio, mask, SpecAugment(0, 48, 1, 40), random.Random(0))
    hidden = (result != audio).view(-1, BINS)
    assert hidden.all(1).sum() == hidden.any(1).sum() > BANDS, "a band of time crosses chunks"
    assert (hidden.all(1).nonzero().diff(dim=0) == 1).all()


def test_masks_are_as_many_and_as_wide_as_was_said(noise):
    frequency, time = set(), set()
    for seed in range(300):
        one = mask_spectrogram(noise["audio"], noise["audio_mask"], SpecAugment(1, 5), random.Random(seed))
        frequency.add(int((one != noise["audio"]).flatten(0, 1).all(0).sum()))
        one = mask_spectrogram(noise["audio"], noise["audio_mask"], SpecAugment(0, 48, 1, 6), random.Random(seed))
        time.add(int((one != noise["audio"]).flatten(0, 1).all(1).sum()))
    assert frequency == set(range(6)) and time == set(range(7))
    narrow = SpecAugment(0, 48, 1, 40, time_share=0.1)
    widths = [
        int((mask_spectrogram(noise["audio"], noise["audio_mask"], narrow, random.Random(seed)) != noise["audio"])
            .flatten(0, 1).all(1).sum()) for seed in range(100)
    ]  # fmt: skip
    assert max(widths) == int(0.1 * CHUNKS * BANDS)


def test_masks_leave_absent_sound_absent(noise):
    noise["audio_mask"][0], noise["audio"][0] = False, 0
    result = mask_spectrogram(noise["audio"], noise["audio_mask"], SpecAugment(4, 64, 4, 48), random.Random(0))
    assert not result[0].any() and (result[1:] != noise["audio"][1:]).any()
    nothing = torch.zeros(CHUNKS, dtype=torch.bool)
    assert torch.equal(mask_spectrogram(noise["audio"], nothing, SpecAugment(1), random.Random(0)), noise["audio"])


def test_no_clip_is_moved_by_more_than_half_of_its_length(clip):
    far = Augment(time_shift=100 * CHUNKS * FRAMES)
    frames = CHUNKS * FRAMES
    for seed in range(50):
        moved = augment_clip(clip, far, SIDE, seed)["video"].flatten(0, 1)[:, 0, 0, 0].unique()
        assert len(moved) >= frames - frames // 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SpecAugment(frequency_masks=-1), "spec_augment.frequency_masks=-1 must not be negative"),
        (lambda: SpecAugment(1, 0), "spec_augment.frequency_width=0 must be at least 1"),
        (lambda: SpecAugment(0, 20), "frequency_width=20 has no effect without frequency_masks"),
        (lambda: SpecAugment(time_share=0.5), "time_share=0.5 has no effect without time_masks"),
        (lambda: SpecAugment(time_masks=1, time_share=0), r"time_share=0 must be in \(0, 1\]"),
        (lambda: Augment(mixup=-0.5), "augment.mixup=-0.5 must be at least 0"),
        (lambda: Augment(crop=0.0), "augment.crop=0.0 must be a share of the picture"),
        (lambda: Augment(flip=1.5), "augment.flip=1.5 must be a share of the clips"),
        (lambda: Augment(time_shift=-1), "augment.time_shift=-1 must not be negative"),
        (lambda: Augment(SpecAugment(1, 65)).check_fits("s.", 64, 4, 16, 8), "^s.augment.*=65 exceeds the .* 64 mel"),
        (lambda: Augment(time_shift=1).check_fits("s.", 64, 64, 32, 8), "time_shift=1 has no effect: .*of 2 frames"),
        (lambda: Augment(time_shift=17).check_fits("s.", 64, 4, 16, 8), "^s.augment.time_shift=17 exceeds half .* 8 "),
    ],
)  # fmt: skip
def test_impossible_and_idle_settings_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
