"""A clip as users have it → a `Clip`: a path, frames and samples in memory, values of `datasets`, decoders."""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mirasol.config.media import MediaConfig
from mirasol.errors import UserError
from mirasol.media.clip import Clip
from mirasol.media.inputs.arguments import find_file, is_file
from mirasol.media.inputs.arrays import Pictures, Sound, make_clip, make_pictures, make_sound, replace_sound
from mirasol.media.timeline import ChunkGrid

Read = Callable[[str | os.PathLike], Clip]
PARTS = ("video", "audio", "fps", "times", "sampling_rate")
_KNOWN = "a path, a Clip, or a mapping with video and audio"


class ClipReader:
    """Makes clips of values. `read`: reads a media file. grid, media: of the model.

    A value is a `Clip`; a path; a mapping with `video` (a path, frames in memory with `fps` or `times`, a value of
    `datasets.Video`) and `audio` (a path, samples with `sampling_rate`, a value of `datasets.Audio`); such a value of
    `datasets` alone; or a decoder of torchcodec. Sound that is given replaces that of a video's file.
    """

    def __init__(self, read: Read, grid: ChunkGrid, media: MediaConfig):
        self.read, self.grid, self.media = read, grid, media

    def __call__(self, value: Any) -> Clip:
        """Raises UserError for a value of another kind, BadClip for a file that cannot be used."""
        if isinstance(value, Clip):
            return value
        if is_file(value):
            return self._read_file(value)
        if isinstance(value, Mapping) and ("video" in value or "audio" in value) and "array" not in value:
            if unknown := [key for key in value if key not in PARTS]:
                raise UserError(f"unknown key {unknown[0]!r} of a clip: choose among {', '.join(PARTS)}")
            return self._join(**value)
        if hasattr(value, "get_all_samples") or (isinstance(value, Mapping) and "array" in value):
            return self._join(audio=value)
        if hasattr(value, "get_frames_played_at"):
            return self._join(video=value)
        raise UserError(f"a clip of type {type(value).__name__}: give {_KNOWN}")

    def _join(
        self,
        video: Any = None,
        audio: Any = None,
        fps: float | None = None,
        times: Any = None,
        sampling_rate: float | None = None,
    ) -> Clip:
        if video is None and audio is None:
            raise UserError("a clip without video and audio: give at least one of them")
        seen = None if video is None else self._find_pictures(video, fps, times)
        heard = None if audio is None else self._find_sound(audio, sampling_rate)
        if isinstance(seen, Clip) and heard is not None:
            had = ("the sound of the video's file is replaced by the audio given",) if seen.has_audio else ()
            return replace_sound(replace(seen, notes=seen.notes + had), heard)
        return seen if isinstance(seen, Clip) else make_clip(seen, heard, self.grid, self.media)

    def _find_pictures(self, video: Any, fps: float | None, times: Any) -> Pictures | Clip:
        if isinstance(video, Clip):
            return video
        if is_file(video):
            if fps is not None or times is not None:
                raise UserError(f"fps={fps}, times={times}: a video's file has its own times, leave them out")
            return self._read_file(video)
        if hasattr(video, "get_frames_played_at"):
            return self._decode(video)
        if isinstance(video, Mapping) or not hasattr(video, "__len__"):
            raise UserError(f"video of type {type(video).__name__}: give a path, frames, or a value of datasets.Video")
        return make_pictures(video, fps, times)

    def _decode(self, decoder: Any) -> Pictures:
        """All frames of a torchcodec decoder, with their times."""
        last = decoder.metadata.end_stream_seconds
        batch = decoder.get_frames_in_range(0, len(decoder))
        made = make_pictures(batch.data, times=batch.pts_seconds.tolist())
        return made if last is None else replace(made, end=max(float(last), made.end))

    def _find_sound(self, audio: Any, sampling_rate: float | None) -> Sound:
        if is_file(audio):
            clip = self._read_file(audio)
            if not clip.has_audio:
                raise UserError(f"{_describe(audio)}: given as audio, but contains none")
            return Sound(clip.waveform.numpy(), clip.sample_rate, clip.waveform_start)
        if hasattr(audio, "get_all_samples"):
            samples = audio.get_all_samples()
            return replace(make_sound(samples.data, samples.sample_rate), start=max(0.0, float(samples.pts_seconds)))
        if isinstance(audio, Mapping) and "array" in audio:
            return make_sound(audio["array"], audio.get("sampling_rate", sampling_rate))
        if isinstance(audio, tuple) and len(audio) == 2:
            return make_sound(*audio)
        if isinstance(audio, Mapping) or not hasattr(audio, "__len__"):
            raise UserError(f"audio of type {type(audio).__name__}: give a path, samples, or a value of datasets.Audio")
        return make_sound(audio, sampling_rate)

    def _read_file(self, value: Any) -> Clip:
        path, content = find_file(value)
        if content is None:
            return self.read(path)
        with tempfile.NamedTemporaryFile(prefix="mirasol-") as file:
            file.write(content)
            file.flush()
            return self.read(file.name)


def _describe(value: Any) -> str:
    path, _ = find_file(value)
    return "bytes" if path is None else str(path)
