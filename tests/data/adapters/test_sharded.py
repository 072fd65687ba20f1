"""Shards that are no longer what was written: what is left is read, what is lost is counted, nothing mistaken."""

import io
import json
import shutil
import tarfile

import pytest

from mirasol.data.check import check_dataset
from mirasol.data.datasets.contract import AnnotationError
from mirasol.data.datasets.registry import list_splits, read_dataset
from mirasol.data.media_files import get_index_path, open_media_file, read_member, read_tar_index
from mirasol.data.shards.write import Sharding, shard_dataset
from mirasol.errors import BadClip, UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory, shapes):
    """Four clips in two shards: two questions on each clip of the first, one on each of the second."""
    root = tmp_path_factory.mktemp("made")
    clips = sorted((shapes / "clips").glob("*/*.mp4"))[:4]
    rows = [{"file": f"{k % 4}.mp4", "prompt": f"what {k}?", "target": "red"} for k in range(6)]
    (root / "data").mkdir()
    (root / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, clip in enumerate(clips):
        shutil.copy(clip, root / "data" / f"{number}.mp4")
    shard_dataset("folder", root / "data", root / "shards", sharding=Sharding(clips_per_shard=2))
    return root / "shards"


@pytest.fixture
def shards(made, tmp_path):
    shutil.copytree(made, tmp_path / "shards")
    return tmp_path / "shards"


def errors(dataset) -> list[tuple[str, str, int]]:
    return [(p.kind, p.file, p.examples) for p in dataset.problems if p.severity == "error"]


def cut(tar, length: int) -> None:
    tar.write_bytes(tar.read_bytes()[:length])


def without(tar, name: str) -> None:
    """Writes the tar anew, without one of its members."""
    with tarfile.open(tar) as old:
        members = [(m, old.extractfile(m).read()) for m in old.getmembers() if m.name != name]
    with tarfile.open(tar, "w") as new:
        for member, content in members:
            new.addfile(member, io.BytesIO(content))


def test_a_whole_set_has_no_problems(shards):
    dataset = read_dataset("shards", shards, "train")
    assert (dataset.problems, len(dataset.examples)) == ((), 6)
    assert check_dataset("shards", shards, hashes=True).good


@pytest.mark.parametrize("place", ["second", "first", "none"])
def test_of_a_shard_cut_short_whole_members_are_read(shards, place):
    tar = shards / "train" / "00000.tar"
    offset, size = read_tar_index(tar).members["000000001.mp4" if place == "second" else "000000000.mp4"]
    cut(tar, offset + size // 2 if place != "none" else 100)
    dataset = read_dataset("shards", shards, "train")
    lost = 2 if place == "second" else 4
    assert errors(dataset) == [("cut short", "train/00000.tar", lost)]
    assert dataset.reasons == {"cut short": lost} and len(dataset.examples) == 6 - lost
    for example in dataset.examples:
        with open_media_file(shards, example.media) as path:
            assert path.stat().st_size > 1000
    report = check_dataset("shards", shards)
    assert not report.good and report.media["n_usable"] == 6 - lost
    assert report.media["n_annotated"] == 6 == report.media["n_usable"] + sum(report.media["reasons"].values())


def test_a_missing_shard_and_a_missing_member_are_counted(shards):
    (shards / "train" / "00000.tar").unlink()
    without(shards / "train" / "00001.tar", "000000003.mp4")
    dataset = read_dataset("shards", shards, "train")
    assert errors(dataset) == [("missing shard", "train/00000.tar", 4), ("missing member", "train/00001.tar", 1)]
    [example] = dataset.examples
    assert example.media == "train/00001.tar/000000002.mp4"
    with open_media_file(shards, example.media) as path:  # where it lies now, not where the index says
        assert path.read_bytes()[4:8] == b"ftyp"


def test_without_its_index_a_tar_is_read_by_its_headers(shards):
    get_index_path(shards / "train" / "00000.tar").unlink()
    dataset = read_dataset("shards", shards, "train")
    assert [(p.kind, p.severity) for p in dataset.problems] == [("no index", "warning")]
    assert len(dataset.examples) == 6
    assert read_member(shards / "train" / "00000.tar", "000000001.mp4", 8)[4:] == b"ftyp"
    assert check_dataset("shards", shards).good


def test_an_index_of_another_tar_gives_an_error_and_no_other_clip(shards):
    tar = shards / "train" / "00000.tar"
    index = json.loads(get_index_path(tar).read_text())
    first, second = (index["members"][name] for name in ("000000000.mp4", "000000001.mp4"))
    index["members"] |= {"000000000.mp4": second, "000000001.mp4": first}
    get_index_path(tar).write_text(json.dumps(index))
    with pytest.raises(BadClip, match="is not where its index says"):
        read_member(tar, "000000000.mp4")
    assert ("wrong index", "train/00000.tar") in [(p.kind, p.file) for p in check_dataset("shards", shards).problems]


def test_changed_bytes_are_found_by_their_hash(shards):
    tar = shards / "train" / "00000.tar"
    offset, size = read_tar_index(tar).members["000000001.mp4"]
    content = bytearray(tar.read_bytes())
    content[offset + size - 9] ^= 255
    tar.write_bytes(content)
    assert check_dataset("shards", shards).good  # it still opens
    report = check_dataset("shards", shards, hashes=True)
    assert [(p.kind, p.file, p.examples) for p in report.problems] == [
        ("wrong hash", "train/00000.tar/000000001.mp4", 2)
    ]
    assert report.media["n_usable"] == 4


def test_examples_or_manifest_that_are_not_what_was_written_stop(shards):
    examples = shards / "train" / "examples.jsonl"
    whole = examples.read_bytes()
    cut(examples, len(whole) // 2)
    with pytest.raises(AnnotationError, match="train/examples.jsonl: is not what was written .* cut short or changed"):
        read_dataset("shards", shards, "train")
    examples.unlink()
    with pytest.raises(AnnotationError, match="train/examples.jsonl: no such file"):
        read_dataset("shards", shards, "train")
    examples.write_bytes(whole)
    manifest = shards / "manifest.json"
    written = manifest.read_text()
    manifest.write_text(written.replace('"shards"', '"tars"'))
    with pytest.raises(AnnotationError, match="not a manifest of shards"):
        read_dataset("shards", shards, "train")
    manifest.write_text(written[:100])
    with pytest.raises(AnnotationError, match="manifest.json: is not JSON"):
        list_splits("shards", shards)
    manifest.write_text(written.replace('"format": 1', '"format": 9', 1))
    with pytest.raises(UserError, match="shards of format 9, this version reads format 1"):
        list_splits("shards", shards)
    manifest.unlink()
    with pytest.raises(UserError, match="no annotation file of shards"):
        list_splits("shards", shards)


def test_media_outside_of_the_shards_is_refused(shards):
    import hashlib

    examples, manifest = shards / "train" / "examples.jsonl", shards / "manifest.json"
    before = hashlib.sha256(examples.read_bytes()).hexdigest()
    examples.write_text(examples.read_text().replace("train/00000.tar/000000000.mp4", "../data/0.mp4"))
    after = hashlib.sha256(examples.read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(before, after))
    with pytest.raises(AnnotationError, match=r"line 1: is no example \(media '../data/0.mp4' is in no shard\)"):
        read_dataset("shards", shards, "train")


def test_hashes_are_for_shards_alone(shapes):
    with pytest.raises(UserError, match="only shards have hashes"):
        check_dataset("folder", shapes, hashes=True)
