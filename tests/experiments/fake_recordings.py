"""Small folders laid out as the public data sets are: tones in place of sounds, as untidy as life."""

import wave
from pathlib import Path

import numpy as np
from media_making import Audio, tone, write_media

CLASSES = ("001 - Dog bark", "002 - Rain")


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 30_000).astype("<i2").tobytes())


def make_esc10(root: Path, folds: int = 3, each: int = 2) -> Path:
    """A low tone for the first class, a high one for the second, at odd rates; an empty file, wrong names, a note."""
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for fold in range(1, folds + 1):
            for take in range(each):
                rate = (44_100, 22_050, 11_025)[fold % 3]
                sound = tone(0.6 + 0.1 * take, rate, 200.0 + 1500.0 * number + 10 * take + fold)
                write_wav(root / name / f"{fold}-{1000 * (number + 1) + 10 * fold + take}-A.wav", sound[0], rate)
    write_media(root / CLASSES[0] / "1-77-A.ogg", Audio([(0.0, tone(0.5, 48_000, 205.0))], 48_000, "libopus"))
    (root / CLASSES[1] / "2-88-A.ogg").touch()
    (root / CLASSES[1] / "rain (copy).ogg").write_bytes(b"OggS")
    (root / CLASSES[1] / ".DS_Store").touch()
    (root / "notes").mkdir()
    (root / "notes" / "1-5-A.wav").write_bytes(b"RIFF")
    return root


def make_spoken_digits(root: Path, speakers: tuple[str, ...] = ("anna", "bert", "carl"), takes: int = 1) -> Path:
    """A tone for each digit, its height the digit's and the speaker's; an empty file, one of another name, one of a
    recording too long for a second."""
    root.mkdir(parents=True)
    for digit in range(10):
        for place, speaker in enumerate(speakers):
            for take in range(takes):
                rate = (8_000, 11_025, 48_000)[place % 3]
                sound = tone(0.3, rate, 300.0 + 150 * digit + 15 * place + 3 * take)
                write_wav(root / f"{digit}_{speaker}_{take}.wav", sound[0], rate)
    (root / "3_anna_77.wav").touch()
    (root / "README.md").write_text("spoken digits")
    write_wav(root / "4_anna_78.wav", tone(1.4, 8_000)[0], 8_000)
    return root
