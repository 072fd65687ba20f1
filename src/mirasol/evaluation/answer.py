"""Answering questions about clips: one encoding per clip whatever the number of its questions, one clip or a data set,
in one process or several, with the same answers in all."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mirasol.checkpoint import Loaded, load_checkpoint
from mirasol.config.parts import IGNORED_LABEL
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import ClipExamples, Example
from mirasol.data.media_files import open_media_file
from mirasol.errors import BadClip
from mirasol.evaluation.controls import apply_control
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.tokenizer import TextCoder
from mirasol.model.losses import reconstruction_loss
from mirasol.model.mirasol import MirasolNetwork
from mirasol.model.outputs import CACHE, MirasolEncoderOutput
from mirasol.processes import make_process_context

T = TypeVar("T")
MAX_NEW_TOKENS = 16
REPLACEMENT = "\ufffd"  # what bytes that form no complete character decode to
# Log-likelihoods differ in their last bits between batches: digits beyond these decide nothing.
SCORE_DIGITS = 5
PROBABILITY_DIGITS = 4
UNTOUCHED = "test"  # key of the answers to the clip as it is, next to those under each control


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the context, and back in its previous mode after it, errors included."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def generate_answers(
    model: nn.Module,
    processor: TextCoder,
    inputs: Mapping[str, Any],
    prompts: Sequence[str],
    device: torch.device,
) -> list[str]:
    """Answers to a batch of prompts by the model's `generate`, which is what works where processes share the weights.

    inputs: what `generate` takes in addition to the text, on `device`: media tensors or `encoder_outputs`
    prompts: one for each row of the inputs, or the same number for each, row after row
    """
    text = processor.encode_text(list(prompts)).to(device)
    ids = model.generate(**inputs, **text, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
    return [answer.strip() for answer in processor.batch_decode(ids[:, text["decoder_input_ids"].shape[1] :])]


@dataclass(frozen=True)
class Answer:
    """An answer as it was decoded.

    probability: of exactly this answer: the product of the probabilities of its tokens, <eos> included. Each token
        multiplies it by at most 1, so that long answers have lower ones. An answer that was cut off has no <eos>.
    """

    text: str
    probability: float


@torch.inference_mode()
def answer_clips(
    model: MirasolNetwork,
    processor: TextCoder,
    clips: Sequence[Mapping[str, Tensor]],
    prompts: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    streamer: "AnswerStreamer | None" = None,
    encoded: MirasolEncoderOutput | None = None,
) -> list[list[Answer]]:
    """Answers the `prompts` of each of the `clips` (from `MirasolFeatureExtractor.tensors`), greedily.

    The clips are encoded once, as one batch, unless `encoded` is given; all prompts are decoded together. A clip with
    fewer prompts than another repeats its last one to fill the batch; answers to the repeats are dropped.

    streamer: receives the answer of a single prompt, token by token
    """
    assert len(clips) == len(prompts)
    rows = _fill_rows(prompts)
    encoded = encode_clips(model, processor, clips) if encoded is None else encoded
    text = processor.encode_text([prompt for row in rows for prompt in row]).to(model.device)
    ids, log_likelihood = decode_greedily(model, encoded, **text, max_new_tokens=max_new_tokens, streamer=streamer)
    texts, probabilities = processor.batch_decode(ids), log_likelihood.exp().tolist()
    answers = [Answer(text.strip(), probability) for text, probability in zip(texts, probabilities, strict=True)]
    width = len(rows[0])
    return [answers[place * width : place * width + len(row)] for place, row in enumerate(prompts)]


@torch.inference_mode()
def decode_greedily(
    model: nn.Module,
    encoded: MirasolEncoderOutput,
    decoder_input_ids: Int[Tensor, "row token"],
    decoder_attention_mask: Int[Tensor, "row token"],
    max_new_tokens: int,
    streamer: "AnswerStreamer | None" = None,
) -> tuple[Int[Tensor, "row new"], Float[Tensor, " row"]]:
    """The most likely token after each prompt, again and again until <eos> or `max_new_tokens`: the tokens, <pad>
    after <eos>, and the sum of their log-probabilities. The same tokens as `generate` with its default settings, but
    with the probabilities, and without what `generate` imports.
    """
    end, ids, mask, cache = model.config.eos_token_id, decoder_input_ids, decoder_attention_mask, None
    is_open = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    total = torch.zeros(len(ids), device=ids.device)
    written = []
    while len(written) < max_new_tokens and bool(is_open.any()):
        output = model(
            encoder_outputs=encoded, decoder_input_ids=ids, decoder_attention_mask=mask, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        logits, cache = output.logits[:, -1].float(), output[CACHE]
        best = logits.argmax(-1, keepdim=True)
        total += logits.log_softmax(-1).gather(-1, best)[:, 0] * is_open
        ids = best.where(is_open[:, None], model.config.pad_token_id)
        is_open &= ids[:, 0] != end
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        written.append(ids)
        if streamer is not None:
            streamer.put(ids)
    if streamer is not None:
        streamer.end()
    return torch.cat(written, dim=1), total


@torch.inference_mode()
def answer_encoded(
    model: MirasolNetwork,
    processor: TextCoder,
    encoded: MirasolEncoderOutput,
    prompt: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    streamer: "AnswerStreamer | None" = None,
) -> Answer:
    """Answers one prompt about one clip that is encoded already. Raises UserError for a prompt that is too long."""
    text = processor.encode_text([prompt]).to(model.device)
    ids, log_likelihood = decode_greedily(model, encoded, **text, max_new_tokens=max_new_tokens, streamer=streamer)
    return Answer(processor.decode(ids[0]).strip(), float(log_likelihood[0].exp()))


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate answer to one prompt.

    share: softmax over the candidates of their log-likelihood per token, which ranks them; shares sum to 1
    probability: of exactly this answer, as in `Answer`
    """

    text: str
    share: float
    probability: float


@torch.inference_mode()
def rank_candidates(
    model: MirasolNetwork,
    processor: TextCoder,
    encoded: MirasolEncoderOutput,
    prompt: str,
    candidates: Sequence[str],
) -> list[RankedCandidate]:
    """The candidates as answers to one prompt about one encoded clip, the most likely per token first."""
    scores = model.score(encoded, **processor.candidates([prompt], [list(candidates)]).to(model.device))
    shares, totals = scores.per_token[0].softmax(-1).tolist(), scores.total[0].exp().tolist()
    ranked = [RankedCandidate(*each) for each in zip(candidates, shares, totals, strict=True)]
    return sorted(ranked, key=lambda one: -one.share)


@torch.inference_mode()
def encode_clips(
    model: MirasolNetwork, processor: TextCoder, clips: Sequence[Mapping[str, Tensor]]
) -> MirasolEncoderOutput:
    """Encodes the clips as one batch."""
    return model.encode(**processor.feature_extractor.collate(clips).to(model.device))


@torch.inference_mode()
def measure_surprise(
    model: MirasolNetwork,
    processor: TextCoder,
    clip: Mapping[str, Tensor],
    encoded: MirasolEncoderOutput | None = None,
) -> float | None:
    """How far a clip's picture is from what the model expects of it, as the reconstruction loss measures it; None where
    there is no picture to compare. Larger than for any clip like those of training: the clip is of another kind.

    encoded: of this clip alone
    """
    media = processor.feature_extractor.collate([clip]).to(model.device)
    present, settings = media["video_mask"] & media["chunk_mask"], model.config.reconstruction
    if not present[:, 1 if settings.step == "next" else 0 :].any():
        return None
    encoded = model.encode(**media) if encoded is None else encoded
    patches, _ = model.reconstruction(encoded.latents)
    video = media["video"].masked_fill(~present[:, :, None, None, None, None], 0.0)
    target = model.reconstruction.video_target(video)
    return float(reconstruction_loss(patches, target, present, settings.distance, settings.step))


@torch.inference_mode()
def score_clips(
    model: MirasolNetwork,
    processor: TextCoder,
    encoded: MirasolEncoderOutput,
    prompts: Sequence[Sequence[str]],
    candidates: Sequence[Sequence[Sequence[str]]],
) -> list[list[list[float]]]:
    """Log-likelihood per token, <eos> included, of each candidate of each prompt of each clip."""
    rows = _fill_rows(prompts)
    width = len(rows[0])
    lists = [each for row in _fill_rows(candidates) for each in row]
    text = processor.candidates(rows, lists).to(model.device)
    per_token = model.score(encoded, **text).per_token.tolist()
    scores = [row[: len(texts)] for row, texts in zip(per_token, lists, strict=True)]
    return [scores[place * width : place * width + len(row)] for place, row in enumerate(prompts)]


def _fill_rows(rows: Sequence[Sequence[T]]) -> list[list[T]]:
    """Rows of equal length: the last item of a shorter one is repeated."""
    assert all(rows), "every clip needs a prompt"
    width = max(map(len, rows))
    return [[*row, *[row[-1]] * (width - len(row))] for row in rows]


@torch.inference_mode()
def compute_attention_by_chunk(
    model: MirasolNetwork,
    processor: TextCoder,
    clip: Mapping[str, Tensor],
    prompts: Sequence[str],
    answers: Sequence[str],
) -> Float[Tensor, "prompt chunk"]:
    """The decoder's attention to each chunk while it wrote the answers: one row per prompt, shares that sum to 1.

    Cross-attention weights averaged over layers, heads and the positions that predict a token of the answer (its end
    included), summed over the latents of a chunk. Incomplete characters of an answer are left out.
    """
    answers = [answer.replace(REPLACEMENT, "") for answer in answers]
    media = processor.feature_extractor.collate([clip]).to(model.device)
    text = processor.encode_text(list(prompts), list(answers)).to(model.device)
    predicts = (text.pop("labels")[:, 1:] != IGNORED_LABEL).float()
    output = model(encoder_outputs=model.encode(**media), **text, output_attentions=True)
    weights = torch.stack(output.cross_attentions).mean(dim=(0, 2))[:, :-1]
    by_latent = (weights * predicts[:, :, None]).sum(1) / predicts.sum(1, keepdim=True)
    return by_latent.unflatten(1, (len(clip["video_mask"]), -1)).sum(-1).cpu()


class AnswerStreamer:
    """Passes on the text of one answer piece by piece while it is decoded.

    `on_text` receives each new piece. A piece that ends within a character of several bytes is held back until the
    character is complete.
    """

    def __init__(self, processor: TextCoder, on_text: Callable[[str], None]):
        self.processor, self.on_text = processor, on_text
        self.ids: list[int] = []
        self.text = ""

    def put(self, ids: Tensor) -> None:
        """Takes the next token."""
        self.ids.extend(ids.reshape(-1).tolist())
        text = self.processor.decode(self.ids).lstrip()
        if not text.endswith(REPLACEMENT):
            self._show(text)

    def end(self) -> None:
        """Passes on what is left; the next token begins another answer."""
        self._show(self.processor.decode(self.ids).strip())
        self.ids, self.text = [], ""

    def _show(self, text: str) -> None:
        if len(text) > len(self.text):
            self.on_text(text[len(self.text) :])
            self.text = text


@dataclass(frozen=True)
class AnswerSettings:
    """How the questions of a data set are answered.

    root: folder that `media` is relative to
    controls: names of the controls under which each clip is answered again
    classes: candidates of questions without their own
    score_candidates: score the candidates too, where there are any
    max_new_tokens: longest answer
    clips_per_batch, threads, cache: change speed and memory only; `threads` decode the next batch, `cache` is a folder
        of decoded clips as training's `data.cache`, None where every clip is decoded
    """

    root: Path
    controls: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    score_candidates: bool = True
    max_new_tokens: int = MAX_NEW_TOKENS
    clips_per_batch: int = 16
    threads: int = 1
    cache: Path | None = None

    def candidates(self, example: Example) -> tuple[str, ...]:
        """The texts that are scored as answers to the example; none where answers are open."""
        return (example.candidates or self.classes) if self.score_candidates else ()


# One clip's line of the journal: its key, and either the answers under each control or the reason for having none.
ClipRow = dict[str, Any]


def make_clip_key(clip: ClipExamples) -> list[Any]:
    """Identifies a clip within its data set."""
    return [clip.media, clip.start, clip.end]


def answer_in_batches(
    loaded: Loaded,
    clips: Sequence[ClipExamples],
    settings: AnswerSettings,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[ClipRow]]:
    """Answers all questions about the clips; yields the rows of one batch of clips at a time, in order.

    `progress(done, total)` receives numbers of clips.
    """
    size = settings.clips_per_batch
    batches = [clips[first : first + size] for first in range(0, len(clips), size)]
    run = _answer_in_processes if processes > 1 and len(batches) > 1 else _answer_here
    done = 0
    for rows in run(loaded, batches, settings, processes):
        done += len(rows)
        yield rows
        if progress is not None:
            progress(done, len(clips))


def _answer_here(
    loaded: Loaded, batches: Sequence[Sequence[ClipExamples]], settings: AnswerSettings, processes: int
) -> Iterator[list[ClipRow]]:
    """Batch by batch in this process, the next batch being decoded meanwhile."""
    load = _make_loader(loaded, settings)

    def decode(batch: Sequence[ClipExamples]) -> list[Future]:
        return [pool.submit(load, clip) for clip in batch]

    with ThreadPoolExecutor(settings.threads) as pool, eval_mode(loaded.model):
        ahead = decode(batches[0]) if batches else []
        for place, batch in enumerate(batches):
            tensors = [future.result() for future in ahead]
            ahead = decode(batches[place + 1]) if place + 1 < len(batches) else []
            yield _answer_batch(loaded, batch, tensors, settings)


def _answer_in_processes(
    loaded: Loaded, batches: Sequence[Sequence[ClipExamples]], settings: AnswerSettings, processes: int
) -> Iterator[list[ClipRow]]:
    """Each process loads the checkpoint; a batch is one job."""
    threads = torch.get_num_threads()  # the same number in every process: another would round differently
    pool = ProcessPoolExecutor(
        processes, mp_context=make_process_context(), initializer=torch.set_num_threads, initargs=(threads,)
    )
    device = str(loaded.model.device)
    try:
        jobs = [pool.submit(_load_and_answer, str(loaded.folder), device, batch, settings) for batch in batches]
        for job in jobs:
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load_and_answer(
    folder: str, device: str, batch: Sequence[ClipExamples], settings: AnswerSettings
) -> list[ClipRow]:
    loaded = _load_once(folder, device)
    return _answer_batch(loaded, batch, list(map(_make_loader(loaded, settings), batch)), settings)


@lru_cache(maxsize=1)
def _load_once(folder: str, device: str) -> Loaded:
    return load_checkpoint(folder, device)


def load_clip(extractor: MirasolFeatureExtractor, root: Path, clip: ClipExamples | Example) -> dict[str, Tensor]:
    """Decodes a clip below the root to its tensors. Raises BadClip where that is not possible."""
    with open_media_file(root, clip.media) as path:
        return extractor.tensors(extractor.read(path, clip.start, clip.end))


def _make_loader(loaded: Loaded, settings: AnswerSettings) -> Callable[[ClipExamples], dict[str, Tensor] | str]:
    """What gives a clip's tensors, or the reason why they cannot be read."""
    extractor = loaded.processor.feature_extractor
    kept = settings.cache and ClipCache(settings.cache, settings.root, loaded.model.config.media_settings())

    def load(clip: ClipExamples) -> dict[str, Tensor] | str:
        try:
            if kept:
                return kept.load(clip.media, clip.start, clip.end)
            return load_clip(extractor, settings.root, clip)
        except BadClip as error:
            return error.reason

    return load


def _answer_batch(
    loaded: Loaded,
    batch: Sequence[ClipExamples],
    loads: Sequence[Mapping[str, Tensor] | str],
    settings: AnswerSettings,
) -> list[ClipRow]:
    rows: list[ClipRow] = [{"clip": make_clip_key(clip)} for clip in batch]
    usable = [place for place, tensors in enumerate(loads) if not isinstance(tensors, str)]
    for row, tensors in zip(rows, loads, strict=True):
        if isinstance(tensors, str):
            row["reason"] = tensors
        else:
            surprise = measure_surprise(loaded.model, loaded.processor, tensors)
            surprise = None if surprise is None else round(surprise, PROBABILITY_DIGITS)
            row.update(chunks=len(tensors["video_mask"]), surprise=surprise, answered={})
    clips = [batch[place] for place in usable]
    for name in (None, *settings.controls) if usable else ():
        tensors = [apply_control(name, loads[place]) for place in usable]
        for place, answers in zip(usable, _answer_usable(loaded, clips, tensors, settings), strict=True):
            rows[place]["answered"][name or UNTOUCHED] = answers
    return rows


def _answer_usable(
    loaded: Loaded,
    clips: Sequence[ClipExamples],
    tensors: Sequence[Mapping[str, Tensor]],
    settings: AnswerSettings,
) -> list[dict[str, dict[str, Any]]]:
    """For every clip, by question id: `answer` and its `probability`, and `scores` where candidates are scored."""
    model, processor = loaded.model, loaded.processor
    encoded = encode_clips(model, processor, tensors)
    prompts = [[example.prompt for example in clip.examples] for clip in clips]
    found = answer_clips(model, processor, tensors, prompts, max_new_tokens=settings.max_new_tokens, encoded=encoded)
    answers = [
        {
            example.id: {"answer": answer.text, "probability": round(answer.probability, PROBABILITY_DIGITS)}
            for example, answer in zip(clip.examples, row, strict=True)
        }
        for clip, row in zip(clips, found, strict=True)
    ]
    for place, clip in enumerate(clips):
        examples = [example for example in clip.examples if settings.candidates(example)]
        if examples:
            # One clip at a time: a batch would change the last digits of its scores.
            own = encode_clips(model, processor, tensors[place : place + 1]) if len(clips) > 1 else encoded
            candidates = [settings.candidates(example) for example in examples]
            [scores] = score_clips(model, processor, own, [[e.prompt for e in examples]], [candidates])
            for example, row in zip(examples, scores, strict=True):
                answers[place][example.id]["scores"] = [round(score, SCORE_DIGITS) for score in row]
    return answers
