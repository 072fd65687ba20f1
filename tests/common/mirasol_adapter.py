"""Mirasol in transformers' own common tests: `test_transformers_common.py` copies it next to them and runs it there."""

import unittest

import torch
from transformers.testing_utils import torch_device

from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration, MirasolProcessor
from mirasol.media.tokenizer import train_tokenizer

from .test_configuration_common import ConfigTester
from .test_feature_extraction_common import FeatureExtractionSavingTestMixin
from .test_modeling_common import ModelTesterMixin
from .test_processing_common import ProcessorTesterMixin

STACK = {"depth": 2, "width": 32, "hidden": 32, "heads": 2, "head_width": 16}
PARTS = {
    "video": {"image_size": 16, "frames_per_chunk": 2, "tubes": [{"kernel": (1, 8, 8), "stride": (1, 8, 8)}]},
    "audio": {"adapter": STACK, "num_mel_bins": 16, "spectrogram_frames": 16},
    "vit": STACK,
    "combiner": {"stack": STACK, "m": 4},
    "latent": {"stack": STACK, "mask_ratio": 0.0},
    "reconstruction": {"stack": STACK, "image_size": 16, "patch": (2, 8, 8)},
    "text": {"stack": STACK, "vocab_size": 99},
}


class MirasolModelTester:
    """The smallest model, and a batch of clips without an irregularity."""

    batch_size, seq_length, chunks = 3, 7, 2
    is_training = True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 99
    encoder_seq_length = key_length = 8

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.decoder_seq_length = self.seq_length

    def get_config(self) -> MirasolConfig:
        return MirasolConfig.preset("tiny", **PARTS)

    def prepare_config_and_inputs_for_common(self) -> tuple[MirasolConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        chunks = (self.batch_size, self.chunks)
        media = {
            "video": torch.rand(*chunks, *config.video.chunk_shape),
            "audio": torch.rand(*chunks, *config.audio.chunk_shape),
            **{name: torch.ones(chunks, dtype=torch.bool) for name in ("chunk_mask", "video_mask", "audio_mask")},
        }
        ids = torch.randint(5, 99, (self.batch_size, self.seq_length))
        text = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        return config, {name: value.to(torch_device) for name, value in (media | text).items()}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class MirasolModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MirasolForConditionalGeneration,)
    is_encoder_decoder = True
    test_missing_keys = False

    def setUp(self):
        self.model_tester = MirasolModelTester(self)
        self.config_tester = ConfigTester(self, config_class=MirasolConfig, has_text_modality=True)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        if "audio" not in inputs:  # some tests give the main input and the text alone
            chunks, config = inputs["video"].shape[:2], self.model_tester.get_config()
            inputs["audio"] = torch.zeros(*chunks, *config.audio.chunk_shape).to(inputs["video"])
            for name in ("chunk_mask", "video_mask", "audio_mask"):
                inputs[name] = torch.ones(chunks, dtype=torch.bool, device=inputs["video"].device)
        if return_labels:
            inputs["labels"] = inputs["decoder_input_ids"].clone()
        return inputs


class MirasolFeatureExtractionTest(FeatureExtractionSavingTestMixin, unittest.TestCase):
    feature_extraction_class = MirasolFeatureExtractor
    feat_extract_dict = MirasolConfig.preset("tiny", **PARTS).media_settings()


class MirasolProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MirasolProcessor
    text_input_name = "decoder_input_ids"
    videos_input_name = "video"
    audio_input_name = "audio"

    @classmethod
    def _setup_feature_extractor(cls):
        return MirasolFeatureExtractor()

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(["lower newer", "upper older longer string", "which shape is red?"], 300)
