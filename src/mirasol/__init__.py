"""Mirasol: time-aligned video and audio, and the text about them, in one autoregressive model.

`from mirasol import …` is enough; every name is imported when it is first used, so that the base import is light.
"""

import importlib

from mirasol import registration

__version__ = "0.1.0"

_HOMES = {
    "MirasolConfig": "mirasol.config.model",
    "MirasolForConditionalGeneration": "mirasol.model.hf",
    "MirasolOutput": "mirasol.model.outputs",
    "MirasolFeatureExtractor": "mirasol.media.feature_extractor",
    "MirasolProcessor": "mirasol.media.processor",
    "ChunkGrid": "mirasol.media.timeline",
    "Clip": "mirasol.media.clip",
    "Limits": "mirasol.media.limits",
    "read_clip": "mirasol.media.reader",
    "find_checkpoint": "mirasol.checkpoint",
    "load_checkpoint": "mirasol.checkpoint",
}
_ERRORS = ("UserError", "BadClip")

__all__ = [
    "BadClip",
    "ChunkGrid",
    "Clip",
    "Limits",
    "MirasolConfig",
    "MirasolFeatureExtractor",
    "MirasolForConditionalGeneration",
    "MirasolOutput",
    "MirasolProcessor",
    "UserError",
    "find_checkpoint",
    "load_checkpoint",
    "read_clip",
]


def __getattr__(name: str):
    if name in _ERRORS:
        return getattr(importlib.import_module("mirasol.errors"), name)
    if name not in _HOMES:
        raise AttributeError(f"module 'mirasol' has no attribute {name!r}")
    importlib.import_module("mirasol.auto")  # so that AutoModel, AutoProcessor, … know Mirasol
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


registration.install()
