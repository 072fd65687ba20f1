"""The components of a model, and its parameters by component."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = (
    "vit", "tubes", "audio", "combiner", "latent", "reconstruction", "text", "cross_attention", "vocabulary",
)  # fmt: skip

# The first prefix that fits a parameter's or module's name says whose it is.
_PREFIXES = {
    "chunk_encoder.tubes": "tubes",
    "chunk_encoder.vit": "vit",
    "chunk_encoder.shared_output": "vit",
    "chunk_encoder.video_output": "vit",
    "chunk_encoder.missing_video": "vit",
    "chunk_encoder.": "audio",
    "combiner": "combiner",
    "latent": "latent",
    "reconstruction": "reconstruction",
    "text.embedding": "vocabulary",
    "text.output": "vocabulary",
    "text.latent_input": "cross_attention",
    "text": "text",
    # The projection of images too: it has no other use than to meet the text's.
    "contrastive": "text",
}


def find_component(name: str) -> str:
    """The component that a parameter or submodule of the model belongs to, by its dotted name."""
    if name.startswith("text.blocks.") and ".cross_" in name:
        return "cross_attention"
    return next(component for prefix, component in _PREFIXES.items() if name.startswith(prefix))


def count_parameters(named: Iterable[tuple[str, "Tensor"]]) -> dict[str, int]:
    """Parameters by component, in the order of `COMPONENTS`; their sum is that of the model."""
    counts = Counter()
    for name, parameter in named:
        counts[find_component(name)] += parameter.numel()
    return {component: counts[component] for component in COMPONENTS}
