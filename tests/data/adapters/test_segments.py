"""Annotations with times: a file that was cut out is read whole, a longer one in the segment's window, whichever data
set names it and whatever the file is called."""

import json

import numpy as np
import pytest
from media_making import Audio, write_media

from mirasol.config.recipe import DatasetOptions
from mirasol.data.check import check_dataset
from mirasol.data.datasets.registry import read_dataset

ID, START, END = "-1X2N5XJ_kw", 3, 5
LABELS = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n'
# Annotations of one segment, and how its file may be called: by the segment's start, or after the video alone.
SETS = {
    "audioset": {"eval_segments.csv": f"{ID}, {START}.000, {END}.000, /m/09x0r\n", "class_labels_indices.csv": LABELS},
    "vggsound": {"vggsound.csv": f"{ID},{START},rain,test\n"},
    "kinetics_sound": {
        "val.csv": f"label,youtube_id,time_start,time_end,split,is_cc\nbowling,{ID},{START},{END},val,0\n"
    },
    "videocc": {"video_cc_test.csv": f"https://www.youtube.com/watch?v={ID},{START}000000,{END}000000,a caption\n"},
}
SPLITS = {"audioset": "eval", "vggsound": "test", "kinetics_sound": "validation", "videocc": "test"}
SECONDS = {"vggsound": 10}  # of a segment, where the annotation has its start alone
BY_START = {
    "audioset": "{id}_{start_ms}_{end_ms}", "vggsound": "{id}_{start:06d}",
    "kinetics_sound": "{id}_{start:06d}_{end:06d}", "videocc": "{id}_{start:06d}",
}  # fmt: skip


def sound(data, name: str, seconds: float) -> str:
    rate = 8_000
    path = data.put(name)
    write_media(path, Audio([(0.0, np.zeros((1, round(seconds * rate)), np.float32))], rate, "pcm_s16le"))
    return name


def annotate(data, dataset: str) -> tuple[int, int]:
    for name, content in SETS[dataset].items():
        data.put(name, content)
    return START, START + SECONDS.get(dataset, END - START)


@pytest.mark.parametrize(("dataset", "name"), [*((dataset, "{id}") for dataset in SETS), ("audioset", "Y{id}")])
@pytest.mark.parametrize(("more", "is_cut"), [(-1.0, True), (0.0, True), (0.3, True), (0.7, False), (60.0, False)])
def test_a_file_named_after_its_video_is_cut_out_where_it_is_no_longer_than_the_segment(
    data, dataset, name, more, is_cut
):
    start, end = annotate(data, dataset)
    media = sound(data, f"clips/{name.format(id=ID)}.wav", end - start + more)
    found = read_dataset(dataset, data.root, SPLITS[dataset])
    [example] = found.examples
    assert (example.media, example.start, example.end) == (media, *((None, None) if is_cut else (start, end)))
    told = "1 no longer than their segment (already cut out)" if is_cut else "1 longer (read in their windows)"
    assert found.facts["files_named_by_id"] == told


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("seconds", [1.0, 80.0])
def test_a_name_with_the_start_is_that_of_a_cut_file_and_is_not_opened(data, dataset, seconds, monkeypatch):
    monkeypatch.setattr("mirasol.data.datasets.windows.measure_seconds", lambda files, media: pytest.fail(media))
    start, end = annotate(data, dataset)
    fields = {"id": ID, "start": start, "end": end, "start_ms": start * 1000, "end_ms": end * 1000}
    data.put(f"{BY_START[dataset].format(**fields)}.wav")
    data.put(f"{ID}.wav")  # the whole video, which is there too
    found = read_dataset(dataset, data.root, SPLITS[dataset])
    [example] = found.examples
    assert example.media != f"{ID}.wav" and (example.start, example.end) == (None, None)
    assert "files_named_by_id" not in found.facts


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize(("seconds", "is_cut"), [(1.0, True), (80.0, False)])
def test_a_pattern_without_the_start_leaves_it_to_the_length_too(data, dataset, seconds, is_cut):
    annotate(data, dataset)
    media = sound(data, f"clip-{ID}.wav", seconds)
    found = read_dataset(dataset, data.root, SPLITS[dataset], DatasetOptions(pattern="clip-{id}"))
    assert [(e.media, e.start is None) for e in found.examples] == [(media, is_cut)]


def test_a_replaced_clip_of_kinetics_is_looked_at_too(data):
    annotate(data, "kinetics_sound")
    sound(data, f"replacement_for_corrupted_k400/{ID}.wav", 80.0)
    [example] = read_dataset("kinetics_sound", data.root, "val").examples
    assert (example.start, example.end) == (START, END)


def test_a_short_file_that_several_segments_could_be_is_left_out_and_listed(data):
    data.put("vggsound.csv", f"{ID},30,rain,test\n{ID},90,wind,test\n---g-f_I2yQ,1,rain,test\n")
    sound(data, f"{ID}.wav", 10.0)
    sound(data, "---g-f_I2yQ.wav", 10.0)
    found = read_dataset("vggsound", data.root, "test")
    assert [example.video for example in found.examples] == ["---g-f_I2yQ"]
    assert [(p.kind, p.file, p.line) for p in found.problems if p.severity == "error"] == [
        ("ambiguous name", "vggsound.csv", 1), ("ambiguous name", "vggsound.csv", 2)
    ]  # fmt: skip
    assert found.counts.n_annotated == 3 and found.counts.reasons == {"ambiguous name": 2}


def test_whole_videos_give_every_segment_and_unreadable_ones_keep_their_windows(data):
    data.put("vggsound.csv", f"{ID},30,rain,test\n{ID},60,wind,test\n---g-f_I2yQ,1,rain,test\n")
    sound(data, f"{ID}.wav", 80.0)
    data.put("---g-f_I2yQ.mp4", "<html>not found</html>")
    found = read_dataset("vggsound", data.root, "test")
    assert [(e.start, e.end) for e in found.examples] == [(30, 40), (60, 70), (1, 11)]
    assert found.facts["files_named_by_id"] == (
        "1 longer (read in their windows), 1 of unknown length (read as whole videos)"
    )


def test_data_check_tells_it_and_opens_nothing_where_it_is_told_to_skip_media(data, monkeypatch):
    start, end = annotate(data, "audioset")
    sound(data, f"Y{ID}.wav", end - start)
    facts = check_dataset("audioset", data.root).splits["eval"]["facts"]
    assert "already cut out" in facts["files_named_by_id"] and json.dumps(facts)
    monkeypatch.setattr("mirasol.data.datasets.windows.measure_seconds", lambda files, media: pytest.fail(media))
    facts = check_dataset("audioset", data.root, open_media=False).splits["eval"]["facts"]
    assert "lengths were not looked at" in facts["files_named_by_id"]
