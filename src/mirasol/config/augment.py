"""How training changes clips: the settings of `mirasol.media.augment`."""

import math
from dataclasses import dataclass, field

from mirasol.errors import UserError


def compute_shift_step(frames_per_chunk: int, spectrogram_frames: int) -> int:
    """The fewest frames that last a whole number of mel frames."""
    return frames_per_chunk // math.gcd(frames_per_chunk, spectrogram_frames)


@dataclass(frozen=True)
class SpecAugment:
    """Bands of the log-mel spectrogram that training hides (Park et al., 2019), over all chunks of a clip.

    frequency_masks, time_masks: how many; the width of each is drawn at random, up to
    frequency_width: mel bins, time_width: mel frames
    time_share: no time mask is wider than this share of the clip
    """

    frequency_masks: int = 0
    frequency_width: int = 48
    time_masks: int = 0
    time_width: int = 48
    time_share: float = 1.0

    def __post_init__(self):
        for name in ("frequency_masks", "time_masks"):
            if getattr(self, name) < 0:
                raise UserError(f"spec_augment.{name}={getattr(self, name)} must not be negative")
        for name in ("frequency_width", "time_width"):
            if getattr(self, name) < 1:
                raise UserError(f"spec_augment.{name}={getattr(self, name)} must be at least 1: 0 masks turn it off")
        if not 0 < self.time_share <= 1:
            raise UserError(f"spec_augment.time_share={self.time_share} must be in (0, 1]")
        for masks, names in (("frequency_masks", ["frequency_width"]), ("time_masks", ["time_width", "time_share"])):
            for name in names:
                if not getattr(self, masks) and getattr(self, name) != getattr(SpecAugment, name):
                    given = f"spec_augment.{name}={getattr(self, name)}"
                    raise UserError(f"{given} has no effect without {masks}: set spec_augment.{masks}")


@dataclass(frozen=True)
class Augment:
    """How clips are changed while training. Everything is off by default.

    spec_augment: bands of the spectrogram to hide
    mixup: alpha of the Beta distribution of a clip's share when two clips are mixed; 0: none
    crop: least share of the picture's area that a random crop keeps; 1: none
    flip: share of clips whose frames are mirrored; for questions about left and right use
    flip_except: words; a clip is not mirrored if an example of the stage has one in its question or answers
    time_shift: most frames by which picture and sound are moved together, earlier or later; a clip is never moved by
        more than half of its length
    """

    spec_augment: SpecAugment = field(default_factory=SpecAugment)
    mixup: float = 0.0
    crop: float = 1.0
    flip: float = 0.0
    flip_except: list[str] = field(default_factory=list)
    time_shift: int = 0

    def __post_init__(self):
        if not 0 <= self.mixup < math.inf:
            raise UserError(f"augment.mixup={self.mixup} must be at least 0 and finite")
        if not 0 < self.crop <= 1:
            raise UserError(f"augment.crop={self.crop} must be a share of the picture in (0, 1]; 1 crops nothing")
        if not 0 <= self.flip <= 1:
            raise UserError(f"augment.flip={self.flip} must be a share of the clips in [0, 1]")
        if self.flip_except and not self.flip:
            raise UserError(f"augment.flip_except={self.flip_except} has no effect without flip: set augment.flip")
        if not all(word.strip() for word in self.flip_except):
            raise UserError(f"augment.flip_except={self.flip_except}: a word must not be empty")
        if self.time_shift < 0:
            raise UserError(f"augment.time_shift={self.time_shift} must not be negative: it is a distance in frames")

    def check_fits(
        self, where: str, num_mel_bins: int, frames_per_chunk: int, spectrogram_frames: int, chunks: int
    ) -> None:
        """Raises UserError, its keys preceded by `where`, for what clips of up to `chunks` chunks cannot be given."""
        masks = self.spec_augment
        if masks.frequency_masks and masks.frequency_width > num_mel_bins:
            raise UserError(
                f"{where}augment.spec_augment.frequency_width={masks.frequency_width} exceeds the model's "
                f"{num_mel_bins} mel bins (audio.num_mel_bins)"
            )
        step = compute_shift_step(frames_per_chunk, spectrogram_frames)
        if 0 < self.time_shift < step:
            raise UserError(
                f"{where}augment.time_shift={self.time_shift} has no effect: with {spectrogram_frames} mel frames for "
                f"{frames_per_chunk} frames of a chunk, picture and sound stay aligned in steps of {step} frames only"
            )
        if 2 * self.time_shift > chunks * frames_per_chunk:
            raise UserError(
                f"{where}augment.time_shift={self.time_shift} exceeds half of the longest clip, which has {chunks} "
                f"chunks of {frames_per_chunk} frames: no clip is moved further than half of its length"
            )
