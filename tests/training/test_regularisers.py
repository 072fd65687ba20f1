"""A stage's regularisers: they reach the model and the batches, the same whoever loads them and however a run ends."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.augment import Augment, SpecAugment
from mirasol.config.recipe import Stage
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.memory import count_clip_bytes
from mirasol.cost.plan import find_step_shape
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import ClipExamples, Example
from mirasol.data.loader import ClipAugment, StepBatches, make_loader
from mirasol.data.mixup import add_partners, draw_own_share, find_partner, mix_clips
from mirasol.data.sampler import Batch, BatchPlan
from mirasol.errors import UserError
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.training import trainer
from mirasol.training.trainer import train
from mirasol.training.weights.stages import Regularisers, check_augmentation

CONFIG = MirasolConfig.preset("tiny")
EXTRACTOR = MirasolFeatureExtractor.for_config(CONFIG)
MASKS = {"frequency_masks": 2, "frequency_width": 20, "time_masks": 2, "time_width": 20}
AUGMENT = {"spec_augment": MASKS, "crop": 0.5, "flip": 0.5, "time_shift": 2}


@pytest.fixture
def cache(shared_cache, data_root, examples) -> ClipCache:
    return ClipCache(shared_cache, data_root, CONFIG.media_settings(), {e.media for e in examples})


@pytest.fixture
def augmenting(values):
    """The recipe whose second stage augments and mixes; its five clips come twice."""
    values["stages"]["questions"]["augment"] = AUGMENT | {"mixup": 0.5}
    values["stages"]["questions"]["steps"] = 4
    return recipe_from_dict(values)


def batches_of(recipe, examples, cache, **more) -> StepBatches:
    plan = BatchPlan(recipe, examples)
    return StepBatches(plan, cache, EXTRACTOR, augment=ClipAugment(recipe, EXTRACTOR.image_size), **more)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rates_change_from_stage_to_stage_and_come_back():
    config = MirasolConfig.preset("tiny", vit={"dropout": 0.25}, text={"label_smoothing": 0.1, "vocab_size": 40})
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
    regularisers = Regularisers(model)

    def rates():
        block = model.chunk_encoder.vit.blocks[0]
        stack = model.latent.stack
        assert (config.vit.dropout, config.latent.stack.layer_drop) == (block.dropout.p, stack.layer_drop.rate)
        assert block.attention.dropout == block.dropout.p
        return block.dropout.p, stack.blocks[0].dropout.p, stack.layer_drop.rate, config.text.label_smoothing

    regularisers.enter(Stage(steps=1))
    assert rates() == (0.25, 0.0, 0.0, 0.1)
    regularisers.enter(Stage(steps=1, dropout=0.1, layer_drop=0.3, label_smoothing=0.3))
    assert rates() == (0.1, 0.1, 0.3, 0.3)
    regularisers.enter(Stage(steps=1, dropout=0.0))
    assert rates() == (0.0, 0.0, 0.0, 0.1)
    regularisers.enter(Stage(steps=1))
    assert rates() == (0.25, 0.0, 0.0, 0.1)


def test_the_papers_values_can_be_said(values):
    """Reference 5's recipe for audio and video, and its other one for AudioSet."""
    values["stages"] = {
        "vggsound": {
            "steps": 1, "dropout": 0.1, "layer_drop": 0.3, "label_smoothing": 0.3,
            "augment": {"mixup": 0.5, "spec_augment": {"frequency_masks": 1, "frequency_width": 48, "time_masks": 4}},
        },
        "audioset": {"steps": 1, "augment": {"spec_augment": {
            "frequency_masks": 2, "frequency_width": 36, "time_masks": 4, "time_width": 48}}},
    }  # fmt: skip
    recipe = recipe_from_dict(values)
    check_augmentation(recipe, MirasolConfig.preset("3b"))
    assert recipe.stages["vggsound"].augment.spec_augment.time_width == 48


def test_the_docs_recipe_and_pictures_are_real(values):
    docs = Path(__file__).resolve().parents[2] / "docs"
    page = (docs / "augmentation.md").read_text(encoding="utf-8")
    values["stages"] = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])["stages"]
    stage = recipe_from_dict(values).stages["finetune"]
    for part in (Augment, SpecAugment):
        assert all(f"`{field.name}`" in page or f"{field.name}:" in page for field in dataclasses.fields(part))
    assert stage.augment.mixup == 0.5 and stage.layer_drop == 0.3
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert len(pictures) == 8 and all((docs / picture).is_file() for picture in pictures)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"layer_drop": -0.1}, r"layer_drop=-0.1 must be in \[0, 1\)"),
        ({"label_smoothing": 2}, r"label_smoothing=2.0 must be in \[0, 1\)"),
        ({"clips_per_step": 1, "augment": {"mixup": 0.5}}, "mixup needs another clip in the batch: set clips_per_step"),
        ({"augment": {"mixup": -1}}, "augment.mixup=-1.0 must be at least 0"),
        ({"augment": {"mixp": 1}}, "unknown key 'stages.all.augment.mixp': did you mean 'stages.all.augment.mixup'"),
        ({"augment": {"flip_except": ["left"]}}, "flip_except=.* has no effect without flip"),
        ({"augment": {"spec_augment": {"time_width": 9}}}, "time_width=9 has no effect without time_masks"),
    ],
)
def test_impossible_values_are_refused(values, stage, said):
    values["stages"] = {"all": {"steps": 1} | stage}
    with pytest.raises(UserError, match=said):
        recipe_from_dict(values)


def test_what_the_model_cannot_be_given_is_refused_by_its_stage(values, console):
    values["stages"]["slots"]["augment"] = {"spec_augment": {"frequency_masks": 1, "frequency_width": 65}}
    with pytest.raises(UserError, match=r"^stages\.slots\.augment\..*frequency_width=65 exceeds .* 64 mel bins"):
        train(recipe_from_dict(values), console=console)


def test_a_clip_is_changed_by_seed_epoch_and_clip_alone(augmenting, examples, cache):
    """The order of the clips, their place in a batch and the other stages have no say."""
    change = ClipAugment(augmenting, EXTRACTOR.image_size)
    clips = BatchPlan(augmenting, examples).batch(3).clips
    tensors = cache.load(clips[0].media)
    here = Batch(3, clips, (), 0, (), "questions", (0, 0, 1))
    there = Batch(9, clips[::-1], (), 0, (), "questions", (1, 1, 0))
    first = change(tensors, here, 0)
    assert same(change(tensors, there, 2), first)
    assert not same(change(tensors, dataclasses.replace(here, epochs=(1, 0, 1)), 0), first)
    assert not same(change(tensors, here, 1), first), "another clip"
    assert not same(ClipAugment(dataclasses.replace(augmenting, seed=4), 32)(tensors, here, 0), first)
    assert same(change(tensors, dataclasses.replace(here, stage="slots"), 0), tensors), "a stage that changes nothing"


def test_clips_that_are_asked_about_left_and_right_are_not_mirrored(augmenting, examples, cache):
    """By whole words of any example of the clip, whatever the step asks; other clips are, and nothing else changes."""
    clip = BatchPlan(augmenting, examples).batch(3).clips[0]
    tensors = cache.load(clip.media)

    def changed(prompt: str, target: str, words: list[str]) -> dict[str, torch.Tensor]:
        augment = Augment(flip=1.0, flip_except=words)
        stage = dataclasses.replace(augmenting.stages["questions"], augment=augment)
        recipe = dataclasses.replace(augmenting, stages={"questions": stage})
        own = dataclasses.replace(clip.examples[0], prompt=prompt, target=target, candidates=())
        other = dataclasses.replace(own, prompt="what plays?", target="a bell")
        asked = ClipExamples(clip.media, None, None, (other, own))
        batch = Batch(3, (asked,), ((other,),), 0, (), "questions", (0,))
        return ClipAugment(recipe, EXTRACTOR.image_size)(tensors, batch, 0)

    mirrored = dict(tensors) | {"video": tensors["video"].flip(-1)}
    words = ["left", "right"]
    assert same(changed("Does it move LEFT?", "yes", words), tensors)
    assert same(changed("where to?", "to the right", words), tensors)
    assert same(changed("is it brightly lit?", "what is left over", ["right"]), mirrored), "whole words alone"
    assert same(changed("does it move left?", "yes", []), mirrored)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_are_the_same_whoever_loads_them(augmenting, examples, cache, workers):
    steps = range(3, 7)
    batches = batches_of(augmenting, examples, cache)
    loaded = list(make_loader(batches, steps, workers))
    for step, (batch, media) in reversed(list(zip(steps, loaded, strict=True))):
        expected_batch, expected = batches_of(augmenting, examples, cache)[step]
        assert batch == expected_batch
        assert same(media, expected)


def test_a_share_of_the_rows_is_what_it_is_in_the_whole(augmenting, examples, cache):
    """Processes that load a slice each see the same mixes, though a partner may lie in another's slice."""
    whole_batch, whole = batches_of(augmenting, examples, cache)[4]
    for rows in ([0], [2], [1, 2], [2, 0]):
        batch, media = batches_of(augmenting, examples, cache, rows=lambda _, rows=rows: rows)[4]
        assert batch.select_rows(range(len(rows))) == whole_batch.select_rows(rows) == batch
        for name, value in media.items():
            assert torch.equal(value, whole[name][rows][:, : value.shape[1]]), name
            assert not whole[name][rows][:, value.shape[1] :].any(), "no more than padding was cut off"


def test_without_augmentation_batches_are_what_they_were(recipe, examples, cache):
    batch, media = batches_of(recipe, examples, cache)[4]
    plain_batch, plain = StepBatches(BatchPlan(recipe, examples), cache, EXTRACTOR)[4]
    assert batch == plain_batch and same(media, plain)
    assert batch.row_weights is None and batch.partners == ()


def test_cropped_clips_are_decoded_larger(values, examples, cache, tmp_path):
    values["stages"]["questions"]["augment"] = {"crop": 0.5}
    recipe = recipe_from_dict(values)
    batches = batches_of(recipe, examples, cache)
    assert (batches.caches["slots"], batches.caches["questions"].settings["image_size"]) == (cache, 46)
    assert batches[4][1]["video"].shape[-2:] == (32, 32)


def media_of(lengths, has_video, has_audio) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    clips, longest = len(lengths), max(lengths)
    chunk_mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    video_mask, audio_mask = (chunk_mask & torch.tensor(there)[:, None] for there in (has_video, has_audio))
    video = torch.randn(clips, longest, 2, 3, 4, 4) * video_mask[:, :, None, None, None, None]
    audio = torch.randn(clips, longest, 4, 8) * audio_mask[:, :, None, None]
    masks = {"chunk_mask": chunk_mask, "video_mask": video_mask, "audio_mask": audio_mask}
    return {"video": video, "audio": audio, **masks}


def batch_of(clips: int) -> Batch:
    rows = [Example(f"q{row}", f"{row}.mp4", None, None, f"p{row}", f"t{row}", "kind") for row in range(clips)]
    groups = tuple(ClipExamples(row.media, None, None, (row,)) for row in rows)
    return Batch(0, groups, tuple((row,) for row in rows), 0, (None,) * clips, "all", (0,) * clips, tuple(range(clips)))


def test_mixed_clips_keep_their_length_and_modalities():
    """Clip 0 is longer than its partner 1; clip 1 has no sound, clip 2 no picture, so those two share nothing."""
    media = media_of([4, 2, 3], [True, True, False], [True, False, True])
    before = {name: value.clone() for name, value in media.items()}
    batch, result = mix_clips(batch_of(3), media, range(3), range(3), 3, [0.7, 0.8, 0.9])
    assert same(media, before)
    assert all(torch.equal(result[name], media[name]) for name in ("chunk_mask", "video_mask", "audio_mask"))
    torch.testing.assert_close(result["video"][0, :2], 0.7 * media["video"][0, :2] + 0.3 * media["video"][1, :2])
    assert torch.equal(result["video"][0, 2:], media["video"][0, 2:]), "where the partner has ended"
    assert torch.equal(result["audio"][0], media["audio"][0]), "whose partner has no sound"
    assert torch.equal(result["video"][1], media["video"][1]) and torch.equal(result["audio"][1], media["audio"][1])
    torch.testing.assert_close(result["audio"][2, :3], 0.9 * media["audio"][2, :3] + 0.1 * media["audio"][0, :3])
    assert not result["video"][2].any() and not result["audio"][1].any(), "nothing comes where a clip has nothing"
    assert batch.shares == (0.7, 1.0, 0.9), "what cannot be mixed has no share in another's answers"


def test_mixed_batches_ask_both_clips_questions_in_their_shares():
    media = media_of([2, 2], [True, True], [True, True])
    batch, _ = mix_clips(batch_of(2), media, range(2), range(2), 2, [0.75, 0.5])
    assert batch.prompts == [["p0", "p1"], ["p1", "p0"]]
    assert batch.targets == [["t0", "t1"], ["t1", "t0"]]
    assert batch.row_weights == [0.75, 0.25, 0.5, 0.5]
    assert batch.select_rows([1]).row_weights == [0.5, 0.5] and batch.select_rows([1]).prompts == [["p1", "p0"]]


def test_the_plan_counts_the_partners_rows_and_the_larger_pictures(values):
    given = Assumptions(chunks=6)
    plain = find_step_shape(recipe_from_dict(values), "questions", CONFIG, given, None, [])
    values["stages"]["questions"]["augment"] = {"mixup": 0.5}
    mixing = find_step_shape(recipe_from_dict(values), "questions", CONFIG, given, None, [])
    assert mixing == dataclasses.replace(plain, questions=2 * plain.questions)
    assert count_clip_bytes(CONFIG, 6, crop=0.5) - count_clip_bytes(CONFIG, 6) == 6 * 4 * 3 * (46**2 - 32**2)


def test_partners_are_others_and_are_loaded_once():
    for clips in range(2, 6):
        assert sorted(find_partner(row, clips) for row in range(clips)) == list(range(clips))
        assert all(find_partner(row, clips) != row for row in range(clips))
    assert add_partners([0, 1], 4) == [0, 1, 2] and add_partners([3], 4) == [3, 0]
    assert add_partners(range(4), 4) == [0, 1, 2, 3]


def test_shares_are_those_of_the_beta_distribution():
    shares = torch.tensor([draw_own_share(0.5, seed) for seed in range(4000)])
    assert shares.min() >= 0.5 and draw_own_share(0.5, 3) == draw_own_share(0.5, 3)
    # The larger half of Beta(1/2, 1/2), the arcsine distribution: its mean is 1/2 + 1/pi.
    assert shares.mean() == pytest.approx(0.5 + 1 / torch.pi, abs=0.01)


def logged(folder) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    moving = ("seconds", "clips_per_second", "data_wait")
    return [{key: value for key, value in line.items() if key not in moving} for line in lines]


@pytest.mark.usefixtures("forked_helpers")
def test_a_regularised_run_resumes_to_the_same_bits(values, console, tmp_path, monkeypatch):
    """With everything on, and with another number of workers after the interruption."""
    text = values["model"]["overrides"]["text"]["stack"] | {"depth": 2}
    values["model"]["overrides"] = values["model"]["overrides"] | {"text": {"stack": text}}
    values["stages"]["slots"] |= {"dropout": 0.0, "steps": 1}
    values["stages"]["questions"] |= {
        "dropout": 0.2, "layer_drop": 0.2, "label_smoothing": 0.1, "augment": AUGMENT | {"mixup": 0.5}, "steps": 4,
    }  # fmt: skip
    values |= {"validate_every": 10}
    whole = train(recipe_from_dict(values | {"output": str(tmp_path / "whole")}), console=console)

    class Killed(Exception):
        pass

    values["output"] = str(tmp_path / "cut")
    take_step = trainer.training_step

    def killing(run, batch):
        if batch.step == 3:
            raise Killed
        return take_step(run, batch)

    monkeypatch.setattr(trainer, "training_step", killing)
    with pytest.raises(Killed):
        train(recipe_from_dict(values), console=console)
    monkeypatch.undo()
    cut = train(recipe_from_dict(values | {"workers": 1}), resume=True, console=console)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert logged(whole.parent) == logged(cut.parent)
    config = json.loads((whole / "config.json").read_text())
    assert (config["vit"]["dropout"], config["latent"]["stack"]["layer_drop"]) == (0.2, 0.2), "as the last stage said"
    assert config["text"]["label_smoothing"] == 0.1
