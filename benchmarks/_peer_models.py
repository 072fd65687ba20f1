"""This project's model and the peer, mirasol-pytorch, at an item's sizes.

The peer is built as an item says, with its 8 register tokens for each modality. Ours has the same tokens, widths,
depths and text. By design ours differs in four ways: no register tokens; audio passes through the shared ViT before its
own layers; the Combiner's last layer computes only the outputs that are kept; and the reconstruction is a Transformer
where the peer has one linear layer from all latents of a chunk to all pixels. The hidden layer of that reconstruction
is sized so that both do the same FLOPs (`reconstruction_hidden`).
"""

import contextlib
import functools
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from _peer_items import HEAD_WIDTH, Item

from mirasol import MirasolConfig, MirasolForConditionalGeneration

INSTALL = (
    "pip install --no-deps --target DIR mirasol-pytorch==0.0.16 x-transformers==1.28.5 einops==0.8.2 beartype packaging"
)


def draw_inputs(item: Item) -> dict[str, torch.Tensor]:
    """One batch of noise: video [batch, chunk, frame, 3, side, side], audio [batch, chunk, time, frequency], text."""
    generator = torch.Generator().manual_seed(0)
    return {
        "video": torch.randn(item.batch, item.chunks, item.frames, 3, item.pixels, item.pixels, generator=generator),
        "audio": torch.randn(item.batch, item.chunks, item.chunks, item.audio_tokens, generator=generator),
        "text": torch.randint(4, item.vocabulary, (item.batch, item.text_length), generator=generator),
    }


class Ours:
    """This project's model at an item's sizes."""

    def __init__(self, item: Item):
        self.item = item
        self.model = MirasolForConditionalGeneration(make_config(item)).train()

    def make_batch(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        data = draw_inputs(self.item)
        present = torch.ones(self.item.batch, self.item.chunks, dtype=torch.bool)
        return {
            "video": data["video"].to(dtype), "audio": data["audio"].to(dtype), "chunk_mask": present,
            "video_mask": present, "audio_mask": present, "decoder_input_ids": data["text"], "labels": data["text"],
        }  # fmt: skip

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).loss

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, tokens: int) -> torch.Tensor:
        """`tokens` new tokens, greedily, after one start token, over random latents [batch, chunk, m, width]."""
        from mirasol.model.outputs import MirasolEncoderOutput

        rows = len(latents)
        mask = torch.ones(rows, latents.shape[1] * latents.shape[2], dtype=torch.bool)
        return self.model.eval().generate(
            encoder_outputs=MirasolEncoderOutput(latents.flatten(1, 2), mask, latents),
            decoder_input_ids=torch.ones(rows, 1, dtype=torch.long),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )[:, 1:]


def make_config(item: Item) -> MirasolConfig:
    def stack(depth: int, hidden: int = 4 * item.width) -> dict[str, Any]:
        return {
            "depth": depth, "width": item.width, "hidden": hidden, "heads": item.heads, "head_width": HEAD_WIDTH,
        }  # fmt: skip

    patch = (item.patch_frames, 16, 16)
    return MirasolConfig(
        chunking={"chunk_seconds": None, "num_chunks": item.chunks},
        video={
            "image_size": item.pixels,
            "frames_per_chunk": item.frames,
            "tubes": [{"kernel": patch, "stride": patch}],
        },
        audio={
            "num_mel_bins": item.audio_tokens,
            "spectrogram_frames": item.chunks,
            "patch": (item.chunks, 1),
            "adapter": stack(item.adapter_depth),
        },
        vit=stack(item.video_depth),
        combiner={"stack": stack(item.combiner_depth), "m": item.m, "scope": "chunk"},
        latent={"stack": stack(item.latent_depth), "mask_ratio": 0.0},
        reconstruction={
            "stack": stack(item.reconstruction_depth, item.reconstruction_hidden),
            "image_size": 32,
            "patch": (item.patch_frames, 8, 8),
        },
        text={
            "stack": stack(item.text_depth),
            "vocab_size": item.vocabulary,
            "max_length": item.text_length,
            "cross_attention_every": 1,
        },
    )


class Peer:
    """mirasol-pytorch at an item's sizes, with the two changes of `import_peer`."""

    def __init__(self, item: Item):
        self.item = item
        encoder = {"heads": item.heads, "attn_dim_head": HEAD_WIDTH}
        self.model = import_peer()(
            dim=item.width,
            num_text_tokens=item.vocabulary,
            video_image_size=item.pixels,
            video_frames_per_timechunk=item.frames,
            audio_freq_dim=item.audio_tokens,
            # Its audio axes are swapped unless a clip has as many chunks as a chunk has spectrogram frames.
            audio_time_dim_per_timechunk=item.chunks,
            audio_patch_size=(1, item.chunks),
            video_patch_size=(16, item.patch_frames),
            video_recon_patch_size=(16, item.patch_frames),
            audio_encoder={"depth": item.audio_depth, **encoder},
            video_encoder={"depth": item.video_depth, **encoder},
            audio_video_mask_prob=0.0,
            text_forgetful_causal_mask_prob=0.0,
            encoder_depth=item.latent_depth,
            decoder_depth=item.text_depth,
            combiner_depth=item.combiner_depth,
            combiner_output_num_tokens=item.m,
            attn_dim_head=HEAD_WIDTH,
            attn_heads=item.heads,
        ).train()

    def make_batch(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        data = draw_inputs(self.item)
        video = data["video"].flatten(1, 2).transpose(1, 2).contiguous()
        audio = data["audio"].flatten(1, 2).transpose(1, 2).contiguous()
        return {"video": video.to(dtype), "audio": audio.to(dtype), "text": data["text"]}

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, tokens: int) -> torch.Tensor:
        """The same with the peer's own greedy loop, over the same latents."""
        start = torch.full((len(latents), 1), self.model.start_token_id)
        context = latents.flatten(1, 2)
        return self.model.eval().wrapped_decoder.generate(start, seq_len=tokens, context=context, temperature=0.0)


@functools.cache
def import_peer() -> type:
    """The peer's class, with two changes in its favour.

    Its position codes take the tokens' dtype, since otherwise it cannot run in bfloat16; and x-transformers' switch of
    attention kernels, which torch has deprecated and which allows every kernel here anyway, costs no time.
    """
    module = importlib.import_module("mirasol_pytorch.mirasol_pytorch")
    plain = module.posemb_sincos_nd
    module.posemb_sincos_nd = lambda tokens: plain(tokens, dtype=tokens.dtype)
    torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()
    return module.Mirasol


def find_peer(folder: Path | None) -> str | None:
    """Makes the peer importable, from `folder` if one is given; returns one line with the fix if it is missing."""
    if folder is not None:
        # Last, so that packages installed with the peer do not hide those of this project.
        sys.path.append(str(folder.resolve()))
    warnings.simplefilter("ignore", FutureWarning)
    try:
        import_peer()
    except ImportError as error:
        where = f" in {folder}" if folder is not None else ""
        return f"the peer is missing{where} ({error}): {INSTALL}, then --peer DIR"
    return None
