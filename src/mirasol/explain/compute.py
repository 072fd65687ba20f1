"""`explain`: one clip, one question, and arrays of what the model does with them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.evaluation.answer import MAX_NEW_TOKENS, decode_greedily, eval_mode
from mirasol.evaluation.one_clip import reconstruct_clip
from mirasol.explain.occlusion import Occlusion, occlude_chunks
from mirasol.explain.reading import CombinerReading, read_combiner
from mirasol.explain.recording import record_attention
from mirasol.media.clip import Clip
from mirasol.media.tokenizer import TextCoder
from mirasol.model.masks import mark_latents
from mirasol.model.mirasol import MirasolNetwork
from mirasol.model.outputs import MirasolEncoderOutput


@dataclass(frozen=True)
class Explanation:
    """A clip of T chunks, a question about it, and what the model did with them.

    prompt, answer: the question, and the answer that is explained
    tokens: the answer's tokens as text, <eos> included unless the answer was cut off
    token_log_likelihood: of each token after those before it, natural logarithm
    edges: of the chunks, seconds
    frames: of each chunk, RGB; None without video
    frame_times: when each of them is on show in the file, seconds
    waveform: mono samples in about [-1, 1], the first at second `waveform_start`; None without sound
    sample_rate: Hz
    spectrogram: log-mel; None without sound
    video_present, audio_present: which chunks have a picture, a sound
    cross_attention: of the text decoder while it predicted each token, over the m latents of every chunk, mean over
        heads; for each layer and token it sums to 1
    reading: what each chunk's features x read
    tubes: of each video token the box in its chunk: first and end frame, first and end row, first and end column
        (pixels of `frames`)
    patches: of each audio token the box in its chunk's spectrogram: first and end frame, first and end mel band
    expected: the model's pictures of the chunks from `first_expected` on: each expected from the chunks before it
        (`first_expected` is 1), or reconstructed with the chunk itself known (0)
    occlusion: the answer's log-likelihood with a chunk's picture or sound taken away
    """

    prompt: str
    answer: str
    tokens: tuple[str, ...]
    token_log_likelihood: Float[np.ndarray, " token"]
    edges: Float64[np.ndarray, " edge"]
    frames: UInt8[np.ndarray, "chunk frame height width 3"] | None
    frame_times: Float64[np.ndarray, "chunk frame"] | None
    waveform: Float[np.ndarray, " sample"] | None
    waveform_start: float
    sample_rate: int
    spectrogram: Float[np.ndarray, "chunk mel_frame mel"] | None
    video_present: Bool[np.ndarray, " chunk"]
    audio_present: Bool[np.ndarray, " chunk"]
    cross_attention: Float[np.ndarray, "layer token chunk m"]
    reading: CombinerReading
    tubes: Int[np.ndarray, "video_token 6"]
    patches: Int[np.ndarray, "audio_token 4"]
    expected: UInt8[np.ndarray, "expected frame expected_height expected_width 3"]
    first_expected: int
    occlusion: Occlusion

    @property
    def chunks(self) -> int:
        """Number of chunks, T."""
        return len(self.edges) - 1

    def find_decisive_chunk(self) -> int:
        """The chunk, from 0, without whose picture or sound the answer's log-likelihood falls most; where neither is
        there to take away, the last."""
        losses = self.occlusion.losses
        if np.isnan(losses).all():
            return self.chunks - 1
        return int(np.unravel_index(np.nanargmax(losses), losses.shape)[1])


@torch.inference_mode()
def explain(
    model: MirasolNetwork,
    processor: TextCoder,
    clip: Clip,
    prompt: str,
    *,
    answer: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    clips_at_once: int | None = None,
) -> Explanation:
    """What the model does with a clip (from `MirasolFeatureExtractor.read`) and a question about it.

    answer: the answer to explain; by default the one that the model gives
    clips_at_once: how many variants of the clip share a pass of the occlusion, which bounds its memory

    Raises:
        UserError: an empty or too long question or answer, or a Combiner that cannot be explained.
    """
    for name, text in (("question", prompt), ("answer", answer)):
        if text is not None and not text.strip():
            raise UserError(f"{name} {text!r}: is empty: give its words")
    extractor = processor.feature_extractor
    tensors = extractor.tensors(clip)
    with eval_mode(model):
        media = extractor.collate([tensors]).to(model.device)
        masks = media["video_mask"], media["audio_mask"]
        features = model.chunk_encoder(media["video"], media["audio"], *masks)
        reading, x = read_combiner(model.combiner, model.config.combiner.kind, *features)
        h = model.latent(x)
        latent_mask = mark_latents(media["chunk_mask"], h.shape[2], model.config.text.window)
        encoded = MirasolEncoderOutput(h.flatten(1, 2), latent_mask, x)
        ids, count = _choose_answer(model, processor, encoded, prompt, answer, max_new_tokens)
        cross, log_likelihood = _read_text(model, encoded, ids, count)
        occlusion = occlude_chunks(model, features, masks[0][0], masks[1][0], ids, count, clips_at_once)
        expected = reconstruct_clip(model, processor, encoded)
    return Explanation(
        prompt=prompt,
        answer=processor.decode(ids[0, -count:]).strip() if answer is None else answer,
        tokens=tuple(_name_token(processor, token) for token in ids[0, -count:].tolist()),
        token_log_likelihood=log_likelihood,
        **_describe_media(clip, tensors),
        cross_attention=cross,
        reading=reading,
        tubes=find_tube_boxes(model.config),
        patches=find_patch_boxes(model.config),
        expected=expected,
        first_expected=clip.timeline.num_chunks - len(expected),
        occlusion=occlusion,
    )


def _choose_answer(
    model: MirasolNetwork,
    processor: TextCoder,
    encoded: MirasolEncoderOutput,
    prompt: str,
    answer: str | None,
    max_new_tokens: int,
) -> tuple[Int[Tensor, "1 token"], int]:
    """The ids of prompt and answer, and how many of them are the answer's."""
    text = processor.encode_text([prompt]).to(model.device)
    if answer is None:
        ids, _ = decode_greedily(model, encoded, **text, max_new_tokens=max_new_tokens)
        return torch.cat([text["decoder_input_ids"], ids], dim=1), ids.shape[1]
    complete = processor.encode_text([prompt], [answer])["decoder_input_ids"].to(model.device)
    return complete, complete.shape[1] - text["decoder_input_ids"].shape[1]


def _read_text(
    model: MirasolNetwork, encoded: MirasolEncoderOutput, ids: Int[Tensor, "1 token"], count: int
) -> tuple[Float[np.ndarray, "layer token chunk m"], Float[np.ndarray, " token"]]:
    """Cross-attention while each token of the answer was predicted, and the tokens' log-likelihoods."""
    layers = [block.cross_attention for block in model.text.blocks if block.cross_attention is not None]
    with record_attention(layers) as weights:
        logits = model(encoder_outputs=encoded, decoder_input_ids=ids[:, :-1]).logits
    shape = encoded.combined.shape[1:3]
    cross = torch.stack([layer[0, -count:].unflatten(1, shape) for layer in weights])
    likelihood = logits[0, -count:].float().log_softmax(-1).gather(-1, ids[0, -count:, None])[:, 0]
    return cross.cpu().numpy(), likelihood.cpu().numpy()


def _name_token(processor: TextCoder, token: int) -> str:
    """A token's text as it stands within a sentence; that of a special one is its name."""
    if token in processor.tokenizer.all_special_ids:
        return processor.tokenizer.convert_ids_to_tokens(token)
    return processor.tokenizer.decode([token])


def _describe_media(clip: Clip, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The fields of `Explanation` that show the clip itself."""
    chunks, frames = clip.timeline.num_chunks, clip.timeline.frames_per_chunk
    return {
        "edges": np.array(clip.timeline.edges, dtype=np.float64),
        "frames": tensors["video"].permute(0, 1, 3, 4, 2).contiguous().numpy() if clip.has_video else None,
        "frame_times": clip.frame_times.reshape(chunks, frames).double().numpy() if clip.has_video else None,
        "waveform": clip.waveform.float().numpy() if clip.has_audio else None,
        "waveform_start": float(clip.waveform_start),
        "sample_rate": clip.sample_rate,
        "spectrogram": tensors["audio"].float().numpy() if clip.has_audio else None,
        "video_present": clip.video_present.numpy(),
        "audio_present": clip.audio_present.numpy(),
    }


def find_tube_boxes(config: MirasolConfig) -> Int[np.ndarray, "video_token 6"]:
    """The box of every video token in its chunk, see `Explanation.tubes`."""
    boxes = []
    for tube in config.video.tubes:
        grid = tube.grid(config.video.frames_per_chunk, config.video.image_size)
        steps = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)
        first = np.array(tube.offset) + steps * np.array(tube.stride)
        boxes.append(np.stack([first, first + np.array(tube.kernel)], axis=2).reshape(-1, 6))
    return np.concatenate(boxes)


def find_patch_boxes(config: MirasolConfig) -> Int[np.ndarray, "audio_token 4"]:
    """The box of every audio token in its chunk's spectrogram, see `Explanation.patches`."""
    audio = config.audio
    frames, mels = audio.patch
    grid = audio.spectrogram_frames // frames, audio.num_mel_bins // mels
    steps = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 2)
    first = steps * np.array(audio.patch)
    return np.stack([first, first + np.array(audio.patch)], axis=2).reshape(-1, 4)
