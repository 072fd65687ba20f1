"""How things sound: a second or less of each kind of sound, before fading and loudness."""

import functools
from collections.abc import Callable

import numpy as np

# Seconds from the onset, evenly spaced, float32 [sample]; base frequency in Hz; seed of noise → float [sample].
Voice = Callable[[np.ndarray, float, int], np.ndarray]

BELL_PARTIALS = ((1.0, 1.0), (2.0, 0.5), (2.76, 0.45), (4.07, 0.25))
BELL_STRIKES = 2
BELL_DECAY_SECONDS = 0.22
BUZZ_HARMONICS = 24
VIBRATO_HZ, VIBRATO_DEPTH = 6.0, 0.03
DRUM_HITS, DRUM_DECAY_SECONDS = 6, 0.045
RATTLE_HITS, RATTLE_DECAY_SECONDS = 14, 0.012
SIREN_HZ, SIREN_OCTAVES = 2.0, 1.0
ORGAN_PARTIALS = (1, 2, 3, 4, 6, 8)
BEEPS_A_SECOND, BEEP_EDGE = 6.0, 8.0
TOP_HZ = 7000.0  # nothing above it, so that the slowest sample rate (16 kHz) carries every sound


def voice_bell(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """Decaying inharmonic partials, struck twice, so that each half of the slot tells timbre and pitch."""
    since = time % np.float32((time[-1] + time[1]) / BELL_STRIKES)
    partials = sum(
        amplitude * np.sin(np.float32(2 * np.pi * ratio * hz) * since)
        for ratio, amplitude in BELL_PARTIALS
        if ratio * hz < TOP_HZ
    )
    return partials * np.exp(-since / BELL_DECAY_SECONDS)


def voice_buzz(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """A band-limited sawtooth, read from a table of one period."""
    harmonics = [k for k in range(1, BUZZ_HARMONICS + 1) if k * hz < TOP_HZ]
    table = _make_sawtooth(len(harmonics))
    phase = (hz * time.astype(np.float64)) % 1.0
    return table[(phase * len(table)).astype(np.int64)]


@functools.lru_cache(maxsize=32)
def _make_sawtooth(harmonics: int) -> np.ndarray:
    """One period of a sawtooth's first harmonics, 4,096 samples."""
    phase = np.arange(4096) / 4096
    return sum(np.sin(2 * np.pi * k * phase) / k for k in range(1, harmonics + 1)).astype(np.float32)


def voice_whistle(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """A pure tone with vibrato."""
    depth = VIBRATO_DEPTH * hz / VIBRATO_HZ
    wobble = np.float32(depth) * np.sin(np.float32(2 * np.pi * VIBRATO_HZ) * time)
    return np.sin(np.float32(2 * np.pi * hz) * time + wobble)


def voice_drum(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """A roll of short noise bursts in a band of two octaves around the base frequency."""
    return _make_bursts(time, hz, noise_seed, DRUM_HITS, DRUM_DECAY_SECONDS)


def voice_rattle(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """Many dry noise bursts."""
    return _make_bursts(time, hz, noise_seed, RATTLE_HITS, RATTLE_DECAY_SECONDS)


def _make_bursts(time: np.ndarray, hz: float, noise_seed: int, hits: int, decay: float) -> np.ndarray:
    count, rate = len(time), 1.0 / float(time[1])
    size = 1 << (count - 1).bit_length()
    frequency = np.fft.rfftfreq(size, 1 / rate)
    rng = np.random.default_rng(noise_seed)
    band = (frequency >= hz / 2) & (frequency <= hz * 2)
    spectrum = np.zeros(len(frequency), np.complex128)
    spectrum[band] = np.exp(2j * np.pi * rng.uniform(size=int(band.sum())))
    noise = np.fft.irfft(spectrum, size)[:count]
    since = time % np.float32((time[-1] + time[1]) / hits)
    return noise * np.exp(-since / decay)


def voice_siren(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """A tone that glides up and down an octave, twice in a second."""
    octaves = SIREN_OCTAVES / 2 * np.sin(2 * np.pi * SIREN_HZ * time.astype(np.float64))
    return np.sin(2 * np.pi * np.cumsum(hz * 2.0**octaves) * float(time[1]))


def voice_organ(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """A steady chord of partials."""
    return sum(
        np.sin(np.float32(2 * np.pi * partial * hz) * time + partial)
        for partial in ORGAN_PARTIALS
        if partial * hz < TOP_HZ
    )


def voice_beep(time: np.ndarray, hz: float, noise_seed: int) -> np.ndarray:
    """A pure tone, on and off."""
    gate = np.clip(0.5 + BEEP_EDGE * np.sin(np.float32(2 * np.pi * BEEPS_A_SECOND) * time), 0, 1)
    return gate * np.sin(np.float32(2 * np.pi * hz) * time)
