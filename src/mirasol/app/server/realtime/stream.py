"""A session's stream of chunks: each is encoded once, in the thread of the model."""

import threading
import time
from collections.abc import Callable
from typing import Any

from mirasol.app.live.chunks import LiveChunk, LiveSettings
from mirasol.app.live.features import compute_chunk_tensors
from mirasol.app.live.reader import LiveReader
from mirasol.app.live.source import LiveSource
from mirasol.app.server.answerer import Answerer, Stopping
from mirasol.app.server.realtime.arrays import ArrayChunks
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.settings import Caps
from mirasol.errors import UserError
from mirasol.model.outputs import MirasolEncoderOutput

ENCODED, RAW = "encoded", "raw"
LOOK_SECONDS = 0.25


class SessionStream:
    """What a session has been sent, as the model keeps it.

    tell: receives an event for each chunk, from another thread. window: how many chunks are looked back over
    drop: whether chunks of a recording lose their content while more than a few of them wait for the model
    """

    def __init__(
        self, answerer: Answerer, caps: Caps, window: int, tell: Callable[[dict[str, Any]], None], drop: bool = False
    ):
        media = answerer.processor.feature_extractor.media
        if media.chunk_seconds is None:
            raise Refusal(400, "this checkpoint cuts clips into a number of chunks: it has no realtime", "no_realtime")
        self.answerer, self.caps, self.tell, self.media, self.drop = answerer, caps, tell, media, drop
        self.stream = answerer.model.stream(window=window)
        self.kind: str | None = None
        self.reader: LiveReader | None = None
        self.arrays = ArrayChunks(media, media.chunk_seconds)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self.is_closed = False

    @property
    def chunks(self) -> int:
        """Chunks encoded so far."""
        return self.stream.chunks

    def append(self, content: bytes) -> None:
        """Takes more of a recording. Waits while the model is behind. Raises Refusal (422) after its end."""
        self._choose(ENCODED)
        self._start_reader()
        try:
            self.reader.append(content)
        except (OSError, TypeError) as error:  # the second one where it ends in the midst of this
            raise Refusal(422, "the media has ended, or cannot be read", "unusable_media") from error

    def _start_reader(self) -> None:
        """Starts what reads the recording, once, and not any more after `close`, which may be called meanwhile."""
        with self._starting:
            if self.is_closed:
                raise Refusal(422, "the session has ended", "unusable_media")
            if self.reader is None:
                drop, limits = self.drop, self.caps.media_limits
                settings = LiveSettings(self.media, drop=drop, retries=0, stall=10**6, limits=limits)
                self.reader = LiveReader(LiveSource("bytes", ""), settings)
                self._thread = threading.Thread(target=self._read, name="session", daemon=True)
                self._thread.start()

    def append_frame(self, frame: Any, second: float) -> None:
        """Takes a picture. Raises UserError."""
        self._choose(RAW)
        self.arrays.append_frame(frame, second)
        self._encode_complete()

    def append_sound(self, samples: Any, rate: int, second: float | None) -> None:
        """Takes more of the sound. Raises UserError."""
        self._choose(RAW)
        self.arrays.append_sound(samples, rate, second)
        self._encode_complete()

    def end(self) -> None:
        """Nothing more comes: the last chunks are made of what there is."""
        if self.kind == RAW:
            self.arrays.end()
            self._encode_complete()
            self.tell({"type": "media.ended", "reason": ""})
        elif self.reader is not None:
            self.reader.end()

    def close(self) -> None:
        """Ends whatever reads."""
        with self._starting:
            self.is_closed = True
        if self._thread is not None:
            self._thread.join(self.caps.max_decode_seconds)

    def take_outputs(self) -> MirasolEncoderOutput | None:
        """What questions are asked of now; None before the first chunk. In the thread of the model."""
        if not self.stream.chunks:
            return None
        outputs = self.stream.encoder_outputs
        return MirasolEncoderOutput(outputs.last_hidden_state.clone(), outputs.latent_mask)

    def _choose(self, kind: str) -> None:
        if self.kind not in (None, kind):
            raise Refusal(400, f"this session has begun with {self.kind} media: open another one", "mixed_media")
        self.kind = kind

    def _read(self) -> None:
        """Reads the appended bytes until they end; in a thread of its own."""
        reason = ""
        try:
            with self.reader as reader:
                while reader.ended is None and not self.is_closed:
                    for chunk in reader.poll(LOOK_SECONDS):
                        self._encode(chunk)
                    self._tell_notes(reader)
                if self.is_closed:
                    return
                self._tell_notes(reader)
                reason = reader.ended or ""
        except Stopping:
            return
        except UserError as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}"
        self.tell({"type": "media.ended", "reason": reason.replace("standard input", "the media")[:500]})

    def _tell_notes(self, reader: LiveReader) -> None:
        while reader.notes:
            self.tell({"type": "note", "message": reader.notes.pop(0)[:500]})

    def _encode_complete(self) -> None:
        for chunk in self.arrays.take():
            self._encode(chunk)

    def _encode(self, chunk: LiveChunk) -> None:
        """Encodes a chunk and tells of it."""
        extractor = self.answerer.processor.feature_extractor
        tensors = extractor.collate([compute_chunk_tensors(extractor, chunk)])
        state = self.answerer.run(self._append, tensors).result()
        self.tell(
            {
                "type": "chunk.encoded", "chunk": chunk.number, "start": chunk.start, "end": chunk.end,
                "video": chunk.has_video, "audio": chunk.has_audio, "missing": chunk.missing, "state_bytes": state,
                "seconds": round(time.monotonic() - chunk.arrived, 4),
            }
        )  # fmt: skip

    def _append(self, tensors: Any) -> int:
        """Appends a chunk, and returns the bytes of the state. In the thread of the model."""
        media = {name: tensors[name][:, 0].to(self.answerer.model.device) for name in ("video", "audio")}
        masks = {name: tensors[name][:, 0] for name in ("video_mask", "audio_mask")}
        self.stream.append(**media, **masks)
        return sum(self.stream.state_bytes.values())
