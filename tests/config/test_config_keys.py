"""What transformers and users write into a config is loaded again; what has no effect is said."""

import json
import warnings

import pytest

from mirasol import MirasolConfig, UserError
from mirasol.checkpoint import read_config

WRITTEN_BY_TRANSFORMERS = {
    "use_cache": False,
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "architectures": ["MirasolForConditionalGeneration"],
    "id2label": {"0": "no", "1": "yes"},
    "problem_type": "regression",
    "dtype": "bfloat16",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "auto_map": {"AutoConfig": "code.MirasolConfig"},
    "output_hidden_states": True,
    "_private": 3,
}


@pytest.mark.parametrize("key", WRITTEN_BY_TRANSFORMERS)
def test_what_transformers_writes_is_loaded_without_a_word(key, tmp_path):
    values = MirasolConfig.preset("tiny").to_dict() | {key: WRITTEN_BY_TRANSFORMERS[key]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = MirasolConfig.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path)
        again = MirasolConfig.from_pretrained(tmp_path)
    assert again.to_dict()[key] == loaded.to_dict()[key]
    kept = loaded.to_dict()[key]
    assert json.loads(json.dumps(kept)) == WRITTEN_BY_TRANSFORMERS[key]


@pytest.mark.parametrize(("key", "nearest"), [("loss_wieghts", "'loss_weights'"), ("my_note", None)])
def test_an_attribute_of_ones_own_is_kept_with_a_warning(key, nearest, tmp_path):
    config = MirasolConfig.preset("tiny")
    setattr(config, key, {"of": [1, None, "x"]})
    config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"unknown key '{key}' in the config, kept but not read") as told:
        loaded = MirasolConfig.from_pretrained(tmp_path)
    assert getattr(loaded, key) == {"of": [1, None, "x"]}
    assert ("did you mean" in str(told[0].message)) == (nearest is not None)
    assert nearest is None or nearest in str(told[0].message)
    assert loaded.loss_weights == config.loss_weights


@pytest.mark.parametrize(
    ("values", "message"),
    [({"tie_word_embeddings": False}, "text.tied=True decides"), ({"temperature": 0.3}, "set it in generation_config")],
)
def test_what_has_no_effect_is_said(values, message):
    with pytest.warns(UserWarning, match=message):
        MirasolConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 5}, "hidden_size=5, but the parts give hidden_size=96"),
        ({"vocab_size": 5}, "vocab_size=5, but the parts give vocab_size=512"),
        ({"to_dict": 5}, "'to_dict' is a name that MirasolConfig uses itself"),
        ({"__class__": 5}, "'__class__' is a name that MirasolConfig uses itself"),
        ({"attribute_map": {"text": "x"}}, "'attribute_map' is a name"),
    ],
)
def test_keys_that_would_contradict_or_break_the_config_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        MirasolConfig(**values)


def test_numbers_that_follow_from_the_parts_may_be_repeated():
    assert MirasolConfig(hidden_size=96, vocab_size=512).to_dict() == MirasolConfig().to_dict()


@pytest.mark.parametrize(
    "values", [{"id2label": 5}, {"rope_parameters": 5}, {"layer_types": [5]}, {"num_labels": "x"}, {"text": 5}]
)
@pytest.mark.filterwarnings("ignore:unknown key")
def test_impossible_values_in_a_checkpoint_are_one_line(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MirasolConfig().to_dict() | values))
    with pytest.raises(UserError, match=r"config\.json: ") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
