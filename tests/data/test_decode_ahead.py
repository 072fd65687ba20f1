"""Decoding ahead: the same tensors without a cache, and what becomes of clips that turn out to be bad on the way."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from media_making import Video, ramp, steady, write_media

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.clip_cache import ClipCache, UnreadableWindow
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import Example
from mirasol.data.loader import StepBatches, make_loader
from mirasol.data.sampler import BatchPlan
from mirasol.errors import UserError
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train

SETTINGS = MirasolConfig.preset("tiny").media_settings()
PAGE = "<!DOCTYPE html>\n<html><body>Sign in to confirm you are not a bot</body></html>\n"


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def mixed_root(data_root, examples, tmp_path) -> Path:
    """A folder of what downloads leave behind: three clips, a page, a webm called mp4, a tar that was cut short."""
    root = tmp_path / "mixed"
    root.mkdir()
    media = list(dict.fromkeys(example.media for example in examples))
    for number in range(3):
        shutil.copy(data_root / media[number], root / f"good{number}.mp4")
    (root / "page.mp4").write_text(PAGE)
    write_media(root / "real.webm", Video(ramp(25), steady(25, 25), codec="libvpx-vp9"))
    (root / "real.webm").rename(root / "webm.mp4")
    with tarfile.open(root / "whole.tar", "w") as tar:
        tar.add(root / "good0.mp4", "a.mp4")
        tar.add(root / "good1.mp4", "b.mp4")
    whole = (root / "whole.tar").read_bytes()
    (root / "cut.tar").write_bytes(whole[: (root / "good0.mp4").stat().st_size + 4096])
    return root


GOOD = ("good0.mp4", "good1.mp4", "good2.mp4", "webm.mp4", "whole.tar/a.mp4", "cut.tar/a.mp4")
BAD = {
    "page.mp4": "not a media file|html|page",
    "cut.tar/b.mp4": "has no member b.mp4",
    "absent.mp4": "no such file",
}


def batches_of(values, root: Path, media, **options) -> StepBatches:
    values["stages"] = {"all": {"steps": 6, "clips_per_step": 4, "questions_per_clip": 1}}
    values["data"] = {"root": str(root), "decode": "ahead"}
    examples = [Example(name, name, None, None, "what?", name) for name in media]
    plan = BatchPlan(recipe_from_dict(values), examples)
    return StepBatches(plan, ClipCache(None, root, SETTINGS), MirasolFeatureExtractor(**SETTINGS), **options)


def test_what_is_decoded_ahead_is_what_a_cache_gives(cached_batches, ahead_batches):
    for step in range(4):
        (batch, media), (other, decoded) = cached_batches[step], ahead_batches[step]
        assert batch == other
        assert same(media, decoded)


@pytest.fixture
def cached_batches(values, examples, data_root, shared_cache) -> StepBatches:
    values["stages"] = {"all": {"steps": 4, "clips_per_step": 3, "questions_per_clip": 2}}
    recipe = recipe_from_dict(values)
    cache = ClipCache(shared_cache, data_root, SETTINGS)
    return StepBatches(BatchPlan(recipe, examples), cache, MirasolFeatureExtractor(**SETTINGS))


@pytest.fixture
def ahead_batches(cached_batches, data_root, tmp_path) -> StepBatches:
    """The same without a cache, and its examples in files."""
    plan = cached_batches.plan.store(tmp_path / "examples")
    return StepBatches(plan, ClipCache(None, data_root, SETTINGS), MirasolFeatureExtractor(**SETTINGS))


@pytest.mark.parametrize("name", GOOD)
def test_content_counts_and_not_the_name(values, mixed_root, name):
    _, media = batches_of(values, mixed_root, [name])[0]
    assert media["video_mask"].any()


@pytest.mark.parametrize(("name", "reason"), BAD.items())
def test_a_bad_clip_is_named(values, mixed_root, name, reason):
    with pytest.raises(UnreadableWindow, match=reason) as caught:
        list(make_loader(batches_of(values, mixed_root, [*GOOD, name]), range(6), 0))
    assert name in str(caught.value)
    assert caught.value.window.media == name


@pytest.mark.usefixtures("forked_helpers")
def test_bad_clips_are_replaced_the_same_way_whoever_loads_the_step(values, mixed_root):
    media = [*GOOD, *BAD]
    one, two = (batches_of(values, mixed_root, media, on_bad="skip") for _ in range(2))
    forwards = [one[step] for step in range(6)]
    backwards = [two[step] for step in reversed(range(6))][::-1]
    replaced = []
    for step, ((batch, tensors), (other, again)) in enumerate(zip(forwards, backwards, strict=True)):
        assert batch == other
        assert same(tensors, again)
        assert {clip.media for clip in batch.clips} <= set(GOOD)
        assert batch.prompts == [["what?"]] * 4
        assert batch.targets == [[clip.media] for clip in batch.clips], "a clip keeps its own examples"
        planned = one.plan.batch(step)
        for clip, wanted in zip(batch.clips, planned.clips, strict=True):
            assert clip == wanted or wanted.media in BAD, "good clips stay where they are"
        replaced += batch.replaced
    assert {bad.media for bad in replaced} == set(BAD)
    assert all(bad.reason for bad in replaced)


def test_replacing_ends_where_nothing_can_be_read(values, tmp_path):
    batches = batches_of(values, tmp_path, [f"{number}.mp4" for number in range(30)], on_bad="skip")
    with pytest.raises(UserError, match=r"step 1: 21 clips in a row cannot be read, the last is .*no such file"):
        batches[0]


@pytest.mark.usefixtures("forked_helpers")
def test_a_workers_error_is_the_line_it_would_be_without(values, mixed_root):
    batches = batches_of(values, mixed_root, ["absent.mp4"])
    with pytest.raises(UnreadableWindow) as here:
        batches[0]
    with pytest.raises(UnreadableWindow) as there:
        list(make_loader(batches, range(2), 1))
    assert str(there.value) == str(here.value)
    assert there.value.window == here.value.window


@pytest.fixture
def run_root(data_root, tmp_path) -> Path:
    """A data set of your own with one training clip that is a page."""
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    (root / next(row["file"] for row in rows if row.get("start") is None)).write_text(PAGE)
    return root


@pytest.mark.usefixtures("forked_helpers")
def test_a_run_lists_and_counts_what_it_replaced(values, run_root, console):
    values["data"] = {"root": str(run_root), "decode": "ahead", "on_bad_clip": "skip"}
    values["stages"] = {"questions": {"steps": 6, "clips_per_step": 3, "questions_per_clip": 1}}
    folder = train(recipe_from_dict(values), console=console).parent
    listed = [json.loads(line) for line in (folder / "bad_clips.jsonl").read_text().splitlines()]
    assert len(listed) == 1
    assert listed[0]["step"] > 0
    trained = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert sum(line["replaced_clips"] for line in trained) >= 1
    assert trained[listed[0]["step"] - 1]["replaced_clips"] == 1
    assert not (folder / "examples").exists()
    stored = list((folder / "cache").rglob("*.safetensors"))
    assert 0 < len(stored) <= values["validation_clips"], "only validation's clips are kept"

    other = {**values, "output": values["output"] + "-stopped"}
    other["data"] = {**values["data"], "on_bad_clip": "error"}
    with pytest.raises(UnreadableWindow, match=r"\.mp4: "):
        train(recipe_from_dict(other), console=console)
    listed_there = json.loads((Path(other["output"]) / "bad_clips.jsonl").read_text())
    assert listed_there == listed[0]


@pytest.mark.usefixtures("forked_helpers")
def test_a_run_that_replaced_clips_resumes_to_the_same_weights(values, run_root, console):
    values["data"] = {"root": str(run_root), "decode": "ahead", "on_bad_clip": "skip", "cache": None}
    values["stages"] = {"questions": {"steps": 6, "clips_per_step": 3, "questions_per_clip": 1}}
    checkpoint = train(recipe_from_dict(values), console=console)
    weights = (checkpoint / "model.safetensors").read_bytes()
    listed = (checkpoint.parent / "bad_clips.jsonl").read_text()
    shutil.rmtree(checkpoint)
    shutil.rmtree(checkpoint.parent / "checkpoints" / "step-00000006")
    again = train(recipe_from_dict(values), resume=True, console=console)
    assert (again / "model.safetensors").read_bytes() == weights
    assert (again.parent / "bad_clips.jsonl").read_text() == listed


@pytest.mark.usefixtures("forked_helpers")
def test_a_file_that_went_away_is_told_on_resumption_which_goes_on_once_it_is_back(values, run_root, console):
    """Other clips would come up in its place than in the run that began."""
    values["data"] = {"root": str(run_root), "decode": "ahead", "on_bad_clip": "skip"}
    values["stages"] = {"questions": {"steps": 4, "clips_per_step": 3, "questions_per_clip": 1}}
    recipe = recipe_from_dict(values)
    checkpoint = train(recipe, console=console)
    weights = (checkpoint / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoint)
    shutil.rmtree(checkpoint.parent / "checkpoints" / "step-00000004")
    medium = read_examples(run_root, "train")[-1].media
    (run_root / medium).rename(run_root / "elsewhere.mp4")
    with pytest.raises(UserError, match=rf"1 are missing, {medium} first.*: restore its data"):
        train(recipe, resume=True, console=console)
    (run_root / "elsewhere.mp4").rename(run_root / medium)
    assert (train(recipe, resume=True, console=console) / "model.safetensors").read_bytes() == weights


def test_a_limit_needs_a_cache_that_fills_on_the_way(values):
    for data in ({"cache_limit": 1.0}, {"cache_limit": 1.0, "decode": "ahead", "cache": None}):
        with pytest.raises(UserError, match="data.cache_limit=1 has no effect"):
            recipe_from_dict({**values, "data": {**values["data"], **data}})
    recipe_from_dict({**values, "data": {**values["data"], "cache_limit": 0.5, "decode": "ahead"}})
