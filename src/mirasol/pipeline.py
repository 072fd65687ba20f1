"""transformers' pipeline for questions about video and sound, under the task `video-audio-text-to-text`.

`pipeline("any-to-any", …)` is the same, but asks for torchvision (transformers 5.23) and librosa (5.17), which Mirasol
has no use for: its processor reads media itself. `pipeline("any-to-any", …, pipeline_class=MirasolPipeline)` does not.
"""

from typing import Any

from transformers import AutoModelForMultimodalLM, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.any_to_any import AnyToAnyPipeline
from transformers.pipelines.base import Pipeline

TASK = "video-audio-text-to-text"


class MirasolPipeline(AnyToAnyPipeline):
    """`AnyToAnyPipeline` without the packages that it asks for; answers are short, 64 new tokens at most."""

    _default_generation_config = GenerationConfig(max_new_tokens=64)

    def __init__(self, *args: Any, **kwargs: Any):
        Pipeline.__init__(self, *args, **kwargs)


if TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(TASK, MirasolPipeline, pt_model=AutoModelForMultimodalLM, type="multimodal")
