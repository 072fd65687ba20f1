"""A run on shards is the run on the folder that they were made from."""

import pytest
import torch

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.shards.write import Sharding, shard_dataset
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train

MEASURED = ("clips_per_second", "data_wait", "seconds")


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_training_on_shards_is_training_on_the_folder(values, data_root, tmp_path, console):
    shard_dataset("folder", data_root, tmp_path / "shards", sharding=Sharding(clips_per_shard=2))
    values["stages"]["questions"]["augment"] = {"flip": 0.5, "time_shift": 2}
    values["stages"]["slots"]["steps"] = values["stages"]["questions"]["steps"] = 2
    logs = []
    for name, data in (("folder", {}), ("shards", {"dataset": "shards", "root": str(tmp_path / "shards")})):
        run = {**values, "output": str(tmp_path / name), "data": {**values["data"], **data}}
        folder = train(recipe_from_dict(run), console=console)
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        logs.append(
            [
                {key: value for key, value in row.items() if key not in MEASURED}
                for row in rows
                if row["kind"] != "samples"
            ]
        )
        assert (folder / "model.safetensors").is_file()
    assert logs[0] == logs[1]
    weights = [(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("folder", "shards")]
    assert weights[0] == weights[1]
