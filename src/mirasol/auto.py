"""Registers Mirasol with transformers' Auto classes; importing any public name of `mirasol` does this."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
)

from mirasol.config.model import MirasolConfig
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.processor import MirasolProcessor
from mirasol.model.mirasol import MirasolForConditionalGeneration

AutoConfig.register(MirasolConfig.model_type, MirasolConfig)
for auto in (AutoModel, AutoModelForSeq2SeqLM, AutoModelForMultimodalLM):
    auto.register(MirasolConfig, MirasolForConditionalGeneration)
AutoFeatureExtractor.register(MirasolConfig, MirasolFeatureExtractor)
AutoProcessor.register(MirasolConfig, MirasolProcessor)
