"""A recipe trains on any data set that there is an adapter for, from files or out of a tar."""

import io
import json
import shutil
import tarfile

import pytest

from mirasol import MirasolConfig
from mirasol.config.recipe import DataSetRecipe
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.clip_cache import ClipCache
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import Example
from mirasol.data.sampler import pick_target
from mirasol.data.splits import collect_tokenizer_texts, read_split
from mirasol.errors import UserError


@pytest.fixture
def msrvtt(shapes, tmp_path):
    """Two videos with a question each in MSRVTT-QA's format; a third is missing."""
    for number, clip in enumerate(sorted((shapes / "clips" / "train").iterdir())[:2]):
        shutil.copy(clip, tmp_path / f"video{number}.mp4")
    rows = [
        {"answer": "red", "category_id": 1, "id": n, "question": f"what colour is it {n}?", "video_id": n}
        for n in range(3)
    ]
    (tmp_path / "train_qa.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_missing_clip_stops_or_is_listed(msrvtt):
    data = DataSetRecipe(str(msrvtt), dataset="msrvtt_qa")
    with pytest.raises(UserError, match="1 of 3 annotated examples cannot be used, the first: video2: no media file"):
        read_split(data, "train")
    examples, absent = read_split(DataSetRecipe(str(msrvtt), dataset="msrvtt_qa"), "train", "skip")
    assert [example.media for example in examples] == ["video0.mp4", "video1.mp4"]
    assert [(entry.media, entry.start) for entry in absent] == [("video2", None)]


def test_the_folder_is_read_as_ever(shapes):
    assert read_split(DataSetRecipe(str(shapes)), "train") == (read_examples(shapes, "train"), [])


def test_a_split_without_answers_cannot_be_learnt(msrvtt):
    for name in ("train_qa.json", "video0.mp4"):
        (msrvtt / name).rename(msrvtt / {"video0.mp4": "v_abc.mp4"}.get(name, "old.json"))
    question = {"video_name": "abc", "question": "is it red", "question_id": "v_abc_1"}
    (msrvtt / "test_q.json").write_text(json.dumps([question]))
    with pytest.raises(UserError, match="'v_abc_1' has no answer to learn"):
        read_split(DataSetRecipe(str(msrvtt), dataset="activitynet_qa"), "test")


def test_a_recipe_names_dataset_and_options():
    values = {
        "seed": 1,
        "output": "runs/x",
        "data": {"root": "audio", "dataset": "audioset", "options": {"targets": "one"}},
        "stages": {"a": {"steps": 1}},
    }
    recipe = recipe_from_dict(values)
    assert (recipe.data.dataset, recipe.data.options.targets) == ("audioset", "one")
    assert recipe_from_dict(recipe.to_dict()) == recipe
    with pytest.raises(UserError, match="data.options.target'.*did you mean 'data.options.targets'"):
        recipe_from_dict({**values, "data": {"root": "audio", "options": {"target": "one"}}})


def test_a_random_target_is_drawn_anew_and_repeatably():
    example = Example("a", "a.mp4", None, None, "what?", "x", references=("x", "y", "z"), random_target=True)
    drawn = [pick_target(example, 1, "stage", position).target for position in range(60)]
    assert set(drawn) == {"x", "y", "z"}
    assert drawn == [pick_target(example, 1, "stage", position).target for position in range(60)]
    assert collect_tokenizer_texts([example]) == ["what?", "x", "x", "y", "z"]


def test_a_shared_class_list_counts_once_for_the_tokenizer():
    classes = ("red", "blue")
    examples = [Example(str(n), "a.mp4", None, None, "what?", "red", candidates=classes) for n in range(3)]
    assert collect_tokenizer_texts(examples) == ["what?", "red", "red", "blue", "what?", "red", "what?", "red"]


def test_a_tars_member_decodes_to_the_tensors_of_the_file(shapes, tmp_path):
    clip = sorted((shapes / "clips" / "train").iterdir())[0]
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        member = tarfile.TarInfo("00000000.mp4")
        member.size = clip.stat().st_size
        tar.addfile(member, io.BytesIO(clip.read_bytes()))
    settings = MirasolConfig.preset("tiny").media_settings()
    from_tar = ClipCache(tmp_path / "a", tmp_path, settings).load("00000.tar/00000000.mp4")
    from_file = ClipCache(tmp_path / "b", clip.parent, settings).load(clip.name)
    assert all(from_tar[name].equal(from_file[name]) for name in from_file)
