"""Captions of videos and images: csv files and the shards of video2dataset and img2dataset, failures included."""

import io
import json
import tarfile

import pytest

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.registry import list_splits, read_dataset
from mirasol.errors import UserError

MP4 = b"\0\0\0\x18ftypisom" + bytes(40)
WEBM = b"\x1a\x45\xdf\xa3" + bytes(40)
PAGE = b"<!DOCTYPE HTML>\n<html><title>404</title></html>"
JPEG = b"\xff\xd8\xff\xe0" + bytes(40)


def sample(key: str, media: bytes | None = MP4, caption: bytes | None = b"a bell", extension="mp4", **facts) -> dict:
    members = {f"{key}.json": json.dumps({"key": key, "status": "success", **facts}).encode()}
    if media is not None:
        members[f"{key}.{extension}"] = media
    if caption is not None:
        members[f"{key}.txt"] = caption
    return members


def tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def kinds(dataset) -> list[tuple[str, str]]:
    return [(p.kind, p.file) for p in dataset.problems]


# csv


def test_webvid_is_read_by_column_names(data):
    data.put(
        "results_2M_val.csv",
        'videoid,name,page_idx,page_dir,duration,contentUrl\n1001,"rocks, water",1,000001_000050,PT00H00M03S,http://x/a\n'
        "1002,,1,000001_000050,PT00H00M03S,http://x/b\n1003,gone,1,,PT00H00M03S,http://x/c\n",
    )
    data.put("train.csv", "name,videoid\na bell,7\n")
    data.put("videos/000001_000050/1001.mp4")
    data.put("7.mp4")
    assert list_splits("webvid", data.root) == ["train", "validation"]
    dataset = read_dataset("webvid", data.root, "val")
    assert [(e.id, e.media, e.target) for e in dataset.examples] == [
        ("1001", "videos/000001_000050/1001.mp4", "rocks, water")
    ]
    assert dataset.reasons == {"empty text": 1, "missing media": 1}
    assert read_dataset("webvid", data.root, "train").examples[0].prompt == "describe the clip"


@pytest.mark.parametrize("header", ["", "video,start,end,caption\n"])
def test_videocc_windows_are_microseconds(data, header):
    rows = "https://www.youtube.com/watch?v=-1X2N5XJ_kw,2500000,7500000,a bell\n---g-f_I2yQ,9,3,late\n"
    data.put("video_cc_public.csv", header + rows)
    data.put("-1X2N5XJ_kw.mp4")
    dataset = read_dataset("videocc", data.root, "train")
    [example] = dataset.examples
    assert (example.start, example.end, example.media) == (2.5, 7.5, "-1X2N5XJ_kw.mp4")
    assert dataset.reasons == {"malformed": 1}
    data.put("more_video_cc.csv", header + "-1X2N5XJ_kw,1.5,2.5,not microseconds\n")  # on line 1: and no header
    assert read_dataset("videocc", data.root, "train").reasons == {"malformed": 2}
    data.put("-1X2N5XJ_kw_2500_7500.mp4")
    [example] = read_dataset("videocc", data.root, "train").examples
    assert (example.start, example.media) == (None, "-1X2N5XJ_kw_2500_7500.mp4")


def test_captions_of_images_in_csv_and_tsv(data):
    data.put("dev.csv", 'url,caption\nhttp://x/a%20b.jpg,"half a ""pamplemousse"""\nhttp://x/c.jpg,""\n')
    data.put("Train_GCC-training.tsv", "a very typical bus\thttp://x/bus.jpg?size=2\n")
    data.put("pairs_test.csv", "filepath,title\nimages/cat.png,a cat\n")
    for name in ("images/a b.jpg", "images/bus.jpg", "images/cat.png"):
        data.put(name)
    assert list_splits("image_text", data.root) == ["test", "train", "validation"]
    dataset = read_dataset("image_text", data.root, "validation")
    assert [(e.media, e.target) for e in dataset.examples] == [("images/a b.jpg", 'half a "pamplemousse"')]
    assert dataset.reasons == {"empty text": 1}
    assert read_dataset("image_text", data.root, "train").examples[0].target == "a very typical bus"
    assert read_dataset("image_text", data.root, "test").examples[0].media == "images/cat.png"


def test_cc3m_quotes_nothing(data):
    data.put(
        "Train_GCC-training.tsv",
        'a bus\thttp://x/1.jpg\n"go" said the sign\thttp://x/2.jpg\n"open\thttp://x/3.jpg\n"b\n',
    )
    dataset = read_dataset("image_text", data.root, "train")
    assert [e.target for e in dataset.annotated] == ["a bus", '"go" said the sign', '"open']
    assert [(p.line, p.column) for p in dataset.problems if p.kind == "malformed"] == [(4, 3)]


def test_a_caption_never_goes_to_another_s_image(data):
    data.put("images/image.jpg")
    data.put(
        "dev.csv", "caption,url\na cat,http://a/1/image.jpg\na dog,http://b/image.jpg?x=1\na cat,http://a/gone.jpg\n"
    )
    dataset = read_dataset("image_text", data.root, "validation")
    assert dataset.reasons == {"ambiguous name": 2, "missing media": 1}
    told = [str(p) for p in dataset.problems if p.kind == "ambiguous name"]
    assert told[0].startswith("dev.csv, line 2: http://a/1/image.jpg: 'image.jpg' is the last part of 2 urls")
    data.put("dev.csv", "caption,url\na cat,http://a/1/image.jpg\nit sits,http://a/1/image.jpg\n")
    assert [e.media for e in read_dataset("image_text", data.root, "validation").examples] == ["images/image.jpg"] * 2
    data.put("more/image.jpg")
    dataset = read_dataset("image_text", data.root, "validation")
    assert dataset.reasons == {"ambiguous name": 2} and "2 files are called so" in dataset.problems[0].message


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("train/1.jpg", ""),  # and not val/1.jpg
        ("val/1.jpg", "set/val/1.jpg"),
        ("./val/1.jpg", "set/val/1.jpg"),
        ("../elsewhere/2.jpg", "elsewhere/2.jpg"),
        ("2.jpg", "elsewhere/2.jpg"),
        ("{root}/elsewhere/2.jpg", "elsewhere/2.jpg"),
    ],
)
def test_paths_of_images_count_from_the_root_or_from_their_table(data, named, found):
    data.put("set/val/1.jpg")
    data.put("elsewhere/2.jpg")
    data.put("set/dev.csv", f"caption,filepath\na cat,{named.format(root=data.root)}\n")
    [example] = read_dataset("image_text", data.root, "validation").annotated
    assert example.media == found


# Shards


def test_video2dataset_keeps_what_is_whole_and_counts_the_rest(data):
    members = {
        **sample("00000000"),
        **sample("00000001", None, status="failed_to_download", error_message="404"),
        **sample("00000002", PAGE),
        **sample("00000003", caption=b" \n"),
        **sample("00000004", caption=b"caf\xe9"),
        **sample("00000005", None),
        **sample("00000006", WEBM, "é, naïve".encode()),
        **sample("00000007_00001", caption=None, caption_=1) | {"00000007_00001.txt": b"clipped"},
        "00000008.json": b"{",
    }
    data.put("00000.tar", tar(members))
    data.put("00000_stats.json", '{"count": 10}')
    dataset = read_dataset("video2dataset", data.root, "train")
    assert [(e.id, e.media, e.target) for e in dataset.examples] == [
        ("00000.tar/00000000", "00000.tar/00000000.mp4", "a bell"),
        ("00000.tar/00000006", "00000.tar/00000006.mp4", "é, naïve"),
        ("00000.tar/00000007_00001", "00000.tar/00000007_00001.mp4", "clipped"),
    ]
    assert dataset.reasons == {
        "download failed": 1, "not media": 1, "empty text": 1, "not UTF-8": 1, "missing member": 2, "malformed": 1,
    }  # fmt: skip
    assert dataset.counts.n_annotated == 10
    assert "failed_to_download: 404" in str(dataset.problems[0])


def test_a_shard_cut_short_gives_the_samples_before_the_cut(data):
    whole = tar({**sample("0", MP4 * 100), **sample("1", MP4 * 100)})
    first = tar(sample("0", MP4 * 100))
    data.put("00000_stats.json", '{"count": 2}')
    second_media = len(first) - 10_240 + 2_000 if len(first) % 10_240 else len(whole) // 2
    for length in (second_media, len(whole) * 3 // 4):
        data.put("00000.tar", whole[: length // 512 * 512 + 100])
        dataset = read_dataset("video2dataset", data.root, "train")
        assert all(e.target == "a bell" for e in dataset.examples)
        assert dataset.counts.n_annotated == 2
        assert "cut short" in {kind for kind, _ in kinds(dataset)}
    data.put("00000.tar", b"not a tar at all")
    dataset = read_dataset("video2dataset", data.root, "train")
    assert (kinds(dataset), dataset.counts.n_annotated) == ([("cut short", "00000.tar")], 2)


def test_shards_lie_in_the_folders_of_their_splits_or_belong_to_train(data):
    data.put("val/00000.tar", tar(sample("0")))
    data.put("shards/00000.tar", tar(sample("0")))
    assert list_splits("video2dataset", data.root) == ["train", "validation"]
    assert read_dataset("video2dataset", data.root, "val").examples[0].media == "val/00000.tar/0.mp4"


def test_members_of_one_name_in_two_folders_of_a_tar_are_two_samples(data):
    data.put("00000.tar", tar({**sample("./a/0", caption=b"a bell"), **sample("b/0", caption=b"a drum")}))
    examples = read_dataset("video2dataset", data.root, "train").examples
    assert [(e.media, e.target) for e in examples] == [
        ("00000.tar/./a/0.mp4", "a bell"),
        ("00000.tar/b/0.mp4", "a drum"),
    ]


def test_keys_with_dots_are_samples_of_their_own(data):
    members = {
        **sample("22.05", caption=b"a bell"),
        **sample("22.051", caption=b"a drum"),
        **sample("22.06", None, status="failed_to_download", error_message="404"),
        **sample("7", caption=b"a horn"),
        "7.seen.json": b"{}",
        **sample("7.A", caption=b"a flute"),
        **sample("7.a", caption=b"a lute"),
    }
    data.put("00000.tar", tar(members))
    dataset = read_dataset("video2dataset", data.root, "train")
    assert [(e.id, e.media, e.target) for e in dataset.examples] == [
        ("00000.tar/22.05", "00000.tar/22.05.mp4", "a bell"),
        ("00000.tar/22.051", "00000.tar/22.051.mp4", "a drum"),
        ("00000.tar/7", "00000.tar/7.mp4", "a horn"),
        ("00000.tar/7.A", "00000.tar/7.A.mp4", "a flute"),
        ("00000.tar/7.a", "00000.tar/7.a.mp4", "a lute"),
    ]
    assert dataset.reasons == {"download failed": 1}
    assert kinds(dataset) == [("download failed", "00000.tar/22.06")]


def test_a_picture_of_longer_name_without_a_caption_is_no_sample(data):
    data.put("00000.tar", tar({**sample("0", JPEG, extension="jpg"), "0.mask.jpg": JPEG}))
    dataset = read_dataset("img2dataset", data.root, "train")
    assert [e.media for e in dataset.examples] == ["00000.tar/0.jpg"] and not dataset.problems


def test_the_files_format_has_the_same_members(data):
    for name, content in {**sample("000000"), **sample("000001", PAGE)}.items():
        data.put(f"00000/{name}", content)
    dataset = read_dataset("video2dataset", data.root, "train", DatasetOptions(prompt="what is it?"))
    assert [(e.media, e.prompt) for e in dataset.examples] == [("00000/000000.mp4", "what is it?")]
    assert kinds(dataset) == [("not media", "00000/000001")]


def test_img2dataset_failures_are_in_its_statistics_alone(data):
    data.put("00000.tar", tar({**sample("000000000", JPEG, extension="jpg"), **sample("000000007", JPEG, b"", "webp")}))
    data.put("00000_stats.json", '{"count": 5, "status_dict": {"success": 2, "HTTP Error 404": 3}}')
    dataset = read_dataset("img2dataset", data.root, "train")
    assert [e.media for e in dataset.examples] == ["00000.tar/000000000.jpg"]
    assert dataset.reasons == {"empty text": 1, "download failed": 3}
    assert "HTTP Error 404 (3)" in dataset.problems[-1].message


def test_parquet_alone_is_refused_with_the_way_out(data):
    data.put("00000.parquet", b"PAR1")
    with pytest.raises(UserError, match="output_format=webdataset or files"):
        list_splits("img2dataset", data.root)
