"""Questions about a source that goes on: a model that has seen each chunk once, and can be asked at any moment."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirasol.app.live.chunks import LiveChunk
from mirasol.app.live.features import compute_chunk_tensors
from mirasol.checkpoint import Doubt, Loaded
from mirasol.evaluation.answer import answer_encoded, measure_surprise, rank_candidates
from mirasol.model.outputs import MirasolEncoderOutput
from mirasol.model.streaming import MirasolStream


@dataclass(frozen=True)
class Said:
    """An answer at a moment.

    second: end of the newest chunk, from where watching began; source_second: by the source's own clock
    not_sure: None where nobody has measured when the checkpoint is unsure
    changed: whether it is another answer than the last one to this question
    latency: seconds from the arrival of the newest picture or sound to the first token of the answer
    """

    second: float
    source_second: float
    question: str
    answer: str
    probability: float
    not_sure: bool | None
    changed: bool
    latency: float


SURPRISE_CHUNKS = 64  # how far back a source is looked at to see whether it is of another kind


class FirstToken:
    """Notes when an answer begins; in the place of a streamer."""

    def __init__(self):
        self.time: float | None = None

    def put(self, ids: Tensor) -> None:
        self.time = self.time or time.monotonic()

    def end(self) -> None:
        pass


def _keep_newest(encoded: MirasolEncoderOutput, chunks: int) -> MirasolEncoderOutput:
    """The last chunks of what was encoded."""
    latents = chunks * encoded.combined.shape[2]
    return MirasolEncoderOutput(
        encoded.last_hidden_state[:, -latents:], encoded.latent_mask[:, -latents:], encoded.combined[:, -chunks:]
    )


class Watcher:
    """A loaded checkpoint that sees a source chunk by chunk and answers the same questions again and again.

    window: chunks that it remembers, which bounds what it keeps of a source; None for all
    candidates: answers to choose from, the same for all questions; none: free answers
    """

    def __init__(
        self,
        loaded: Loaded,
        questions: Sequence[str],
        doubt: Doubt | None,
        *,
        window: int | None,
        max_new_tokens: int = 32,
        candidates: Sequence[str] = (),
    ):
        self.loaded, self.questions, self.doubt = loaded, tuple(questions), doubt
        self.max_new_tokens, self.candidates = max_new_tokens, tuple(candidates)
        self.extractor = loaded.processor.feature_extractor
        self.stream = MirasolStream(loaded.model, window=window)
        self.newest: LiveChunk | None = None
        self._arrived = 0.0
        self._recent: deque[dict[str, Tensor]] = deque(maxlen=min(window or SURPRISE_CHUNKS, SURPRISE_CHUNKS))
        self._answers: dict[str, tuple[str, bool | None]] = {}

    @property
    def state_bytes(self) -> int:
        """What is kept of the source: the stream's state and the chunks in the window."""
        media = {tensor.data_ptr(): tensor.nbytes for chunk in self._recent for tensor in chunk.values()}
        return sum(self.stream.state_bytes.values()) + sum(media.values())

    def append(self, chunk: LiveChunk) -> None:
        """Sees one more chunk. One without content is cheap: nothing of it is encoded."""
        self.newest = chunk
        self._arrived = chunk.arrived
        if not (chunk.has_video or chunk.has_audio):
            self._recent.append(self._make_empty())
            self.stream.append(None, None)
            return
        tensors = compute_chunk_tensors(self.extractor, chunk)
        batch = self.extractor.collate([tensors]).to(self.loaded.model.device)
        self._recent.append(tensors)
        names = ("video", "audio", "video_mask", "audio_mask")
        self.stream.append(*(batch[name][:, 0] for name in names))

    def _make_empty(self) -> dict[str, Tensor]:
        """The tensors of a chunk without content; one zero stands for all."""
        media, none = self.extractor, torch.zeros(1, dtype=torch.bool)
        size = media.image_size
        return {
            "video": torch.zeros(1, dtype=torch.uint8).expand(1, media.frames_per_chunk, 3, size, size),
            "audio": torch.zeros(1, dtype=torch.float16).expand(1, media.spectrogram_frames, media.num_mel_bins),
            "video_mask": none,
            "audio_mask": none,
        }

    def measure_surprise(self, encoded: MirasolEncoderOutput) -> float | None:
        """How strange the newest chunks are; None where it makes no difference."""
        if self.doubt is None or self.doubt.highest_surprise is None:
            return None
        encoded = _keep_newest(encoded, len(self._recent))
        names = self._recent[0].keys()
        clip = {name: torch.cat([chunk[name] for chunk in self._recent]) for name in names}
        return measure_surprise(self.loaded.model, self.loaded.processor, clip, encoded)

    def ask(self) -> list[Said]:
        """Answers all questions about what has been seen so far. Raises UserError before the first chunk."""
        encoded = self.stream.encoder_outputs
        surprise = self.measure_surprise(encoded)
        return [self._answer(question, encoded, surprise) for question in self.questions]

    def _answer(self, question: str, encoded: MirasolEncoderOutput, surprise: float | None) -> Said:
        model, processor, first = self.loaded.model, self.loaded.processor, FirstToken()
        strange = None if self.doubt is None else self.doubt.is_strange(surprise)
        if self.candidates:
            best = rank_candidates(model, processor, encoded, question, self.candidates)[0]
            text, probability, not_sure = best.text, best.share, strange
            first.put(encoded.latent_mask)
        else:
            answer = answer_encoded(model, processor, encoded, question, self.max_new_tokens, first)
            text, probability, not_sure = answer.text, answer.probability, strange
            if self.doubt is not None:
                not_sure = strange or probability < self.doubt.threshold
        changed = self._answers.get(question) != (text, not_sure)
        self._answers[question] = text, not_sure
        newest = self.newest
        length = newest.end - newest.start
        return Said(
            second=newest.end,
            source_second=newest.source_start + length,
            question=question,
            answer=text,
            probability=probability,
            not_sure=not_sure,
            changed=changed,
            latency=first.time - self._arrived,
        )
