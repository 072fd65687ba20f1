"""VGG-Sound, EPIC-SOUNDS, Kinetics-Sound and AudioSet: labels, windows, and every way their media are called."""

import pytest

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import AnnotationError
from mirasol.data.datasets.kinetics_sound import CLASSES
from mirasol.data.datasets.registry import list_splits, read_dataset
from mirasol.errors import UserError

ID = "-1X2N5XJ_kw"
EPIC = "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample"
EPIC_ROW = "P01_11_0,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832"
KINETICS = "label,youtube_id,time_start,time_end,split,is_cc\n"
AUDIOSET = (
    "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=1, num_segs=1\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
LABELS = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'


def kinds(dataset) -> list[tuple[str, int | None]]:
    return [(p.kind, p.line) for p in dataset.problems if p.severity == "error" and p.kind != "missing media"]


# VGG-Sound


def vggsound(data) -> None:
    data.put("vggsound.csv", f'{ID},30,"vehicle horn, car horn, honking",test\n---g-f_I2yQ,1,people marching,train\n')
    data.put("stat.csv", '"vehicle horn, car horn, honking",900,vehicle\npeople marching,1050,people')


@pytest.mark.parametrize(
    ("media", "window"),
    [
        (f"{ID}_000030.mp4", (None, None)),
        (f"test/{ID}_30000_40000.mp4", (None, None)),
        (f"{ID}_30.MKV", (None, None)),
        (f"audio/{ID}_000030.flac", (None, None)),
        (f"people marching/{ID}_000030.wav", (None, None)),
        (f"{ID}/{ID}.mp4", (30, 40)),
    ],
)
def test_vggsound_finds_its_clips(data, media, window):
    vggsound(data)
    data.put(media)
    [example] = read_dataset("vggsound", data.root, "test").examples
    assert (example.id, example.media, (example.start, example.end)) == (f"{ID}_000030", media, window)
    assert example.target == "vehicle horn, car horn, honking"
    assert example.candidates == ("people marching", "vehicle horn, car horn, honking")


def test_vggsound_prefers_videos_and_cut_clips(data):
    vggsound(data)
    for name in (f"{ID}.mp4", f"audio/{ID}_000030.wav", f"mp4/{ID}_000030.mp4"):
        data.put(name)
    assert read_dataset("vggsound", data.root, "test").examples[0].media == f"mp4/{ID}_000030.mp4"
    chosen = DatasetOptions(pattern="{id}")
    assert read_dataset("vggsound", data.root, "test", chosen).examples[0].media == f"{ID}.mp4"
    with pytest.raises(UserError, match="its fields are id, start, end"):
        read_dataset("vggsound", data.root, "test", DatasetOptions(pattern="{name}"))


def test_vggsound_reads_the_authors_lists_too(data):
    data.put("test.csv", f"{ID}_000300.mp4,playing_hammond_organ\nbroken.mp4,rapping\n")
    data.put("stat.csv", "playing hammond organ,1,music\nrapping,1,people\n")
    dataset = read_dataset("vggsound", data.root, "test")
    assert [(e.id, e.target) for e in dataset.annotated] == [(f"{ID}_000300", "playing hammond organ")]
    assert kinds(dataset) == [("malformed", 2)]
    assert list_splits("vggsound", data.root) == ["test"]


def test_vggsound_rows_without_a_label_or_a_number(data):
    data.put("vggsound.csv", f"{ID},30,,test\n{ID},²,rain,test\n{ID},40,rain,test\n")
    dataset = read_dataset("vggsound", data.root, "test")
    assert kinds(dataset) == [("malformed", 2), ("empty text", 1)]
    assert dataset.classes == ("rain",), "the labels that occur, of which the empty one is none"


def test_vggsound_labels_outside_the_class_list_and_bad_rows(data):
    vggsound(data)
    data.put(
        "vggsound.csv", f"{ID},30,dog barking,test\n{ID},thirty,people marching,test\n{ID},30,people marching,test\n"
    )
    dataset = read_dataset("vggsound", data.root, "test")
    assert kinds(dataset) == [("malformed", 2), ("unknown label", 1)]
    assert "'dog barking' is not among the 2 classes" in dataset.problems[1].message
    assert len(dataset.annotated) == 1


@pytest.mark.parametrize(("content", "part"), [("a,1\n", "2 fields, 3 expected"), ('"a,1,b\n', "is not csv")])
def test_a_class_table_that_cannot_be_read_stops(data, content, part):
    vggsound(data)
    data.put("stat.csv", content)
    with pytest.raises(AnnotationError, match=f"stat.csv, line 1, column .*{part}"):
        read_dataset("vggsound", data.root, "test")


def test_the_class_list_can_be_given_and_its_size_is_stated(data, tmp_path):
    vggsound(data)
    names = tmp_path / "names.txt"
    names.write_text("vehicle horn, car horn, honking\npeople marching\nrain\n")
    dataset = read_dataset("vggsound", data.root, "test", DatasetOptions(class_list=str(names)))
    assert dataset.classes[2] == "rain" and dataset.facts["classes"] == 3
    (data.root / "stat.csv").unlink()
    assert "the labels that occur" in read_dataset("vggsound", data.root, "test").facts["class_list"]
    with pytest.raises(UserError, match="class_list=none.txt: no such file"):
        read_dataset("vggsound", data.root, "test", DatasetOptions(class_list="none.txt"))


# EPIC-SOUNDS


@pytest.mark.parametrize(
    "media",
    ["EPIC-KITCHENS/P01/videos/P01_11.MP4", "P01_11.mp4", "videos/train/P01/P01_11.MP4", "P01_11.wav"],
)
def test_epic_sounds_are_windows_of_sample_stamps(data, media):
    data.put("EPIC_Sounds_validation.csv", f"{EPIC},description,class,class_id\n{EPIC_ROW},clang / clatter,rustle,0\n")
    data.put("classes.csv", "class_id,class\n0,rustle\n1,water\n")
    data.put(media)
    dataset = read_dataset("epic_sounds", data.root, "val")
    [example] = dataset.examples
    assert (example.id, example.media, example.video) == ("P01_11_0", media, "P01_11")
    assert (example.start, example.end) == (49656 / 24_000, 71832 / 24_000)
    assert (example.target, dataset.classes, dataset.facts["classes"]) == ("rustle", ("rustle", "water"), 2)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("a,P01,P01_11,00:00:02.069,00:00:02.993,49656,71999,x,rustle,0", "but the time stamps say"),
        ("a,P01,P01_11,00:00:02.069,00:00:02.993,49556,71832,x,rustle,0", "but the time stamps say"),
        ("a,P01,P01_11,00:00:02.069,00:00:02.069,49656,49656,x,rustle,0", "must be before"),
        ("a,P01,P01_11,two,00:00:02.993,49656,71832,x,rustle,0", "expected HH:MM:SS.mmm"),
        ("a,P01,P01_11,00:00:nan,00:00:02.993,49656,71832,x,rustle,0", "but the time stamps say"),
        ("a,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832,x,,0", "is empty"),
        ("a,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832,x,rustle,²", "is not among the 2 classes"),
        ("a,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832,x,rustle,1", "is not among the 2 classes"),
        ("a,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832,x,wind,0", "is not among the 2 classes"),
        ("a,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832,x,wind,99", "is not among the 2 classes"),
    ],
)
def test_epic_sounds_rows_that_contradict_themselves(data, row, part):
    good = f"{EPIC_ROW},clang / clatter,rustle,0"
    data.put("EPIC_Sounds_train.csv", f"{EPIC},description,class,class_id\n{good}\n{row}\n")
    data.put("classes.csv", "class_id,class\n0,rustle\n1,water\n")
    dataset = read_dataset("epic_sounds", data.root, "train")
    assert [p.line for p in dataset.problems if part in p.message] == [3]
    assert len(dataset.annotated) == 1


def test_a_mistyped_class_id_makes_no_list_of_its_length(data):
    rows = f"{EPIC_ROW},x,rustle,0\n{EPIC_ROW.replace('_0,', '_1,', 1)},x,wind,99999999999\n"
    data.put("EPIC_Sounds_train.csv", f"{EPIC},description,class,class_id\n{rows}")
    dataset = read_dataset("epic_sounds", data.root, "train")
    assert (dataset.classes, kinds(dataset)) == (("rustle",), [("unknown label", 3)])


def test_epic_sounds_without_labels_or_categories(data):
    data.put("EPIC_Sounds_recognition_test_timestamps.csv", f"{EPIC}\n{EPIC_ROW}\n")
    data.put("sound_events_not_categorised.csv", f"{EPIC},description\n{EPIC_ROW},clang\n")
    assert read_dataset("epic_sounds", data.root, "test").annotated[0].target == ""
    assert read_dataset("epic_sounds", data.root, "not_categorised").annotated[0].target == "clang"


def test_epic_sounds_pickles_are_not_opened(data):
    data.put("EPIC_Sounds_train.pkl", b"\x80")
    with pytest.raises(UserError, match="pickles are not opened"):
        list_splits("epic_sounds", data.root)


# Kinetics-Sound


@pytest.mark.parametrize(
    "media",
    [
        f"k400/val/{ID}_000001_000011.mp4",
        f"videos/val/blowing nose/{ID}_000001_000011.mp4",
        f"blowing_nose/{ID}_000001_000011.avi",
        f"replacement_for_corrupted_k400/{ID}.mp4",
    ],
)
def test_kinetics_sound_finds_its_clips(data, media):
    data.put("kinetics-400_val.csv", KINETICS + f'"blowing nose",{ID},1,11,val,0\nabseiling,{ID},20,30,val,0\n')
    data.put(media)
    dataset = read_dataset("kinetics_sound", data.root, "val")
    [example] = dataset.examples
    assert (example.id, example.media, example.target) == (f"{ID}_000001_000011", media, "blowing nose")
    assert dataset.counts.n_annotated == 1  # classes outside the list are none of this data set's
    assert (dataset.facts["classes"], dataset.published.examples) == (32, 1_594)


def test_kinetics_sound_replacements_go_before_the_corrupted_files(data):
    data.put("val.csv", KINETICS + f'"blowing nose",{ID},1,11,val,0\n')
    data.put(f"val/{ID}_000001_000011.mp4")
    replacement = data.put(f"replacement_for_corrupted_k400/{ID}_000001_000011.mp4")
    example = read_dataset("kinetics_sound", data.root, "val").examples[0]
    assert example.media == replacement.relative_to(data.root).as_posix()


def test_kinetics_sound_class_list_is_a_file(data):
    data.put("val.csv", KINETICS + f'"blowing nose",{ID},1,11,val,0\nabseiling,{ID},20,30,val,0\n')
    data.put("mine.txt", "abseiling\ntyping\n")
    dataset = read_dataset("kinetics_sound", data.root, "val", DatasetOptions(class_list="mine.txt"))
    assert [e.target for e in dataset.annotated] == ["abseiling"]
    assert dataset.facts == {"classes": 2, "class_list": "mine.txt", "rows_of_other_classes": 1}
    [others] = [p for p in dataset.problems if p.kind == "other classes"]
    assert "1 rows of 1 classes outside the class list ('blowing nose', …)" in others.message
    assert others.severity == "warning" and others.examples == 0
    [warning] = [p for p in dataset.problems if p.kind == "class without rows"]
    assert "'typing'" in warning.message and warning.severity == "warning"


def test_kinetics_sound_needs_labels(data):
    data.put("kinetics-400_test.csv", f"youtube_id,time_start,time_end,split\n{ID},1,11,test\n")
    with pytest.raises(AnnotationError, match="wrong header: expected label,youtube_id.*CVDF"):
        read_dataset("kinetics_sound", data.root, "test")


def test_kinetics_sound_reads_ogm_ges_lists(data):
    data.put("my_test.txt", f"{ID}_2,10,0\n{ID}_3,10,31\n")
    data.put(f"blowing_nose/{ID}_2.mp4")
    dataset = read_dataset("kinetics_sound", data.root, "ogm_ge_test")
    assert [(e.target, e.video) for e in dataset.examples] == [(CLASSES[0], ID)]
    assert dataset.facts["classes"] == 31
    assert kinds(dataset) == [("answer out of range", 2)]


# AudioSet


@pytest.mark.parametrize(
    "name",
    ["_30000_40000.flac", "_30.000.wav", "_30.wav", "_000030.mp4"],
)
def test_audioset_finds_its_clips(data, name):
    data.put("eval_segments.csv", AUDIOSET + f'{ID}, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n')
    data.put("class_labels_indices.csv", LABELS)
    media = data.put(f"eval/{ID}{name}").relative_to(data.root).as_posix()
    dataset = read_dataset("audioset", data.root, "eval")
    [example] = dataset.examples
    assert (example.media, example.id, example.start) == (media, f"{ID}_30000", None)
    assert example.target == "Speech; Male speech, man speaking"
    assert example.references == ("Speech", "Male speech, man speaking")
    assert not example.random_target
    (data.root / media).rename(data.root / f"Y{ID}.wav")
    assert read_dataset("audioset", data.root, "test").examples[0].media == f"Y{ID}.wav"  # test means eval


@pytest.mark.parametrize("window", ["nan, 10.000", "inf, 10.000", "20.000, 10.000", "-1.000, 9.000"])
def test_audioset_windows_that_are_none(data, window):
    data.put("eval_segments.csv", AUDIOSET + f'{ID}, {window}, "/m/09x0r"\n{ID}, 1.000, 9.500, "/m/09x0r,/m/09x0r"\n')
    data.put("class_labels_indices.csv", LABELS)
    dataset = read_dataset("audioset", data.root, "eval")
    assert kinds(dataset) == [("malformed", 4)]
    assert [e.target for e in dataset.annotated] == ["Speech"]


def test_audioset_can_draw_one_label(data):
    data.put("balanced_train_segments.csv", AUDIOSET + f'{ID}, 30.000, 40.000, "/m/05zppz,/m/09x0r"\n')
    data.put("class_labels_indices.csv", LABELS)
    dataset = read_dataset("audioset", data.root, "balanced_train", DatasetOptions(targets="one"))
    assert dataset.annotated[0].random_target and dataset.annotated[0].target == "Male speech, man speaking"
    assert dataset.facts["targets"] == "one"


def test_audioset_2m_is_both_training_files(data):
    for number, name in enumerate(("balanced", "unbalanced")):
        data.put(f"{name}_train_segments.csv", AUDIOSET + f'{ID[:-1]}{number}, 0.000, 10.000, "/m/09x0r"\n')
    data.put("class_labels_indices.csv", LABELS)
    assert list_splits("audioset", data.root) == ["balanced_train", "unbalanced_train", "train"]
    assert len(read_dataset("audioset", data.root, "train").annotated) == 2


def test_audioset_labels_outside_the_class_list(data):
    data.put("eval_segments.csv", AUDIOSET + f'{ID}, 30.000, 40.000, "/m/09x0r,/m/x"\n')
    with pytest.raises(UserError, match=r"class_labels_indices.csv.* is not there"):
        read_dataset("audioset", data.root, "eval")
    data.put("class_labels_indices.csv", LABELS)
    assert kinds(read_dataset("audioset", data.root, "eval")) == [("unknown label", 4)]
