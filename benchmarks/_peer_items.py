"""The items of the comparison with the peer: sizes that both models share."""

from dataclasses import dataclass

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Item:
    """One piece of work: sizes shared by both models. `patch_frames` and 16 x 16 pixels make a video token."""

    batch: int
    chunks: int
    frames: int
    pixels: int
    patch_frames: int
    audio_tokens: int
    width: int
    video_depth: int
    audio_depth: int
    combiner_depth: int
    latent_depth: int
    text_depth: int
    m: int
    text_length: int
    vocabulary: int
    # Of ours only: layers of the audio adapter and of the reconstruction, and the latter's hidden width.
    adapter_depth: int
    reconstruction_depth: int
    reconstruction_hidden: int
    new_tokens: int = 0

    @property
    def heads(self) -> int:
        return self.width // HEAD_WIDTH


def _tiny(chunks: int, hidden: int) -> Item:
    return Item(2, chunks, 4, 64, 2, 8, 192, 4, 2, 2, 2, 4, 8, 32, 4096, 1, 2, hidden)


def _base(chunks: int, hidden: int, **changes: int) -> Item:
    sizes = dict(
        batch=1, chunks=chunks, frames=8, pixels=128, patch_frames=4, audio_tokens=16, width=384, video_depth=6,
        audio_depth=4, combiner_depth=4, latent_depth=4, text_depth=6, m=8, text_length=64, vocabulary=8192,
        adapter_depth=2, reconstruction_depth=3, reconstruction_hidden=hidden,
    )  # fmt: skip
    return Item(**sizes | changes)


ITEMS = {
    "tiny-T2": _tiny(2, 448),
    "tiny-T8": _tiny(8, 448),
    "tiny-T16": _tiny(16, 448),
    "tiny-T64": _tiny(64, 448),
    "base-T8": _base(8, 2016),
    "base-T8-m32": _base(8, 2112, m=32),
    "text-L512": _base(4, 2016, text_length=512, vocabulary=32_768),
    "longvideo-T64": _base(64, 896, pixels=64, reconstruction_depth=2),
}
DECODING_ITEMS = {
    "gen-T8": _base(8, 1536, new_tokens=128),
    "gen-T64-m32": _base(64, 1536, pixels=64, m=32, new_tokens=64),
}
