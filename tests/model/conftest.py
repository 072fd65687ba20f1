"""Fixtures for the model's tests: a small config, a model, and a batch that mixes everything a batch may mix."""

import copy

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration


@pytest.fixture(scope="session")
def config() -> MirasolConfig:
    return MirasolConfig.preset("tiny", text={"vocab_size": 40})


@pytest.fixture
def model(config) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(copy.deepcopy(config)).eval()


@pytest.fixture
def batch(config) -> dict[str, torch.Tensor]:
    """Three clips: 4 chunks with both modalities, 2 chunks without audio, 3 chunks without video; 2 prompts each."""
    generator = torch.Generator().manual_seed(1)
    clips, chunks, rows, length = 3, 4, 6, 7
    video, audio = config.video, config.audio
    chunk_mask = torch.arange(chunks) < torch.tensor([4, 2, 3])[:, None]
    video_mask, audio_mask = chunk_mask.clone(), chunk_mask.clone()
    audio_mask[1], video_mask[2] = False, False
    ids = torch.randint(5, config.text.vocab_size, (rows, length), generator=generator)
    ids[:, 0] = config.bos_token_id
    mask = torch.ones(rows, length, dtype=torch.long)
    labels = ids.clone()
    labels[:, :4] = -100
    mask[1, 6:], labels[1, 6:], ids[1, 6:] = 0, -100, config.pad_token_id
    frames = (
        clips,
        chunks,
        video.frames_per_chunk,
        3,
        video.image_size,
        video.image_size,
    )
    return {
        "video": torch.rand(frames, generator=generator) * 2 - 1,
        "audio": torch.rand(
            clips,
            chunks,
            audio.spectrogram_frames,
            audio.num_mel_bins,
            generator=generator,
        )
        * 2
        - 1,
        "chunk_mask": chunk_mask,
        "video_mask": video_mask,
        "audio_mask": audio_mask,
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
        "labels": labels,
    }
