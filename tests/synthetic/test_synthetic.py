import hashlib
import json
from pathlib import Path

import pytest

from mirasol.cli.main import main
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import group_by_clip
from mirasol.errors import UserError
from mirasol.synthetic.questions import QUESTION_TYPES
from mirasol.synthetic.render import render_frames, render_waveform
from mirasol.synthetic.scenes import SPLITS, make_split_scene
from mirasol.synthetic.synthesize import KINDS, format_clip_id, list_clip_questions, synthesize
from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS, SIGNS_AND_SIGNALS

pytest.importorskip("av")

COUNTS = {"train": 5, "validation": 2, "test": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "data"
    synthesize(root, seed=4, **COUNTS)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_folder_reads_as_a_data_set(root):
    for split, count in COUNTS.items():
        examples = read_examples(root, split)
        whole = [group for group in group_by_clip(examples) if group.start is None]
        assert [group.media for group in whole] == [
            f"clips/{split}/{format_clip_id(split, i)}.mp4" for i in range(count)
        ]
        assert all((root / example.media).is_file() for example in examples)
        assert len({example.id for example in examples}) == len(examples)


def test_only_training_holds_descriptions_and_stories(root):
    kinds = {split: {example.question_type for example in read_examples(root, split)} for split in SPLITS}
    assert {"describe", "story"} <= kinds["train"]
    assert kinds["validation"] | kinds["test"] <= set(QUESTION_TYPES)


def test_every_slot_with_an_event_is_described_in_training(root):
    for group in group_by_clip(read_examples(root, "train")):
        if group.start is not None:
            assert group.end == group.start + 1
            assert [example.question_type for example in group.examples] == ["describe"]
    described = [example for example in read_examples(root, "train") if example.question_type == "describe"]
    scenes = [make_split_scene(4, "train", index) for index in range(COUNTS["train"])]
    assert len(described) == sum(len({e.slot for e in (*scene.shapes, *scene.sounds)}) for scene in scenes)


def test_questions_carry_their_candidates(root):
    for split in ("validation", "test"):
        assert all(example.target in example.candidates for example in read_examples(root, split))


def test_the_manifest_names_seed_counts_versions_and_every_file(root):
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["seed"] == 4
    assert manifest["clips"] == COUNTS
    assert set(manifest["versions"]) == {"av", "numpy"}
    files = {name: data for name, data in contents(root).items() if name != "manifest.json"}
    assert manifest["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def test_same_seed_same_bytes_for_any_number_of_workers(root, tmp_path):
    calls = []
    synthesize(
        tmp_path / "again", seed=4, **COUNTS, workers=2, progress=lambda done, total: calls.append((done, total))
    )
    assert contents(tmp_path / "again") == contents(root)
    assert calls == [(done, 10) for done in range(1, 11)]


def test_another_seed_gives_other_scenes(root, tmp_path):
    synthesize(tmp_path / "other", seed=5, train=0, validation=0, test=1)
    assert (tmp_path / "other" / "test.jsonl").read_bytes()
    ours = (root / "clips" / "test" / "test-000000.mp4").read_bytes()
    assert (tmp_path / "other" / "clips" / "test" / "test-000000.mp4").read_bytes() != ours


def test_nothing_is_overwritten(root):
    before = contents(root)
    with pytest.raises(UserError, match="is not empty"):
        synthesize(root, seed=4, **COUNTS)
    with pytest.raises(UserError, match="is a file"):
        synthesize(root / "test.jsonl", seed=4, **COUNTS)
    assert contents(root) == before


def test_an_interrupted_call_leaves_nothing_behind(tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "new", seed=4, **COUNTS, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(root):
    with pytest.raises(UserError, match="cannot be created"):
        synthesize(root / "test.jsonl" / "new", seed=4, **COUNTS)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"train": -1}, "train=-1"),
        ({"train": 0, "validation": 0, "test": 0}, "no clips asked for"),
        ({"workers": 0}, "workers=0"),
        ({"seed": -3}, "seed=-3"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(tmp_path, change, part):
    with pytest.raises(UserError, match=part):
        synthesize(tmp_path / "new", **({"seed": 1} | COUNTS | change))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_renders_the_same_bytes_again_and_other_scenes_than_the_others(tmp_path, kind):
    for name in ("one", "two"):
        synthesize(tmp_path / name, seed=3, train=2, validation=1, test=0, kind=kind)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["kind"] == kind
    rows = read_examples(tmp_path / "one", "train")
    assert rows
    assert all((tmp_path / "one" / row.media).is_file() for row in rows)
    types = {"images": {"image"}, "captions": {"caption", "classes"}, "sounds": {"classes"}}
    assert {row.question_type for row in rows} <= types.get(kind, {row.question_type for row in rows})


def test_most_captioned_clips_are_silent_and_only_the_others_name_sounds(tmp_path):
    from mirasol.media.reader import probe_media

    synthesize(tmp_path / "data", seed=3, train=12, validation=0, test=0, kind="captions")
    kinds: dict[str, set[str]] = {}
    for row in read_examples(tmp_path / "data", "train"):
        kinds.setdefault(row.media, set()).add(row.question_type)
    audible = {media for media in kinds if probe_media(tmp_path / "data" / media).audio is not None}
    assert 0 < len(audible) < 6
    assert {media for media, types in kinds.items() if "classes" in types} == audible


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="kind='songs': choose questions, whole, conversations, flashes"):
        synthesize(tmp_path / "data", seed=3, train=1, validation=0, test=0, kind="songs")


def test_pixels_samples_and_questions_of_the_first_world_never_change():
    """What the shipped weights were trained on: recorded before there was another world."""
    known = hashlib.sha256()
    for split in SPLITS:
        for index in range(5):
            scene = make_split_scene(3, split, index)
            asked = [(q.prompt, q.target, q.candidates, q.start) for q in list_clip_questions(scene, 3, split, index)]
            known.update(repr(asked).encode())
            known.update(render_frames(scene).tobytes())
            # Sines differ in the last bits from one processor's library to another.
            known.update((1000 * render_waveform(scene)).round().astype("i2").tobytes())
    assert known.hexdigest() == "24ea28cdb2a8f0da66b8bc12ee14ae762c27ee67a437fa666f0a0c809b999f74"


def test_another_world_is_named_and_repeats_its_bytes(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        synthesize(tmp_path / name, seed=3, train=2, validation=1, test=1, world=SIGNS_AND_SIGNALS, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["data_set"] == "signs and signals"
    targets = {row.target for split in SPLITS for row in read_examples(tmp_path / "one", split)}
    assert not targets & {*SHAPES_AND_SOUNDS.shapes, *SHAPES_AND_SOUNDS.colours, *SHAPES_AND_SOUNDS.timbres}


def test_an_unknown_world_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "synthesize", str(tmp_path / "data"), "--world", "moon"])
    assert "world='moon': choose shapes or signs" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
