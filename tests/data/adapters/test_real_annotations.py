"""Excerpts of the real annotation files (MIRASOL_REAL_DATA): every row is understood, every count as published."""

import pytest

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.registry import list_splits, read_dataset

# Rows of each excerpt by split; what the adapters leave out is counted apart.
ROWS = {
    "msrvtt_qa": {"validation": 62, "test": 37},
    "activitynet_qa": {"train": 60, "validation": 60},
    "nextqa_mc": {"validation": 60},
    "nextqa_oe": {"train": 60, "validation": 60, "test": 50},
    "vggsound": {"train": 29, "test": 31},
    "epic_sounds": {"validation": 51, "test": 30, "not_categorised": 30},
    "kinetics_sound": {"validation": 35, "ogm_ge_train": 31, "ogm_ge_test": 31},
    "audioset": {"balanced_train": 60, "unbalanced_train": 60, "eval": 58},
}
CLASSES = {"vggsound": 309, "epic_sounds": 44, "kinetics_sound": 32, "audioset": 527}


@pytest.fixture
def annotations(real_data):
    folder = real_data / "annotations"
    if not folder.is_dir():
        pytest.skip(f"no real annotations in {folder}: set MIRASOL_REAL_DATA to the folder that holds annotations/")
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_excerpts_is_understood(annotations, name):
    for split, count in ROWS[name].items():
        dataset = read_dataset(name, annotations / name, split)
        assert {p.kind for p in dataset.problems} <= {"missing media", "other counts", "other classes"}
        assert len(dataset.annotated) == dataset.counts.n_annotated == count
        assert not split.startswith("val") or name not in CLASSES or len(dataset.classes) == CLASSES[name]
        types = set(dataset.published.types)
        assert not types or {example.question_type for example in dataset.annotated} <= types


def test_the_variants_of_one_data_set_are_the_same_questions(annotations):
    folder = annotations / "msrvtt_qa"
    read = {
        name: read_dataset("msrvtt_qa", folder, "val", DatasetOptions(annotations=str(folder / name))).annotated
        for name in ("val_qa.json", "val.jsonl", "hqga_val.csv")
    }
    pairs = {name: {(e.video, e.prompt, e.target) for e in examples} for name, examples in read.items()}
    assert pairs["val_qa.json"] & pairs["val.jsonl"] and pairs["val_qa.json"] & pairs["hqga_val.csv"]
    by_index = read_dataset("nextqa_mc", annotations / "nextqa_mc", "val")
    text = DatasetOptions(annotations=str(annotations / "nextqa_mc" / "variant_text_answer_val.csv"))
    by_text = read_dataset("nextqa_mc", annotations / "nextqa_mc", "val", text)
    known = {e.id: e.target for e in by_index.annotated}
    shared = [e for e in by_text.annotated if e.id in known]
    assert shared and all(known[e.id] == e.target for e in shared)


@pytest.mark.parametrize(
    ("file", "classes", "rows"),
    [
        ("k400_30_avcil.txt", 30, None),
        ("k400_31_adamml_ogmge.txt", 31, 1_544),
        ("k400_32_crisscross.txt", 32, 1_594),
        ("k400_33_multisensory.txt", 33, 1_643),
    ],
)
def test_kinetics_sounds_class_lists_as_published(annotations, file, classes, rows):
    folder = annotations / "kinetics_sound"
    chosen = DatasetOptions(class_list=str(folder / "class_lists" / file))
    dataset = read_dataset("kinetics_sound", folder, "val", chosen)
    assert dataset.facts["classes"] == classes and dataset.annotated
    assert dataset.published.examples == rows


def test_the_names_of_2017_are_not_those_of_kinetics_400(annotations):
    folder = annotations / "kinetics_sound"
    chosen = DatasetOptions(class_list=str(folder / "class_lists" / "original_34_names_2017.txt"))
    problems = read_dataset("kinetics_sound", folder, "val", chosen).problems
    [warning] = [p for p in problems if p.kind == "class without rows"]
    assert warning.message.startswith("7 of 34 classes have no row")


def test_real_shards_of_video2dataset_and_img2dataset(annotations):
    videos = read_dataset("video2dataset", annotations / "video_text", "train")
    assert videos.reasons == {"download failed": 1, "not media": 1}
    assert videos.counts.n_annotated == 10
    images = annotations / "image_text"
    shard = read_dataset("img2dataset", images / "img2dataset_webdataset", "train")
    assert shard.reasons == {"empty text": 1, "download failed": 3}
    files = read_dataset("img2dataset", images / "img2dataset_files", "train")
    assert files.counts.n_annotated == sum(files.reasons.values()) + len(files.examples) and files.examples
    assert len(read_dataset("webvid", annotations / "video_text", "val").annotated) == 5
    assert list_splits("image_text", images) == ["validation"]
