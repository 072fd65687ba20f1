"""Registers Mirasol with transformers' Auto classes: when a public name of `mirasol` is used, or a Mirasol checkpoint
is loaded through one of them (`mirasol.registration`).

It also gives the model `from_parts`: users look for it next to `from_pretrained`, but the code that reads the files of
other models imports the model, so that the model cannot import it.
"""

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
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.pretrained.assemble import assemble

MirasolForConditionalGeneration.from_parts = staticmethod(assemble)

AutoConfig.register(MirasolConfig.model_type, MirasolConfig)
for auto in (AutoModel, AutoModelForSeq2SeqLM, AutoModelForMultimodalLM):
    auto.register(MirasolConfig, MirasolForConditionalGeneration)
AutoFeatureExtractor.register(MirasolConfig, MirasolFeatureExtractor)
AutoProcessor.register(MirasolConfig, MirasolProcessor)
