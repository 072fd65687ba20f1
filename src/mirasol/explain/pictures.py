"""Pictures made of an explanation's arrays: frames and spectrograms with what is read of them laid over in colour."""

import itertools

import numpy as np
from jaxtyping import Float, UInt8

from mirasol.explain.compute import Explanation

HEAT = np.array([244, 134, 66], np.float32)  # what is read, on grey
LINES = 600  # of a drawn waveform


def spread_over_boxes(
    shares: Float[np.ndarray, "... token"], boxes: np.ndarray, shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """Shares of tokens spread evenly over the cells of their boxes (`Explanation.tubes`, `patches`): densities on a
    grid of this shape, whose sum is that of the shares."""
    spread = np.zeros((*shares.shape[:-1], *shape), np.float32)
    for token, box in enumerate(boxes):
        pairs = box.reshape(-1, 2)
        size = np.prod(pairs[:, 1] - pairs[:, 0])
        place = (..., *(slice(*pair) for pair in pairs))
        spread[place] += (shares[..., token] / size)[(..., *[None] * len(pairs))]
    return spread


def spread_over_frames(
    explanation: Explanation, shares: Float[np.ndarray, "source token"]
) -> Float[np.ndarray, "source frame height width"]:
    """How much is read of every pixel of every chunk."""
    tubes = explanation.tubes
    shape = tuple(int(end) for end in tubes[:, 1::2].max(axis=0))
    if explanation.frames is not None:
        shape = explanation.frames.shape[1:4]
    return spread_over_boxes(shares[:, : len(tubes)], tubes, shape)


def spread_over_spectrogram(
    explanation: Explanation, shares: Float[np.ndarray, "source token"]
) -> Float[np.ndarray, "source mel_frame mel"]:
    """How much is read of every cell of every chunk's spectrogram."""
    patches = explanation.patches
    shape = tuple(int(end) for end in patches[:, 1::2].max(axis=0))
    return spread_over_boxes(shares[:, len(explanation.tubes) :], patches, shape)


def colour_frames(
    explanation: Explanation, shares: Float[np.ndarray, "source token"]
) -> UInt8[np.ndarray, "source height width 3"] | None:
    """The middle frame of each chunk in grey, with what is read of the chunk's pixels over it; None without video."""
    if explanation.frames is None:
        return None
    middle = explanation.frames[:, explanation.frames.shape[1] // 2].mean(axis=-1) / 255
    return lay_over(middle, spread_over_frames(explanation, shares).sum(axis=1))


def colour_spectrogram(
    explanation: Explanation, shares: Float[np.ndarray, "source token"]
) -> UInt8[np.ndarray, "mel time 3"] | None:
    """The clip's spectrogram in grey, low tones at the bottom, with what is read of it over it; None without sound."""
    if explanation.spectrogram is None:
        return None
    heat = spread_over_spectrogram(explanation, shares)
    return lay_over(scale_spectrogram(explanation), heat.reshape(-1, heat.shape[2]).T[::-1])


def scale_spectrogram(explanation: Explanation) -> Float[np.ndarray, "mel time"]:
    """The spectrogram of all chunks, low tones at the bottom, its smallest value 0 and its largest 1."""
    assert explanation.spectrogram is not None
    values = explanation.spectrogram.reshape(-1, explanation.spectrogram.shape[2]).T[::-1]
    low, high = float(values.min()), float(values.max())
    return (values - low) / max(high - low, 1e-9)


def lay_over(grey: Float[np.ndarray, "*shape"], heat: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Grey values in [0, 1] as colours: orange where the heat is, fully at its largest value; by its square root, since
    a chunk reads so much more of itself than of others that these would not show."""
    alpha = 0.85 * np.sqrt(heat / max(float(heat.max(initial=0)), 1e-12))[..., None]
    base = 255 * (0.12 + 0.78 * grey[..., None])
    return np.clip((1 - alpha) * base + alpha * HEAT * (0.55 + 0.45 * grey[..., None]), 0, 255).astype(np.uint8)


def trace_waveform(explanation: Explanation, lines: int = LINES) -> Float[np.ndarray, "line 2"] | None:
    """The smallest and the largest sample in each of so many equal parts of the clip's time; 0 where the file has no
    sound. None without sound."""
    if explanation.waveform is None:
        return None
    places = np.linspace(explanation.edges[0], explanation.edges[-1], lines + 1)
    places = np.round((places - explanation.waveform_start) * explanation.sample_rate).astype(int)
    ends = np.zeros((lines, 2), np.float32)
    for line, (first, end) in enumerate(itertools.pairwise(places)):
        part = explanation.waveform[max(first, 0) : max(end, first + 1, 0)]
        if len(part):
            ends[line] = part.min(), part.max()
    return ends
