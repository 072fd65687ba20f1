"""High dynamic range (PQ, HLG) to standard dynamic range, on pictures that are already small."""

import functools

import numpy as np
from av.video.frame import VideoFrame
from jaxtyping import Float64, UInt8, UInt16

# Transfer characteristics by FFmpeg's numbers (ITU-T H.273).
TRANSFERS = {16: "PQ", 18: "HLG"}
BT2020_PRIMARIES = 9
WHITE_NITS = 203.0  # reference white of ITU-R BT.2408: a white page, not a lamp
HLG_PEAK_NITS = 1000.0
DISPLAY_GAMMA = 2.4  # ITU-R BT.1886
FULL_SIGNAL = 255 * 256  # what swscale (FFmpeg 8) makes of the highest signal when it converts to 16 bits
STEP = 16  # of signals in the table in which their light is looked up

# Linear BT.2020 to linear BT.709 (ITU-R BT.2087).
BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
)
BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])


def get_transfer(frame: VideoFrame) -> str:
    """ "PQ" or "HLG" for a frame of high dynamic range, otherwise ""."""
    return TRANSFERS.get(frame.color_trc, "")


def map_tones(
    picture: UInt16[np.ndarray, "3 height width"], transfer: str, primaries: int
) -> UInt8[np.ndarray, "3 height width"]:
    """Full-range R'G'B' of a PQ or HLG picture to R'G'B' for a BT.709 display of gamma 2.4.

    Reference white (203 cd/m²) becomes white and what is darker keeps its luminance; what is brighter is cut off, its
    hue kept. FFmpeg's `zscale=t=linear:npl=203,…,tonemap=clip:desat=0,zscale=t=bt709` gives the same.
    """
    light = _make_light_table(transfer)[np.minimum(picture, FULL_SIGNAL) // STEP]
    if transfer == "HLG":
        # The system gamma of 1.2 applies to luminance, so that hues stay (ITU-R BT.2100).
        luminance = np.tensordot(BT2020_LUMINANCE, light, 1)
        light = light * (luminance**0.2) * (HLG_PEAK_NITS / WHITE_NITS)
    if primaries == BT2020_PRIMARIES:
        light = np.tensordot(BT2020_TO_BT709, light, 1)
    light = light / np.maximum(light.max(axis=0), 1.0)
    return np.rint(255 * np.clip(light, 0.0, 1.0) ** (1 / DISPLAY_GAMMA)).astype(np.uint8)


@functools.lru_cache(maxsize=2)
def _make_light_table(transfer: str) -> Float64[np.ndarray, " code"]:
    """Light of each signal: PQ in units of reference white, HLG of the scene from 0 to 1."""
    signal = np.arange(FULL_SIGNAL // STEP + 1) * (STEP / FULL_SIGNAL)
    if transfer == "PQ":
        # SMPTE ST 2084.
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = signal ** (1 / m2)
        return 10_000 / WHITE_NITS * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073  # ARIB STD-B67
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
