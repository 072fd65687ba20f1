"""`mirasol data shard`: the same examples and bytes out of tars, made once, gone on with after a kill."""

import dataclasses
import errno
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest

from mirasol.cli.main import main
from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.registry import list_splits, read_dataset
from mirasol.data.media_files import get_index_path, open_media_file, read_member, read_tar_index
from mirasol.data.shards import write as sharding
from mirasol.data.shards.format import ShardJob
from mirasol.data.shards.write import Sharding, shard_dataset, write_row
from mirasol.data.shards.write_shard import write_shard
from mirasol.errors import UserError
from mirasol.media.transcode import Reencoding

SOURCE_FOLDER = Path(__file__).resolve().parents[3] / "src"


@pytest.fixture(scope="session")
def clips(shapes) -> list[Path]:
    return sorted((shapes / "clips").glob("*/*.mp4"))


def put(root: Path, name: str, content: str | Path = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copy(content, path)
    else:
        path.write_text(content)


def put_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), shade, np.uint8), format="rgb24")
    with av.open(str(path), "w", format="image2") as out:
        stream = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb24"
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def msrvtt(root: Path, clips) -> None:
    """Several questions on one video, a video that is not there, rows that are wrong."""
    rows = [
        {"answer": "red", "category_id": 1, "id": k, "question": f"what is {k}?", "video_id": k % 3} for k in range(7)
    ]
    put(root, "val_qa.json", json.dumps([*rows, rows[0], {"answer": 3}]))
    put(root, "test_qa.json", json.dumps([{**rows[2], "id": 70}]))
    put(root, "videos/video1.mp4", clips[0])
    put(root, "videos/video2.mp4", clips[1])


def vggsound(root: Path, clips) -> None:
    """Cut clips, and a whole video of which two windows are asked about; 309 candidates stand for themselves."""
    names = ["--aaaaaaaaa", "--bbbbbbbbb"]
    put(
        root,
        "vggsound.csv",
        f"{names[0]},0,dog,test\n{names[1]},30,cat,test\n{names[0]},1,cat,test\n{names[1]},2,dog,train\n",
    )
    put(root, "stat.csv", "dog,1,animal\ncat,2,animal")
    put(root, f"{names[0]}.mp4", clips[0])
    put(root, f"{names[1]}_000030.mp4", clips[2])
    put(root, f"{names[1]}_000002.mp4", clips[3])


def image_text(root: Path, clips) -> None:
    put(root, "train.csv", "filepath,caption\na.png,a dark one\nb.png,a bright one\na.png,the dark one again\n")
    put_image(root / "a.png", 30)
    put_image(root / "b.png", 220)


def folder(root: Path, clips) -> None:
    """Windows, candidates, question types and ids of the user's own."""
    rows = [
        {
            "file": "x/a.mp4",
            "prompt": "what?",
            "target": "red",
            "candidates": ["red", "blue"],
            "question_type": "sight",
        },
        {"file": "x/b.mp4", "prompt": "when?", "target": "now", "start": 0.1, "end": 1 / 3, "id": "own"},
        {"file": "x/a.mp4", "prompt": "wer?", "target": "grün"},
    ]
    put(root, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    put(root, "x/a.mp4", clips[0])
    put(root, "x/b.mp4", clips[1])


SETS = {"folder": folder, "msrvtt_qa": msrvtt, "vggsound": vggsound, "image_text": image_text}


def content(root: Path, media: str) -> bytes:
    with open_media_file(root, media) as path:
        return path.read_bytes()


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture
def packed(tmp_path, clips):
    """Three clips with six questions, in two shards."""
    root, out = tmp_path / "data", tmp_path / "shards"
    rows = [{"file": f"{k % 3}.mp4", "prompt": f"what {k}?", "target": "red", "id": str(k)} for k in range(6)]
    put(root, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for k in range(3):
        put(root, f"{k}.mp4", clips[k])
    shard_dataset("folder", root, out, sharding=Sharding(clips_per_shard=2))
    return out


@pytest.mark.parametrize("name", SETS)
def test_shards_are_read_as_what_they_were_made_from(tmp_path, clips, name):
    root, out = tmp_path / "data", tmp_path / "shards"
    SETS[name](root, clips)
    sharded = shard_dataset(name, root, out, sharding=Sharding(clips_per_shard=1), on_bad_clip="skip")
    assert list_splits("shards", out) == list_splits(name, root)
    for split in list_splits(name, root):
        old, new = read_dataset(name, root, split), read_dataset("shards", out, split)
        for field in dataclasses.fields(old):
            if field.compare and field.name not in ("root", "annotated", "read_as"):
                assert getattr(old, field.name) == getattr(new, field.name), field.name
        for before, after in zip(old.annotated, new.annotated, strict=True):
            assert dataclasses.replace(after, media=before.media, video=before.video) == before
            assert after.video_name == before.video_name
            assert bool(before.media) == bool(after.media)
            if before.media:
                assert content(root, before.media) == content(out, after.media)
        assert sharded.clips[split] == len({e.media for e in old.examples}) == len({e.media for e in new.examples})
        # Every medium once, however many ask about it; a class list is one object, however many examples have it.
        assert len({id(example.candidates) for example in new.annotated if example.candidates == new.classes}) <= 1


def test_shards_can_be_sharded_anew(tmp_path, packed):
    again = tmp_path / "again"
    shard_dataset("shards", packed, again, sharding=Sharding(clips_per_shard=1))
    old, new = read_dataset("shards", packed, "train"), read_dataset("shards", again, "train")
    assert len({example.media.partition(".tar")[0] for example in new.examples}) == 3
    assert [content(packed, e.media) for e in old.examples] == [content(again, e.media) for e in new.examples]
    assert new.name == "folder"


def test_tars_are_plain_tars_whose_index_and_hashes_are_right(packed):
    import hashlib

    tars = sorted(packed.glob("train/*.tar"))
    assert [tar.name for tar in tars] == ["00000.tar", "00001.tar"]
    for path in tars:
        index = json.loads(get_index_path(path).read_text())["members"]
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            # The members of one sample stand together, as WebDataset wants them.
            assert [m.name for m in members] == list(index)
            assert [m.name.partition(".")[0] for m in members[::2]] == [m.name.partition(".")[0] for m in members[1::2]]
            for member in members:
                data = tar.extractfile(member).read()
                assert index[member.name] == [member.offset_data, member.size, hashlib.sha256(data).hexdigest()]
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
            facts = json.loads(tar.extractfile(members[1]).read())
            asked = ["what 0?", "what 3?"] if path is tars[0] else ["what 2?", "what 5?"]
            assert [row["prompt"] for row in facts["examples"]] == asked


def test_webdataset_reads_them(packed):
    webdataset = pytest.importorskip("webdataset")  # of the extra dev
    samples = list(webdataset.WebDataset(str(packed / "train" / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001"]
    assert samples[0]["mp4"] == read_member(packed / "train" / "00000.tar", "000000000.mp4")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")
def test_reading_a_member_reads_little_else_and_leaves_nothing_open(packed):
    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    tar = packed / "train" / "00000.tar"
    read_tar_index(tar)
    [small] = [name for name, (_, size) in read_tar_index(tar).members.items() if name.startswith("000000001.json")]
    gc.collect()  # lest a file that an earlier test left be closed in between
    files = len(os.listdir("/proc/self/fd"))
    before = read_bytes()
    counted = read_bytes() - before  # what asking costs
    before = read_bytes()
    for _ in range(20):
        member = read_member(tar, small)
    assert read_bytes() - before - counted <= 20 * (8192 + 512 + len(member)) + 4096 < tar.stat().st_size
    assert len(os.listdir("/proc/self/fd")) == files


# Interrupted, continued, in parallel

# `mirasol`, killed amid its third shard: each of a single clip has two members.
KILLED = """
import os, signal, sys
from mirasol.cli import main as cli
from mirasol.data.shards import write_shard as shard_writing

add, added = shard_writing._add, []

def killed(tar, name, content):
    if len(added) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    added.append(name)
    return add(tar, name, content)

shard_writing._add = killed
cli.main(sys.argv[1:])
"""


def big(root: Path, clips) -> list[str]:
    """A folder of six clips, each a shard; the options that say so."""
    rows = [{"file": f"{k}.mp4", "prompt": "what?", "target": "red"} for k in range(6)]
    put(root, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for k in range(6):
        put(root, f"{k}.mp4", clips[k % len(clips)])
    return ["--clips-per-shard", "1", "--reencode", "48@8"]


def test_killed_and_gone_on_with_by_two_processes_is_as_if_nothing_had_been(tmp_path, clips):
    root, out = tmp_path / "data", tmp_path / "shards"
    options = big(root, clips)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_FOLDER), "OMP_NUM_THREADS": "1"}
    command = ["data", "shard", "folder", str(root), str(out), *options, "--processes", "1"]
    ended = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    tars = [path for path in out.glob("*/*.tar") if get_index_path(path).is_file()]
    assert len(tars) == 2 and len(list(out.glob("*/.*.unfinished"))) == 1
    finished = {path: path.stat().st_mtime_ns for tar in tars for path in (tar, get_index_path(tar))}
    with pytest.raises(UserError, match="unfinished: run the `mirasol data shard` that made it again"):
        read_dataset("shards", out, "train")
    (out / "train" / ".left.unfinished").write_bytes(b"half a shard")
    seen = []
    settings = Sharding(clips_per_shard=1, reencode=Reencoding(48, 8))
    result = shard_dataset("folder", root, out, sharding=settings, processes=2, progress=lambda *at: seen.append(at))
    assert result.shards == 6 and result.finished_before == len(tars)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert seen[-1][1] == 6
    whole = tmp_path / "whole"
    shard_dataset("folder", root, whole, sharding=settings)
    assert tree(out) == tree(whole)
    # Once more: everything is there.
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert shard_dataset("folder", root, out, sharding=settings).finished_before == 6
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == times


def test_a_full_disk_is_told_and_finished_shards_are_kept(tmp_path, clips, capsys):
    """The system itself refuses a file over a limit, as it refuses one that a disk has no room for."""
    root, out = tmp_path / "data", tmp_path / "shards"
    rows = [{"file": f"{k}.mp4", "prompt": "what?", "target": "red"} for k in range(2)]
    put(root, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    small, large = sorted(clips, key=lambda path: path.stat().st_size)[:: len(clips) - 1]
    put(root, "0.mp4", small)
    put(root, "1.mp4", large)
    command = ["data", "shard", "folder", str(root), str(out), "--clips-per-shard", "1", "--processes", "1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (large.stat().st_size, limits[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mirasol:")]
    assert "00001.tar: cannot be written (File too large)" in line and "run the same command again" in line
    assert sorted(p.name for p in (out / "train").iterdir()) == ["00000.index.json", "00000.tar"]
    main(command)
    assert "2 shards, 1 of them finished before" in capsys.readouterr().err


def test_two_at_once_are_kept_apart(tmp_path, packed, clips):
    with (packed / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes shards here"):
            shard_dataset("folder", tmp_path / "data", packed, sharding=Sharding(clips_per_shard=2))


def test_a_disk_without_locks_is_refused(tmp_path, shapes, monkeypatch):
    def refuse(*given):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match="its disk cannot lock files"):
        shard_dataset("folder", shapes, tmp_path / "out")


def test_at_a_bad_clip_the_folder_stays_taken_until_nothing_writes_there(tmp_path, clips, monkeypatch):
    """Others that took it sooner would remove the unfinished shards of processes that still write."""
    root, left = tmp_path / "data", []
    folder(root, clips)
    put(root, "x/a.mp4", "<html></html>")

    def written(jobs, *given):
        try:
            for job in jobs:
                yield job.name, write_shard(job)
        finally:
            with (tmp_path / "out" / ".lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.append("still taken")

    monkeypatch.setattr(sharding, "_write_all", written)
    with pytest.raises(UserError, match="an HTML page"):
        shard_dataset("folder", root, tmp_path / "out", sharding=Sharding(clips_per_shard=1))
    assert left == ["still taken"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharding": Sharding(clips_per_shard=3)}, "clips_per_shard was 2, now it is 3"),
        ({"sharding": Sharding(clips_per_shard=2, reencode=Reencoding(64))}, "reencode was None, now it is 64"),
    ],
)
def test_other_settings_or_other_data_are_not_mixed_in(tmp_path, packed, change, message):
    before = tree(packed)
    settings = {"sharding": Sharding(clips_per_shard=2), **change}
    with pytest.raises(UserError, match=message):
        shard_dataset("folder", tmp_path / "data", packed, **settings)
    with (tmp_path / "data" / "train.jsonl").open("a") as rows:
        rows.write(json.dumps({"file": "0.mp4", "prompt": "new?", "target": "red"}) + "\n")
    with pytest.raises(UserError, match="content of the data set has changed"):
        shard_dataset("folder", tmp_path / "data", packed, sharding=Sharding(clips_per_shard=2))
    assert {name: content for name, content in tree(packed).items() if name != ".lock"} == before


def test_nothing_else_is_overwritten(tmp_path, clips):
    root = tmp_path / "data"
    folder(root, clips)
    put(tmp_path, "mine/notes.txt", "dear diary")
    with pytest.raises(UserError, match="holds something else: give another folder"):
        shard_dataset("folder", root, tmp_path / "mine")
    with pytest.raises(UserError, match="lies within the data set"):
        shard_dataset("folder", root, root / "shards")
    with pytest.raises(UserError, match="cannot be written to"):
        shard_dataset("folder", root, tmp_path / "mine" / "notes.txt")


# Bad clips


@pytest.fixture
def partly_bad(tmp_path, clips) -> Path:
    root = tmp_path / "data"
    rows = [
        {"file": f"{name}.mp4", "prompt": "what?", "target": "red"} for name in ("good", "page", "cut", "good", "cut")
    ]
    put(root, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    put(root, "good.mp4", clips[0])
    put(root, "page.mp4", "<!DOCTYPE html><html>404</html>")
    (root / "cut.mp4").write_bytes(clips[1].read_bytes()[:300])
    return root


def test_bad_clips_stop_or_are_left_out_counted_and_listed(tmp_path, partly_bad, capsys):
    out = tmp_path / "shards"
    command = ["data", "shard", "folder", str(partly_bad), str(out), "--processes", "1"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "page.mp4: an HTML page: its download failed; leave such clips out with" in capsys.readouterr().err
    main([*command, "--on-bad-clip", "skip"])
    told = capsys.readouterr().err
    assert "train: 2 examples on 1 clips, 3 examples left out" in told
    assert "left out: cut.mp4: " in told
    dataset = read_dataset("shards", out, "train")
    assert dataset.reasons == {"not media": 1, "undecodable": 2}
    counts = dataset.counts
    assert (counts.n_annotated, counts.n_found, len(dataset.annotated)) == (5, 2, 5)
    assert [(p.kind, p.file, p.examples) for p in dataset.problems] == [
        ("not media", "page.mp4", 1),
        ("undecodable", "cut.mp4", 2),
    ]


def test_what_was_not_encoded_anew_is_told(tmp_path, clips, capsys):
    root, out = tmp_path / "data", tmp_path / "shards"
    image_text(root, clips)
    main(["data", "shard", "image_text", str(root), str(out), "--reencode", "16", "--processes", "1"])
    assert "not re-encoded: 2 files (an image)" in capsys.readouterr().err
    assert read_dataset("shards", out, "train").facts == {"reencoded": "16"}


def test_files_cut_short_are_packed_as_they_are_counted_and_told(tmp_path, clips, capsys):
    root, out = tmp_path / "data", tmp_path / "out"
    root.mkdir()
    with av.open(str(clips[0])) as old, av.open(str(root / "whole.mkv"), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in (packet for packet in old.demux() if packet.size):
            packet.stream = streams[packet.stream_index]
            new.mux(packet)
    content = (root / "whole.mkv").read_bytes()
    put(root, "cut.mkv")
    (root / "cut.mkv").write_bytes(content[: len(content) * 6 // 10])
    rows = [{"file": name, "prompt": "what?", "target": "red"} for name in ("whole.mkv", "cut.mkv")]
    put(root, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for options in ([], ["--reencode", "16"]):
        main(["data", "shard", "folder", str(root), str(out), "--processes", "1", *options])
        told = capsys.readouterr().err
        assert "packed although cut.mkv is cut short: holds data for " in told
        assert ("not re-encoded: 1 files (cut short)" in told) == bool(options)
        assert list(json.loads((out / "manifest.json").read_text())["splits"]["train"]["cut_short"]) == ["cut.mkv"]
        # Found in the shards, too: encoded anew it would pass for a whole file.
        whole, cut = (example.media for example in read_dataset("shards", out, "train").examples)
        with pytest.raises(SystemExit):
            main(["data", "check", "shards", str(out)])
        found = capsys.readouterr().out
        assert f"{cut}: cut short: holds data for" in found and f"{whole}: cut short" not in found
        out = tmp_path / "anew"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "spark"], "--executor spark: choose local or ray"),
        (["--on-bad-clip", "no"], "--on-bad-clip no: choose error or skip"),
        (["--executor", "ray", "--processes", "2"], "has no effect with --executor ray"),
        (["--processes", "-1"], "must be at least 0"),
        (["--clips-per-shard", "0"], "clips_per_shard=0 must be positive"),
        (["--reencode", "huge"], "write SIZE or SIZE@FPS"),
    ],
)
def test_impossible_options_are_refused(tmp_path, shapes, options, message, capsys):
    with pytest.raises(SystemExit):
        main(["data", "shard", "folder", str(shapes), str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err


# On a cluster


def test_a_job_is_text_and_an_error_too(tmp_path, packed):
    job = ShardJob("data", "out", "train/00000.tar", (), "64@8")
    assert ShardJob.from_json(job.to_json()) == job
    put(tmp_path, "no-folder", "")
    told = write_row({"job": ShardJob("data", str(tmp_path / "no-folder"), "train/00000.tar", ()).to_json()})
    assert "cannot be written" in told["error"]


@pytest.mark.slow
def test_ray_makes_the_same_bytes(tmp_path, packed, shapes):
    pytest.importorskip("ray", reason="needs the extra prepare, which make check-slow installs")
    out = tmp_path / "by-ray"
    shard_dataset("folder", tmp_path / "data", out, sharding=Sharding(clips_per_shard=2), executor="ray")
    assert tree(out) == {name: content for name, content in tree(packed).items() if name != ".lock"}


def test_without_ray_the_fix_is_told(tmp_path, shapes, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match="pip install 'mirasol\\[prepare\\]'"):
        shard_dataset("folder", shapes, tmp_path / "out", "test", executor="ray")


def test_options_of_the_data_set_stay_with_it(tmp_path, clips):
    root, out = tmp_path / "data", tmp_path / "shards"
    image_text(root, clips)
    shard_dataset("image_text", root, out, options=DatasetOptions(prompt="what is this?"))
    dataset = read_dataset("shards", out, "train")
    assert {example.prompt for example in dataset.examples} == {"what is this?"}
    assert dataset.facts == {"prompt": "what is this?"}
