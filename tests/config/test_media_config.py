"""The settings of media are listed once: config, feature extractor and clip cache have the same."""

import dataclasses
import inspect

import pytest

from mirasol import MirasolConfig, MirasolFeatureExtractor, UserError
from mirasol.config.media import MEDIA_SETTINGS, MediaConfig
from mirasol.data.clip_cache import ClipCache

OTHER = {
    "image_size": 48, "frames_per_chunk": 2, "chunk_seconds": None, "num_chunks": 3, "max_chunks": 5,
    "sample_rate": 8000, "num_mel_bins": 32, "spectrogram_frames": 8, "fit": "crop", "image_mean": 0.5,
    "image_std": (0.5, 0.25, 0.5),
}  # fmt: skip


def test_every_setting_reaches_extractor_config_and_cache(tmp_path):
    assert set(OTHER) == set(MEDIA_SETTINGS)
    extractor, cache = MirasolFeatureExtractor(**OTHER), ClipCache(None, tmp_path, OTHER)
    assert extractor.media.to_dict() == cache.settings == OTHER
    assert {name: extractor.to_dict()[name] for name in OTHER} == OTHER
    defaults = MediaConfig().to_dict()
    assert all(OTHER[name] != defaults[name] for name in OTHER), "a value equal to the default would prove nothing"


def test_every_setting_is_a_field_of_one_part_of_the_models_config():
    config = MirasolConfig()
    parts = (config.chunking, config.video, config.audio)
    for name in MEDIA_SETTINGS:
        assert sum(name in {field.name for field in dataclasses.fields(part)} for part in parts) == 1, name


def test_lists_from_json_and_tuples_are_the_same_settings():
    assert MediaConfig(image_mean=[0.1, 0.2, 0.3]) == MediaConfig(image_mean=(0.1, 0.2, 0.3))


def test_settings_cannot_change_after_they_were_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MediaConfig().image_size = 0
    assert inspect.signature(MirasolFeatureExtractor.__init__).parameters.keys() == {"self", "settings"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"image_size": 0}, "image_size=0"), ({"fit": "fill"}, "pad, crop, stretch"), ({"image_std": 0}, "image_std=0")],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        MirasolFeatureExtractor(**setting)
