"""Image features are those of the model that the image side began with."""

import json

import pytest
import torch
from making import config, image_model, patch_features, saved

from mirasol import MirasolForConditionalGeneration, UserError

CLASSES = [
    "CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipModel", "SiglipVisionModel", "ViTModel",
    "ViTForImageClassification",
]  # fmt: skip
from_parts = MirasolForConditionalGeneration.from_parts


def our_features(model: MirasolForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.chunk_encoder.image(images)


@pytest.mark.parametrize("patch", [16, 14])
@pytest.mark.parametrize("kind", CLASSES)
def test_features_equal_the_source(kind, patch, tmp_path):
    source = image_model(kind, patch, 4 * patch)
    model, report = from_parts(config(), image=saved(source, tmp_path), image_size=4 * patch)
    images = torch.randn(2, 3, 4 * patch, 4 * patch)
    torch.testing.assert_close(our_features(model, images), patch_features(source, images), atol=1e-4, rtol=1e-4)
    assert not any("interpolated" in entry["note"] for entry in report.loaded)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel", "ViTModel"])
@pytest.mark.parametrize("image_size", [48, 96])
def test_positions_are_interpolated_to_another_image_size(kind, image_size, tmp_path):
    source = image_model(kind, 16, 64)
    model, report = from_parts(config(), image=saved(source, tmp_path), image_size=image_size)
    images = torch.randn(2, 3, image_size, image_size)
    torch.testing.assert_close(our_features(model, images), patch_features(source, images), atol=1e-4, rtol=1e-4)
    [entry] = [entry for entry in report.loaded if entry["target"].endswith("learned_position")]
    assert entry["note"] == f"interpolated from 4 x 4 to {image_size // 16} x {image_size // 16}"


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_activations_and_norms_are_the_source_s(activation, tmp_path):
    source = image_model("ViTModel", 16, 64, hidden_act=activation, layer_norm_eps=1e-2, qkv_bias=False)
    model, report = from_parts(config(), image=saved(source, tmp_path))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(our_features(model, images), patch_features(source, images), atol=1e-4, rtol=1e-4)
    assert "chunk_encoder.vit.blocks.0.attention.query.bias" in [entry["target"] for entry in report.filled]


def test_shards_and_pickles_hold_the_same_weights(tmp_path):
    source = image_model("CLIPVisionModel", 16, 64)
    whole = saved(source, tmp_path / "whole")
    sharded = saved(source, tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    pickled = saved(source, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(source.state_dict(), pickled / "pytorch_model.bin")
    models = [from_parts(config(), image=whole), from_parts(config(), image=sharded)]
    models.append(from_parts(config(), image=pickled, allow_pickle=True))
    first, *others = [model.state_dict() for model, _ in models]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(UserError, match="pytorch_model.bin: a pickle can run code.*--allow-pickle"):
        from_parts(config(), image=pickled)


def test_the_report_lists_every_tensor_once(tmp_path):
    source = image_model("CLIPModel", 16, 64)
    model, report = from_parts(config(), image=saved(source, tmp_path))
    ours = [entry["target"] for entry in (*report.loaded, *report.filled, *report.random)]
    assert sorted(ours) == sorted(model.state_dict())
    theirs = {name for entry in report.loaded for name in entry["source"]} | {e["source"] for e in report.unused}
    assert theirs == set(source.state_dict()) - {"vision_model.embeddings.position_ids"}
    assert len({e["source"] for e in report.unused}) == len(report.unused)
    assert all("unknown" not in entry["reason"] for entry in report.unused)
    for entry in report.loaded:
        assert entry["shape"] == list(model.state_dict()[entry["target"]].shape)


def test_what_the_source_does_not_give_is_as_a_new_model_has_it(tmp_path):
    source = image_model("ViTModel", 16, 64)
    model, report = from_parts(config(), image=saved(source, tmp_path), seed=4)
    torch.manual_seed(4)
    fresh = MirasolForConditionalGeneration(model.config).state_dict()
    assert report.random
    for entry in report.random:
        assert torch.equal(model.state_dict()[entry["target"]], fresh[entry["target"]])


def test_inflated_tubes_read_a_still_colour_as_the_patch_does(tmp_path):
    source = image_model("ViTModel", 16, 64)
    model, report = from_parts(config(), image=saved(source, tmp_path), inflate_tubes=True)
    still = torch.tensor([0.3, -0.8, 1.2])[:, None, None, None].expand(3, 4, 64, 64)[None]
    tube, patch = (projection(still).flatten(2) for projection in model.chunk_encoder.tubes.projections)
    torch.testing.assert_close(tube[..., :1], patch[..., :1], atol=1e-4, rtol=1e-4)
    frames = model.chunk_encoder.tubes.projections[0].weight.unbind(2)
    assert all(torch.equal(frames[0], frame) for frame in frames)
    notes = {entry["target"]: entry["note"] for entry in report.loaded}
    assert notes["chunk_encoder.tubes.projections.0.weight"] == "inflated from 16 x 16 to 4 x 8 x 8"
    again, _ = from_parts(config(), image=tmp_path)
    assert not torch.equal(again.chunk_encoder.tubes.projections[0].weight, frames[0])


def test_normalisation_is_the_source_s_per_channel(tmp_path):
    folder = saved(image_model("CLIPVisionModel", 16, 64), tmp_path)
    model, report = from_parts(config(), image=folder)
    assert model.config.chunking.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert "has no preprocessor_config.json" in report.remarks[0]
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    model, report = from_parts(config(), image=folder)
    assert (model.config.chunking.image_mean, model.config.chunking.image_std) == ((0.1, 0.2, 0.3), 0.5)
    assert not report.remarks
    assert report.config_changes["chunking.image_std"] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 64},
            r"embeddings.patch_embedding.weight has shape \[64, 3, 16, 16\], but vit.width takes \[48, 3, 16, 16\]",
        ),
        (
            {"intermediate_size": 96},
            r"mlp.fc1.weight has shape \[96, 48\], but chunk_encoder.vit.blocks.0.feed_forward.hidden.weight takes",
        ),
        ({"num_hidden_layers": 1}, r"it has nothing for chunk_encoder.vit.blocks.1.attention_norm.weight \[48\]"),
        ({"num_hidden_layers": 3}, r"there is no place for encoder.layers.2.layer_norm1.weight \[48\]"),
        ({"hidden_act": "relu"}, "activation 'relu' is not one of gelu"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_shapes(changes, message, tmp_path):
    folder = saved(image_model("CLIPVisionModel", 16, 64, **changes), tmp_path)
    with pytest.raises(UserError, match=message):
        from_parts(config(), image=folder)


def test_what_is_no_whole_checkpoint_is_refused(tmp_path):
    def refused(message: str, **settings) -> None:
        with pytest.raises(UserError, match=message):
            from_parts(config(), image=tmp_path, **settings)

    with pytest.raises(UserError, match="nothing to start from"):
        from_parts(config())
    with pytest.raises(UserError, match="no such folder"):
        from_parts(config(), image=tmp_path / "none")
    refused("not a checkpoint: it has no config.json")
    (tmp_path / "config.json").write_text("{")
    refused("config.json: not JSON")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused("model_type 'bert' is not supported, choose one of clip, ")
    saved(image_model("ViTModel", 16, 64), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("model.safetensors: damaged, or not a safetensors file")
    (tmp_path / "model.safetensors").unlink()
    refused("no weights found: expected model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    refused("pytorch_model.bin: damaged, or contains more than weights", allow_pickle=True)


def test_half_a_checkpoint_is_refused_by_the_tensor_it_lacks(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(image_model("ViTModel", 16, 64), tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="lacks the tensor encoder.layer.1.output.dense.weight"):
        from_parts(config(), image=folder)
    sharded = saved(image_model("ViTModel", 16, 64), tmp_path / "sharded", max_shard_size="40KB")
    sorted(sharded.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(UserError, match=r"shard model-.*safetensors of model.safetensors.index.json is missing"):
        from_parts(config(), image=sharded)


def test_a_config_without_2d_patches_and_too_small_an_image_size_are_refused(tmp_path):
    folder = saved(image_model("ViTModel", 16, 64), tmp_path)
    video = {"image_size": 64, "tubes": [{"kernel": (4, 16, 16), "stride": (4, 8, 8)}]}
    with pytest.raises(UserError, match="video.tubes has 0 tubes whose kernel is 1 frame long"):
        from_parts(config(video=video), image=folder)
    with pytest.raises(UserError, match="frames of 8 pixels are smaller than the source's patches of 16 pixels"):
        from_parts(config(), image=folder, image_size=8)


def test_moving_a_model_later_is_the_same_as_starting_at_that_image_size(tmp_path):
    folder = saved(image_model("CLIPVisionModel", 16, 64), tmp_path)
    moved, _ = from_parts(config(), image=folder)
    moved.set_image_size(96)
    direct, _ = from_parts(config(), image=folder, image_size=96)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(our_features(moved, images), our_features(direct, images))
