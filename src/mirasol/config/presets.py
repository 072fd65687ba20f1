"""The named configurations, as plain mappings so that overrides merge, and the sizes that the paper states."""

from typing import Any

from mirasol.config.checks import suggest_nearest_name
from mirasol.errors import UserError


def make_tiny_parts() -> dict[str, Any]:
    """About 1.5M weights: trains on two CPU cores in minutes."""

    def stack(depth: int) -> dict[str, Any]:
        return {
            "depth": depth,
            "width": 96,
            "hidden": 384,
            "heads": 3,
            "head_width": 32,
        }

    return {
        "chunking": {"chunk_seconds": 0.5, "num_chunks": None, "image_mean": 0.125, "image_std": 0.25},
        "video": {
            "image_size": 32,
            "frames_per_chunk": 4,
            # Overlapping tubes cover complete shapes in motion. The four 2D patches come last, so that the last m
            # outputs of the Combiner cover the complete frame.
            "tubes": [
                {"kernel": (4, 16, 16), "stride": (4, 8, 8)},
                {"kernel": (1, 16, 16), "stride": (4, 16, 16)},
            ],
        },
        "audio": {
            "num_mel_bins": 64,
            "spectrogram_frames": 16,
            "patch": (8, 16),
            "adapter": stack(1),
        },
        "vit": stack(3),
        "combiner": {"stack": stack(2), "m": 8},
        "latent": {"stack": stack(2)},
        "reconstruction": {"stack": stack(1), "image_size": 32, "patch": (4, 8, 8)},
        "text": {"stack": stack(3), "vocab_size": 512, "cross_attention_every": 1},
        "contrastive": None,
        "loss_weights": {},
    }


def make_small_parts() -> dict[str, Any]:
    """About 25M weights, for one's own clips on a small GPU: a ViT of the shape of ViT-Ti/16, chunks of a second."""

    def stack(depth: int) -> dict[str, Any]:
        return {"depth": depth, "width": 256, "hidden": 1024, "heads": 4, "head_width": 64}

    return {
        "chunking": {"chunk_seconds": 1.0, "num_chunks": None, "max_chunks": 64, "image_mean": 0.5, "image_std": 0.5},
        "video": {
            "image_size": 128,
            "frames_per_chunk": 4,
            "tubes": [
                {"kernel": (4, 16, 16), "stride": (4, 32, 32), "offset": (0, 8, 8)},
                # Last, as in the other presets: the last m outputs of the Combiner are those of 2D patches and audio.
                {"kernel": (1, 16, 16), "stride": (4, 16, 16)},
            ],
        },
        "audio": {"num_mel_bins": 64, "spectrogram_frames": 32, "patch": (16, 16), "adapter": stack(2)},
        "vit": {"depth": 12, "width": 192, "hidden": 768, "heads": 3, "head_width": 64},
        "combiner": {"stack": stack(4), "m": 16},
        "latent": {"stack": stack(4)},
        "reconstruction": {"stack": stack(2), "image_size": 32, "patch": (4, 8, 8)},
        "text": {"stack": stack(8), "vocab_size": 8192, "cross_attention_every": 2},
        "contrastive": {"width": 256},
        "loss_weights": {},
    }


def make_base_parts() -> dict[str, Any]:
    """About 250M weights, which fine-tune within 24 GB: a ViT of the shape of ViT-B/16, so that CLIP's and SigLIP's
    weights fit, and chunks of a second."""

    def stack(depth: int) -> dict[str, Any]:
        return {"depth": depth, "width": 768, "hidden": 3072, "heads": 12, "head_width": 64}

    return {
        # Half a minute in chunks of a second; a longer clip gets as many longer ones.
        "chunking": {"chunk_seconds": 1.0, "num_chunks": None, "max_chunks": 32, "image_mean": 0.5, "image_std": 0.5},
        "video": {
            "image_size": 224,
            "frames_per_chunk": 8,
            "tubes": [
                {"kernel": (8, 4, 4), "stride": (8, 32, 32), "offset": (0, 8, 8)},
                {"kernel": (4, 4, 4), "stride": (4, 32, 32), "offset": (0, 16, 16)},
                {"kernel": (1, 16, 16), "stride": (8, 16, 16)},
            ],
        },
        "audio": {"num_mel_bins": 128, "spectrogram_frames": 32, "patch": (16, 16), "adapter": stack(2)},
        "vit": stack(12),
        "combiner": {"stack": stack(6), "m": 32},
        "latent": {"stack": stack(4)},
        "reconstruction": {"stack": stack(2), "image_size": 64, "patch": (4, 8, 8)},
        "text": {"stack": stack(6), "vocab_size": 32_000, "cross_attention_every": 2},
        "contrastive": {"width": 512},
        "loss_weights": {},
    }


def make_paper_tubes() -> list[dict[str, Any]]:
    """Sparse tubes of an 8-frame chunk: 403 tokens at 224 pixels. TubeViT's own set does not fit 8 frames; this one has
    the 1.5M weights of the supplement, section 4."""
    return [
        {"kernel": (8, 4, 4), "stride": (8, 32, 32), "offset": (0, 8, 8)},
        {"kernel": (4, 4, 4), "stride": (4, 32, 32), "offset": (0, 16, 16)},
        # Last, so that the last m outputs of the Combiner are those of 2D patches (and of audio).
        {"kernel": (1, 14, 14), "stride": (8, 14, 14)},
    ]


def _make_paper_parts(vit: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """What both sizes of the paper share: 16 chunks of 8 frames, and everything between the ViT and the text."""

    def make_gated_stack() -> dict[str, Any]:
        # With a gate and without biases this has 128 x 2^20 weights, the supplement's "128M" (section 4).
        return {
            "depth": 8, "width": 1024, "hidden": 4096, "heads": 16, "head_width": 64, "gated": True, "bias": False,
        }  # fmt: skip

    adapter = {"depth": 8, "width": 1024, "hidden": 4096, "heads": 16, "head_width": 64}
    return {
        "chunking": {"chunk_seconds": None, "num_chunks": 16, "image_mean": 0.5, "image_std": 0.5},
        "video": {"image_size": 224, "frames_per_chunk": 8, "tubes": make_paper_tubes()},
        "audio": {
            "num_mel_bins": 128,
            "spectrogram_frames": 32,
            "patch": (16, 16),
            "adapter": adapter,
            "shared_projection": True,
        },
        "vit": vit,
        "combiner": {"stack": make_gated_stack(), "m": 32},
        "latent": {"stack": make_gated_stack()},
        "reconstruction": {"stack": make_gated_stack(), "image_size": 64, "patch": (4, 8, 8)},
        "text": {"vocab_size": 256_000, "max_length": 64, "cross_attention_every": 2, **text},
        "contrastive": {"width": 512},
        "loss_weights": {},
    }


def make_3b_parts() -> dict[str, Any]:
    """The paper's 3B model: ViT-H and a wide text decoder."""
    vit = {"depth": 32, "width": 1280, "hidden": 5120, "heads": 16, "head_width": 80}
    decoder = {"depth": 18, "width": 1536, "hidden": 12288, "heads": 12, "head_width": 128}
    return _make_paper_parts(vit, {"stack": decoder, "cross_attention_ffn": True})


def make_1b_parts() -> dict[str, Any]:
    """The paper's small model of 1.15B: ViT-L and a gated text decoder."""
    vit = {"depth": 24, "width": 1024, "hidden": 4096, "heads": 16, "head_width": 64}
    decoder = {
        "depth": 8, "width": 1024, "hidden": 4096, "heads": 16, "head_width": 64, "gated": True, "bias": False,
    }  # fmt: skip
    return _make_paper_parts(vit, {"stack": decoder})


PRESETS = {
    "3b": make_3b_parts, "1b": make_1b_parts, "base": make_base_parts, "small": make_small_parts,
    "tiny": make_tiny_parts,
}  # fmt: skip
LISTED_PRESETS = "3b, 1b, base, small or tiny"


def check_preset(name: str) -> None:
    """Raises UserError for an unknown preset."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{suggest_nearest_name(name, list(PRESETS))}")


# Parameters of each component, where the supplement states them (section 4, "Model Details"). They do not add up to its
# totals.
_OF_BOTH_SIZES = {"audio": 100_000_000, "combiner": 128_000_000, "latent": 128_000_000, "reconstruction": 128_000_000}
PAPER_PARAMETERS: dict[str, dict[str, int]] = {
    "3b": _OF_BOTH_SIZES
    | {"vit": 630_000_000, "tubes": 1_500_000, "cross_attention": 400_000_000, "vocabulary": 400_000_000}
    | {"total": 3_000_000_000},
    "1b": _OF_BOTH_SIZES
    | {"vit": 300_000_000, "text": 128_000_000, "cross_attention": 20_000_000, "vocabulary": 260_000_000}
    | {"total": 1_150_000_000},
}

# Sums of components that the supplement states too: "about 1.3B" of text, which is what its self- and cross-attention
# have, and "a bit over 1.5B" of "video input processor, combiner, causal latent model and video reconstruction model".
SIDES = {
    "text side": ("text", "cross_attention"),
    "video side": ("vit", "tubes", "combiner", "latent", "reconstruction"),
}
PAPER_SIDES: dict[str, dict[str, int]] = {"3b": {"text side": 1_300_000_000, "video side": 1_500_000_000}}
