"""Log-mel spectrograms of the chunks of a timeline.

Each chunk is analysed for itself, in cells of one hop that start exactly at the chunk's first edge, so that spectrogram
and frames of a chunk span the same time. Mel power is area-pooled in time to a fixed number of bands per chunk before
the logarithm is taken: no sound of the chunk is lost, however long it is.
"""

import functools
import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010
FFT_SIZE = 1024  # zero-padded, so that even 128 mel bands each hold a frequency bin at 16 kHz

# Power is relative to a sine of amplitude 1. log10(power) runs from -8 (the floor, digital silence) to about 0 (full
# scale); (log10(power) + 4) / 4 puts that on [-1, 1].
POWER_FLOOR = 1e-8
LOG_CENTRE = -4.0
LOG_SPREAD = 4.0
SILENCE = (math.log10(POWER_FLOOR) - LOG_CENTRE) / LOG_SPREAD


def compute_log_mel_chunks(
    waveform: Float[Tensor, " sample"],
    waveform_start: float,
    sample_rate: int,
    edges: tuple[float, ...],
    num_mel_bins: int,
    spectrogram_frames: int,
) -> Float[Tensor, "chunk mel_frame mel"]:
    """Log-mel spectrogram of each chunk, `spectrogram_frames` time bands of `num_mel_bins`, roughly in [-1, 1].

    `waveform_start` and `edges` are seconds on one timeline; `sample_rate` is in Hz. Where the waveform has no samples
    it counts as silence, which is -1. A 25 ms Hann window is centred on every 10 ms cell, so a chunk's first
    and last cell also hear up to 7.5 ms of its neighbours. Chunks are worked one after the other: beyond waveform and
    result, memory holds one chunk.
    """
    mel_filters = _make_mel_filters(num_mel_bins, sample_rate)
    chunks = [
        _compute_log_mel(
            _cut_span(waveform, waveform_start, sample_rate, left, right),
            sample_rate,
            right - left,
            mel_filters,
            spectrogram_frames,
        )
        for left, right in itertools.pairwise(edges)
    ]
    return torch.stack(chunks)


def _cut_span(waveform: Tensor, waveform_start: float, sample_rate: int, left: float, right: float) -> Tensor:
    """The samples that the analysis windows of [left, right) seconds cover; zeros where there are none."""
    hop, window = _choose_hop_and_window(sample_rate)
    cells = _count_cells(right - left)
    margin = (window - hop) // 2
    first = round((left - waveform_start) * sample_rate) - margin
    last = first + (cells - 1) * hop + window
    samples = torch.zeros(last - first)
    low, high = max(first, 0), min(last, len(waveform))
    if low < high:
        samples[low - first : high - first] = waveform[low:high]
    return samples


def _compute_log_mel(samples: Tensor, sample_rate: int, seconds: float, mel_filters: Tensor, bands: int) -> Tensor:
    hop, window = _choose_hop_and_window(sample_rate)
    hann, scale = _make_hann_window(window)
    spectrum = torch.fft.rfft(samples.unfold(0, window, hop) * hann, n=FFT_SIZE * _choose_fft_scale(sample_rate))
    # Squares of the two parts added up: a sum over the axis of real and imaginary part takes five times as long.
    power = spectrum.real.square().add_(spectrum.imag.square()).mul_(scale)
    pooled = _make_area_pooling(seconds, bands) @ (power @ mel_filters)
    return (pooled.clamp_min(POWER_FLOOR).log10() - LOG_CENTRE) / LOG_SPREAD


def _choose_hop_and_window(sample_rate: int) -> tuple[int, int]:
    return round(HOP_SECONDS * sample_rate), round(WINDOW_SECONDS * sample_rate)


def _count_cells(seconds: float) -> int:
    return max(1, math.ceil(seconds / HOP_SECONDS - 1e-6))


def _choose_fft_scale(sample_rate: int) -> int:
    """Keeps the FFT at least as long as the window for rates above 16 kHz."""
    return max(1, math.ceil(sample_rate / 16_000))


@functools.lru_cache(maxsize=8)
def _make_hann_window(window: int) -> tuple[Float[Tensor, " sample"], Float[Tensor, ""]]:
    """The window, and what makes the power of a sine of amplitude 1 under it 1."""
    hann = torch.hann_window(window)
    return hann, (2.0 / hann.sum()).square()


@functools.lru_cache(maxsize=8)
def _make_mel_filters(num_mel_bins: int, sample_rate: int) -> Float[Tensor, "frequency mel"]:
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=FFT_SIZE * _choose_fft_scale(sample_rate) // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=20.0,
        max_frequency=sample_rate / 2,
        sampling_rate=sample_rate,
        mel_scale="htk",
    )
    return torch.from_numpy(filters).float()


@functools.lru_cache(maxsize=64)
def _make_area_pooling(seconds: float, bands: int) -> Float[Tensor, "mel_frame cell"]:
    """Weights that average cells of one hop into `bands` equal parts of `seconds`, by overlap in time."""
    cell_edges = torch.arange(_count_cells(seconds) + 1, dtype=torch.float64) * HOP_SECONDS
    band_edges = torch.arange(bands + 1, dtype=torch.float64) * (seconds / bands)
    left = torch.maximum(band_edges[:-1, None], cell_edges[None, :-1])
    right = torch.minimum(band_edges[1:, None], cell_edges[None, 1:])
    overlap = (right - left).clamp_min(0)
    return (overlap / overlap.sum(1, keepdim=True)).float()
