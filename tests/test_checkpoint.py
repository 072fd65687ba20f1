import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.checkpoint import find_checkpoint, load_answerer, load_checkpoint
from mirasol.model.mirasol import MirasolAnswerer


@pytest.fixture
def copy(untrained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(untrained, folder)
    return folder


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder) -> str:
    """The one line that refuses a checkpoint."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_loaded_is_what_was_saved(untrained):
    loaded = load_checkpoint(untrained)
    saved = load_file(untrained / "model.safetensors")
    assert saved.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in loaded.model.state_dict().items())
    assert not loaded.model.training


def test_a_run_and_a_demo_stand_for_their_checkpoints(untrained, tmp_path):
    for place in ("checkpoint", "train/checkpoint"):
        shutil.copytree(untrained, tmp_path / place.replace("/", "-") / place)
        assert find_checkpoint(tmp_path / place.replace("/", "-")) == tmp_path / place.replace("/", "-") / place


def test_no_such_folder_names_it_and_what_is_shipped(tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere")
    assert "tiny" in refused(tmp_path / "nowhere")


def test_a_folder_of_something_else(tmp_path):
    assert "not a checkpoint" in refused(tmp_path)


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert "--resume" in refused(tmp_path)


def test_another_format_names_both(copy):
    change_config(copy, checkpoint_format=99)
    assert "99" in refused(copy)


def test_a_checkpoint_without_format_is_not_guessed_at(copy):
    values = json.loads((copy / "config.json").read_text())
    del values["checkpoint_format"]
    (copy / "config.json").write_text(json.dumps(values))
    assert "checkpoint format None" in refused(copy)


def test_another_kind_of_model(copy):
    change_config(copy, model_type="bert")
    assert "'bert'" in refused(copy)


def test_an_unknown_config_key_is_named(copy):
    change_config(copy, combinr={})
    with pytest.warns(UserWarning, match="unknown key 'combinr' .* did you mean 'combiner'"):
        load_checkpoint(copy)


def test_an_unknown_key_of_a_part_is_refused(copy):
    change_config(copy, combiner={"knd": "cls"})
    assert "combiner: unknown key 'knd'" in refused(copy)


def test_a_broken_config(copy):
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(copy)


def test_missing_weights_are_listed(copy):
    gone = ["text.embedding.weight", "text.norm.bias"]
    change_weights(copy, lambda weights: [weights.pop(key) for key in gone])
    message = refused(copy)
    assert "lacks 2 weights" in message
    assert all(key in message for key in gone)


def test_unknown_weights_are_listed(copy):
    change_weights(copy, lambda weights: weights.update({"text.extra": torch.zeros(2)}))
    assert "has unknown 1 weight (text.extra)" in refused(copy)


def test_misshapen_weights_are_named_with_both_shapes(copy):
    change_weights(copy, lambda weights: weights.update({"text.norm.bias": torch.zeros(7)}))
    message = refused(copy)
    assert "text.norm.bias" in message
    assert "[7]" in message


def test_cut_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in refused(copy)


def test_pickled_weights_are_not_opened(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pickle" in refused(copy)


def test_no_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(copy)


def change_extractor(folder, change):
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    change(values["feature_extractor"])
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 48), ("image_mean", 0.5), ("chunk_seconds", 0.75), ("fit", "crop")]
)
def test_a_processor_that_reads_clips_in_another_way_is_refused_with_both_values(copy, name, value):
    wanted = load_checkpoint(copy).model.config.media_settings()[name]
    change_extractor(copy, lambda settings: settings.update({name: value}))
    assert f"{name}={value!r}, but its config.json says {wanted!r}" in refused(copy)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_numbers(copy):
    loaded = load_checkpoint(copy)
    tokens = len(loaded.processor.tokenizer)
    loaded.processor.tokenizer.add_tokens(["<one too many>"])
    loaded.processor.save_pretrained(copy)
    assert f"{tokens + 1} tokens, but its config.json says vocab_size={tokens}" in refused(copy)


def test_a_broken_processor_is_one_line(copy):
    change_extractor(copy, lambda settings: settings.update(image_size="large"))
    assert "processor cannot be loaded" in refused(copy)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "value", ["concat:a|b", "cuda", "nn", "Tensor", "int64", "", 5, [1], {"text": "float32"}, True]
)
def test_a_dtype_that_is_not_one_of_weights_is_refused_by_name(copy, key, value):
    change_config(copy, dtype=None, **{} if key == "dtype" else {"torch_dtype": None})
    change_config(copy, **{key: value})
    message = refused(copy)
    assert f"{key}=" in message and "choose float16, bfloat16, float32, float64 or null" in message


@pytest.mark.parametrize("value", [None, "float16", "bfloat16", "float32", "float64"])
def test_weights_of_every_dtype_are_loaded_in_float32(copy, value):
    change_config(copy, dtype=value)
    assert load_checkpoint(copy).model.dtype == torch.float32


def list_integers(values, path=()):
    """The paths to all integers of nested mappings and lists."""
    if isinstance(values, bool):
        return []
    if isinstance(values, int):
        return [path]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, value in items for found in list_integers(value, (*path, key))]


@pytest.mark.parametrize("number", [2**63, 2**24])
def test_no_number_of_a_config_is_too_large_to_be_refused_in_one_line(copy, number):
    file = copy / "config.json"
    text, refusals = file.read_text(), []
    paths = list_integers(json.loads(text))
    for path in paths:
        values = part = json.loads(text)
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = number
        file.write_text(json.dumps(values))
        try:
            load_checkpoint(copy)  # a few numbers of transformers' own have no meaning here
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 0.7 * len(paths) > 30
    assert not [refusal for refusal in refusals if "\n" in refusal or len(refusal) > 600]


# To answer with


MODELS = {
    "tiny": {},
    "untied": {"text": {"tied": False, "learned_positions": True}},
    "contrastive": {"contrastive": {"width": 16}},
    "perceiver": {"combiner": {"kind": "perceiver"}},
    "ttm": {"combiner": {"kind": "ttm"}},
    "learned codes": {"video": {"learned_positions": True}},
    "cross ffn": {"text": {"cross_attention_ffn": True, "scale_embedding": False}},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_loaded_to_answer_with_computes_the_same(name, dtype, untrained, tmp_path):
    """All kinds of models, in the precisions that weights are saved in."""
    processor = load_checkpoint(untrained).processor
    parts = {key: dict(value) for key, value in MODELS[name].items()}
    parts.setdefault("text", {})["vocab_size"] = len(processor.tokenizer)
    torch.manual_seed(5)
    model = MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **parts)).to(dtype)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    first, second = load_checkpoint(tmp_path / "model"), load_answerer(tmp_path / "model")
    assert isinstance(second.model, MirasolAnswerer) and not second.model.training
    state = first.model.state_dict()
    assert state.keys() == second.model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in second.model.state_dict().items())
    assert {value.dtype for value in second.model.parameters()} == {torch.float32}
    prompts = ["what shape is red?", "what sound is it?", "why"]
    text = first.processor.candidates(prompts, ["red", "a green circle"])
    for key, value in second.processor.candidates(prompts, ["red", "a green circle"]).items():
        assert torch.equal(value, text[key])
    assert second.processor.max_text_length == first.processor.max_text_length
    torch.manual_seed(6)
    shape = first.model.config
    video = torch.randn(1, 3, *shape.video.chunk_shape)
    masks = {name: torch.ones(1, 3, dtype=torch.bool) for name in ("chunk_mask", "video_mask", "audio_mask")}
    media = {"video": video, "audio": torch.randn(1, 3, *shape.audio.chunk_shape), **masks}
    with torch.inference_mode():
        scores = [each.model.score(each.model.encode(**media), **text).total for each in (first, second)]
    assert torch.equal(*scores)


def test_what_only_transformers_can_load_is_loaded_by_it(untrained, monkeypatch):
    monkeypatch.setattr("mirasol.checkpoint.PLAIN_TOKENIZERS", ("another",))
    assert isinstance(load_answerer(untrained).model, MirasolForConditionalGeneration)


def test_every_defect_is_reported_alike(untrained, tmp_path):
    """Whichever way a checkpoint is loaded, a defect has the same line."""
    defects = {
        "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "damaged weights": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
        "another weight": lambda folder: change_weights(folder, lambda weights: weights.update(more=torch.ones(2))),
        "a weight less": lambda folder: change_weights(folder, lambda weights: weights.pop("text.norm.weight")),
        "another model": lambda folder: change_config(folder, model_type="bert"),
        "other pixels": lambda folder: change_processor(folder, image_size=48),
        "damaged tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    }
    for name, damage in defects.items():
        folder = Path(shutil.copytree(untrained, tmp_path / name))
        damage(folder)
        lines = []
        for load in (load_checkpoint, load_answerer):
            with pytest.raises(UserError) as caught:
                load(folder)
            lines.append(str(caught.value))
        assert lines[0] == lines[1], name


def change_processor(folder, **settings):
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    values["feature_extractor"] |= settings
    file.write_text(json.dumps(values))
