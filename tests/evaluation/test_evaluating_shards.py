"""Shards give the numbers of the data set that they were made from."""

import dataclasses

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.registry import read_dataset
from mirasol.data.shards.write import Sharding, shard_dataset
from mirasol.evaluation.answer import AnswerSettings
from mirasol.evaluation.baselines import read_training_examples
from mirasol.evaluation.evaluate import evaluate_dataset


def test_evaluation_on_shards_is_evaluation_on_the_folder(loaded, shapes, tmp_path):
    shard_dataset("folder", shapes, tmp_path / "shards", sharding=Sharding(clips_per_shard=2))
    found = []
    for name, root in (("folder", shapes), ("shards", tmp_path / "shards")):
        dataset = read_dataset(name, root, "test")
        found.append(evaluate_dataset(loaded, dataset, AnswerSettings(dataset.root, max_new_tokens=3)))
    folder, shards = found
    assert folder.predictions == shards.predictions
    assert folder.record["protocols"] == shards.record["protocols"]
    assert folder.record["counts"] == shards.record["counts"]
    known, where = read_training_examples(read_dataset("shards", tmp_path / "shards", "test"), DatasetOptions())
    assert len(known) > 5 and "none" not in where  # what guessing scores is found in the shards, too
    assert shards.record["source"] == "folder"
    assert [dataclasses.replace(e, media="", video="") for e in folder.examples] == [
        dataclasses.replace(e, media="", video="") for e in shards.examples
    ]
    assert [e.video_name for e in folder.examples] == [e.video_name for e in shards.examples]
