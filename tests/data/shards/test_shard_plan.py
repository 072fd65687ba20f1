"""What goes into which shard: no shard above its limits, larger media alone, all of it told before it is written."""

import json

import pytest

from mirasol.cli.main import main
from mirasol.data.shards.plan import Sharding, plan_shards
from mirasol.data.shards.write import write_shards


def put_sizes(root, sizes) -> None:
    """A folder of media of these sizes, which nothing opens before they are packed."""
    root.mkdir()
    rows = [{"file": f"{number}.mp4", "prompt": "what?", "target": "red"} for number in range(len(sizes))]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    for number, size in enumerate(sizes):
        (root / f"{number}.mp4").write_bytes(bytes(size))


@pytest.mark.parametrize(
    ("sizes", "limits", "shards"),
    [
        ([40, 50, 20, 90, 10, 1], (100, 9), [[0, 1], [2], [3, 4], [5]]),
        ([40, 300, 20, 101, 50], (100, 9), [[0], [1], [2], [3], [4]]),
        ([300, 100, 100], (100, 9), [[0], [1], [2]]),
        ([1, 1, 1, 1, 1], (100, 2), [[0, 1], [2, 3], [4]]),
    ],
)
def test_no_shard_is_above_its_limits_unless_one_medium_is(tmp_path, sizes, limits, shards):
    put_sizes(tmp_path / "data", sizes)
    plan = plan_shards("folder", tmp_path / "data", tmp_path / "out", sharding=Sharding(*limits))
    packed = [[int(sample.media.removesuffix(".mp4")) for sample in job.samples] for job in plan.jobs["train"]]
    assert packed == shards
    assert plan.bytes == plan.count_bytes_left() == sum(sizes)
    assert plan.larger == {f"{n}.mp4": size for n, size in enumerate(sizes) if size > limits[0]}
    assert not (tmp_path / "out").exists()


def test_the_plan_is_what_is_written(tmp_path, shapes):
    plan = plan_shards("folder", shapes, tmp_path / "out", "test", sharding=Sharding(shard_bytes=150_000))
    assert len(plan.jobs["test"]) > 2
    done = write_shards(plan)
    assert (done.shards, done.clips) == (len(plan.jobs["test"]), {"test": len(plan.sizes["test"])})
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["test"]["shards"]
    for job in plan.jobs["test"]:
        members = json.loads((tmp_path / "out" / job.name).with_suffix(".index.json").read_text())["members"]
        media = sum(size for name, (_, size, _) in members.items() if name.endswith(".mp4"))
        assert media == sum(plan.sizes["test"][sample.media] for sample in job.samples) <= 150_000
        assert facts[job.name]["clips"] == len(job.samples)
    assert plan.count_bytes_left() == 0


def test_bytes_and_larger_media_are_told_before_anything_is_written(tmp_path, capsys):
    put_sizes(tmp_path / "data", [2_000_000, 400_000, 500_000])
    command = ["data", "shard", "folder", str(tmp_path / "data"), str(tmp_path / "out"), "--shard-bytes", "1000000"]
    main([*command, "--dry-run"])
    told = capsys.readouterr().err
    assert "train: 3 clips, 2.9 MB, into 2 shards of at most 1.0 MB and 10000 clips each\n" in told
    assert "larger than a shard may be, so alone in one: 0.mp4 (2.0 MB)\n" in told
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main([*command, "--processes", "1"])  # none of them is a video
    assert told in capsys.readouterr().err


def test_a_disk_without_room_is_told(tmp_path, monkeypatch, capsys):
    put_sizes(tmp_path / "data", [2_000_000])
    monkeypatch.setattr("mirasol.data.shards.plan.ShardPlan.find_free_bytes", lambda plan: 1_500_000)
    main(["data", "shard", "folder", str(tmp_path / "data"), str(tmp_path / "out"), "--dry-run"])
    assert f"{tmp_path / 'out'}: 2.0 MB are to be written, but its disk has 1.5 MB free" in capsys.readouterr().err
