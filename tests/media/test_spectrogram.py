"""Log-mel spectrograms of chunks."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank
from transformers.audio_utils import spectrogram as library_spectrogram

from mirasol.media import spectrogram
from mirasol.media.spectrogram import compute_log_mel_chunks

RATE = 16_000


def sine(hertz: float, seconds: float, gain: float = 1.0) -> torch.Tensor:
    return gain * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


def test_shape_and_range():
    mel = compute_log_mel_chunks(sine(440, 2.0), 0.0, RATE, (0.0, 0.5, 1.0, 1.5, 2.0), 64, 16)
    assert mel.shape == (4, 16, 64)
    assert mel.min() >= -1
    assert 0.8 < mel.max() < 1.2, "a sine of amplitude 1 is about 1"


def test_silence_and_absent_samples_are_the_floor():
    assert (compute_log_mel_chunks(torch.zeros(RATE), 0.0, RATE, (0.0, 1.0), 64, 16) == -1).all()
    assert (compute_log_mel_chunks(torch.zeros(0), 0.0, RATE, (0.0, 1.0), 64, 16) == -1).all()
    assert (compute_log_mel_chunks(sine(440, 1.0), 0.0, RATE, (5.0, 6.0), 64, 16) == -1).all()


def test_a_chunk_is_the_same_alone_as_among_others():
    wave = torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    together = compute_log_mel_chunks(wave, 0.0, RATE, (0.0, 0.5, 1.0, 1.5), 64, 16)
    alone = compute_log_mel_chunks(wave, 0.0, RATE, (0.5, 1.0), 64, 16)
    torch.testing.assert_close(together[1:2], alone)


def test_waveform_start_places_the_sound():
    wave = sine(1000, 0.25)
    mel = compute_log_mel_chunks(wave, 0.75, RATE, (0.0, 0.5, 1.0), 64, 16)
    loud = mel.amax(-1) > 0
    assert not loud[0].any()
    assert not loud[1, :7].any()
    assert loud[1, 8:].all(), "band 8 begins at 0.75 s; the one before may hear the onset's first 7.5 ms"


def test_pooling_keeps_the_power_of_a_short_click_in_a_long_chunk():
    click = torch.zeros(8 * RATE)
    click[5 * RATE] = 1.0
    short = compute_log_mel_chunks(click, 0.0, RATE, (4.92, 5.08), 64, 16)
    long = compute_log_mel_chunks(click, 0.0, RATE, (0.0, 8.0), 64, 16)
    assert long[0].amax(-1).argmax() in (9, 10)
    power = [10 ** (spectrogram.LOG_SPREAD * m.double() + spectrogram.LOG_CENTRE) for m in (short, long)]
    floor = spectrogram.POWER_FLOOR
    energy = [
        float((p - floor).clamp_min(0).sum() * seconds / 16) for p, seconds in zip(power, (0.16, 8.0), strict=True)
    ]
    assert energy[0] == pytest.approx(energy[1], rel=0.05)


def test_bands_of_chunks_of_any_length_are_filled():
    for seconds in (0.05, 0.32, 0.5, 1 / 3, 2.7):
        mel = compute_log_mel_chunks(sine(440, 3.0), 0.0, RATE, (0.0, seconds), 64, 16)
        assert torch.isfinite(mel).all()
        assert (mel[0, 1:-1].amax(-1) > 0.8).all(), seconds


def test_agrees_with_the_librarys_spectrogram_where_no_pooling_takes_place():
    wave = torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    ours = compute_log_mel_chunks(wave, 0.0, RATE, (0.0, 1.0), 64, 100)[0]
    filters = mel_filter_bank(513, 64, 20.0, 8000.0, RATE, mel_scale="htk")
    hann = torch.hann_window(400).double().numpy()
    padded = np.pad(wave.double().numpy(), 120)
    theirs = library_spectrogram(padded, hann, 400, 160, fft_length=1024, center=False, power=2.0, mel_filters=filters)
    power = theirs.T * (2 / hann.sum()) ** 2
    expected = (np.log10(np.maximum(power, spectrogram.POWER_FLOOR)) + 4) / 4
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("mels", [32, 64, 128])
def test_every_mel_band_hears_something(mels):
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    assert (compute_log_mel_chunks(noise, 0.0, RATE, (0.0, 1.0), mels, 8) > -0.9).all()
