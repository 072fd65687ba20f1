"""Media to model-ready tensors, after the conventions of transformers.

Loading processes import this and not the processor, whose base class brings half of transformers and torch's compiler
along: three seconds and 90 MB for each of them.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor
from transformers import BatchFeature, FeatureExtractionMixin

from mirasol.config.media import MEDIA_SETTINGS, MediaConfig
from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.media.clip import Clip
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.spectrogram import compute_log_mel_chunks
from mirasol.media.timeline import ChunkGrid

_CACHED_VALUES = 2**18  # floats: a megabyte
_SAVED_BESIDE = ("feature_extractor_type", "processor_class", "auto_map")


class MirasolFeatureExtractor(FeatureExtractionMixin):
    """Media to tensors: how clips are cut, how large frames are, what the spectrogram looks like.

    `settings` are the fields of `mirasol.config.media.MediaConfig`, each an attribute of the same name.

    Raises:
        UserError: an unknown setting or an impossible value.
    """

    model_input_names: ClassVar[list[str]] = ["video", "audio", "chunk_mask", "video_mask", "audio_mask"]

    def __init__(self, **settings: Any):
        other_settings = {name: settings.pop(name) for name in list(settings) if name not in MEDIA_SETTINGS}
        for name in other_settings:
            if name not in _SAVED_BESIDE and not name.startswith("_"):
                raise UserError(f"unknown setting {name!r} of MirasolFeatureExtractor")
        super().__init__(**other_settings)
        # transformers saves the attributes of an instance: the settings are attributes, not one object.
        vars(self).update(MediaConfig(**settings).to_dict())
        _ = self.grid  # an impossible grid is refused here, not at the first clip

    @classmethod
    def for_config(cls, config: MirasolConfig) -> "MirasolFeatureExtractor":
        """The feature extractor whose tensors have the shapes that a model of `config` takes."""
        return cls(**config.media_settings())

    @property
    def media(self) -> MediaConfig:
        """The settings as one value."""
        return MediaConfig(**{name: getattr(self, name) for name in MEDIA_SETTINGS})

    @property
    def grid(self) -> ChunkGrid:
        return ChunkGrid(self.frames_per_chunk, self.chunk_seconds, self.num_chunks, self.max_chunks)

    def read(
        self,
        path: str | os.PathLike,
        start: float | None = None,
        end: float | None = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
        threads: int = 1,
    ) -> Clip:
        """Reads [start, end) seconds of a media file (all of it by default), decoded in a process of its own.

        Raises:
            BadClip: the file cannot be used or is over one of the `limits`, see `read_clip`; or it makes the decoder
                crash, stall or take too much memory.
        """
        from mirasol.media.isolation.decoders import run_isolated
        from mirasol.media.isolation.jobs import read_window

        decoded = run_isolated(
            limits,
            path,
            read_window,
            path,
            self.grid,
            image_size=self.image_size,
            sample_rate=self.sample_rate,
            start=start,
            end=end,
            fit=self.fit,
            limits=limits,
            threads=threads,
        )
        return Clip.from_decoded(decoded)

    def make_clip(self, value: Any) -> Clip:
        """A clip of what users have: a path, frames and samples in memory, values of `datasets` (`ClipReader`)."""
        from mirasol.media.inputs.values import ClipReader

        return ClipReader(partial(self.read, threads=0), self.grid, self.media)(value)

    def fetch_audio(self, audio: Any, sampling_rate: int | None = None) -> Any:
        """The audio unchanged: transformers' pipelines would read files here, `make_clip` reads them itself."""
        return audio

    def read_image(
        self, path: str | os.PathLike, *, limits: Limits = DEFAULT_LIMITS
    ) -> UInt8[Tensor, "3 height width"]:
        """Reads an image file in the shape of one video frame. Raises BadClip as `mirasol.media.image.read_image`."""
        from mirasol.media.image import read_image
        from mirasol.media.isolation.decoders import run_isolated

        settings = {"image_size": self.image_size, "fit": self.fit, "limits": limits}
        return torch.from_numpy(run_isolated(limits, path, read_image, path, **settings))

    def tensors(self, clip: Clip) -> dict[str, Tensor]:
        """One clip in its compact form, without a batch axis; what caches store.

        video uint8 [T, F, 3, H, W]; audio float16 [T, S, M], log-mel; video_mask, audio_mask bool [T]. A chunk without
        video (audio) is all zero and False in the mask.
        """
        chunks, frames = clip.timeline.num_chunks, clip.timeline.frames_per_chunk
        if clip.has_video:
            video = clip.frames.unflatten(0, (chunks, frames))
            if not clip.video_present.all():
                video = video * clip.video_present[:, None, None, None, None]
        else:
            video = torch.zeros(chunks, frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
        audio = compute_log_mel_chunks(
            clip.waveform,
            clip.waveform_start,
            clip.sample_rate,
            clip.timeline.edges,
            self.num_mel_bins,
            self.spectrogram_frames,
        )
        audio = (audio * clip.audio_present[:, None, None]).half()
        return {"video": video, "audio": audio, "video_mask": clip.video_present, "audio_mask": clip.audio_present}

    def collate(
        self,
        clips: Sequence[dict[str, Tensor]],
        video: UInt8[Tensor, "batch chunk frame 3 height width"] | None = None,
    ) -> BatchFeature:
        """Batches the results of `tensors`, clips of fewer chunks padded at the end.

        video float32 [B, T, F, 3, H, W], normalised; audio float32 [B, T, S, M]; chunk_mask, video_mask, audio_mask
        bool [B, T]: chunk_mask is False on padding. Absent and padded chunks are zero.

        video: frames that are in a batch already stay as they are, and clips need none of their own. As uint8 they
            travel in a quarter of the bytes, for `normalised` at the place where they are needed.

        Of images, {"image": uint8 [3, H, W]} each, comes images float32 [B, 3, H, W], normalised alike.
        """
        if "image" in clips[0]:
            pictures = torch.stack([clip["image"] for clip in clips])
            present = torch.ones(len(clips), 1, dtype=torch.bool)
            frames = [picture[None, None] for picture in pictures]
            return BatchFeature({"images": self.normalise(frames, present)[:, 0, 0]})
        longest = max(len(clip["video_mask"]) for clip in clips)
        lengths = torch.tensor([len(clip["video_mask"]) for clip in clips])
        padded = {name: _pad([clip[name] for clip in clips], longest) for name in clips[0] if name != "video"}
        if video is None:
            video = self.normalise([clip["video"] for clip in clips], padded["video_mask"])
        return BatchFeature(
            {
                "video": video,
                "audio": padded["audio"].float(),
                "chunk_mask": torch.arange(longest)[None] < lengths[:, None],
                "video_mask": padded["video_mask"],
                "audio_mask": padded["audio_mask"],
            }
        )

    def normalise(
        self, videos: Sequence[UInt8[Tensor, "_ frame 3 height width"]] | Tensor, present: Bool[Tensor, "batch chunk"]
    ) -> Float32[Tensor, "batch chunk frame 3 height width"]:
        """Pixels of each clip to normalised values, straight into the batch, on the device they are on; zeros where no
        video is present.

        A few chunks at a time, because a batch may be hundreds of megabytes, and what stays in the processor's cache
        is soon converted, scaled and shifted. (One operation on mixed types, uint8 * float, takes twice as long.)
        """
        device = videos[0].device
        batch = torch.empty(*present.shape, *videos[0].shape[1:], device=device)
        mean, deviation = self._statistics()
        scale, shift = 1 / (255 * deviation), -mean / deviation
        if isinstance(scale, Tensor):
            scale, shift = scale.float().to(device), shift.float().to(device)
        at_once = max(1, _CACHED_VALUES // videos[0][0].numel()) if device.type == "cpu" else present.shape[1]
        for row, video in zip(batch, videos, strict=True):
            for values, pixels in zip(row[: len(video)].split(at_once), video.split(at_once), strict=True):
                values.copy_(pixels).mul_(scale).add_(shift)
        if device.type != "cpu":
            batch[~present] = 0
            return batch
        # One by one: to set them all by their mask takes as long as to make the values.
        for row, chunk in (~present).nonzero().tolist():
            batch[row, chunk].zero_()
        return batch

    def pixels(self, video: Tensor) -> Tensor:
        """Normalised video (or a reconstruction of it) back to uint8 pixels of the same shape."""
        mean, deviation = self._statistics()
        if isinstance(mean, Tensor):
            mean, deviation = mean.to(video), deviation.to(video)
        return (video * deviation + mean).clamp(0, 1).mul(255).round().to(torch.uint8)

    def _statistics(self) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """Mean and standard deviation: numbers (much the fastest), or [3, 1, 1] in float64 where channels differ."""
        if not isinstance(self.image_mean, tuple) and not isinstance(self.image_std, tuple):
            return self.image_mean, self.image_std
        both = (torch.tensor(values, dtype=torch.float64) for values in (self.image_mean, self.image_std))
        return tuple(values.expand(3).reshape(3, 1, 1) for values in both)

    def __call__(self, clips: Any, return_tensors: str = "pt") -> BatchFeature:
        """One clip or a list of them, all that `make_clip` takes, to one batch of tensors (see `collate`)."""
        raise_if_not_torch(return_tensors)
        clips = list(clips) if isinstance(clips, list | tuple) else [clips]
        return self.collate([self.tensors(self.make_clip(clip)) for clip in clips])


def _pad(tensors: list[Tensor], length: int) -> Tensor:
    """Stacks tensors [T, ...] of different T, zeros at the end."""
    batch = tensors[0].new_zeros(len(tensors), length, *tensors[0].shape[1:])
    for row, tensor in zip(batch, tensors, strict=True):
        row[: len(tensor)] = tensor
    return batch


def raise_if_not_torch(return_tensors: str) -> None:
    """Raises UserError for tensors of another library."""
    if return_tensors != "pt":
        raise UserError(f"return_tensors={return_tensors!r}: Mirasol gives torch tensors, 'pt'")
