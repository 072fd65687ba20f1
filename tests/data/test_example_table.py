"""Packed examples are the examples they were made of, in memory, in files and in another process."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from mirasol.data.example import Example, group_by_clip
from mirasol.data.example_table import ExampleTable

CLASSES = tuple(f"class {number}" for number in range(300))


@pytest.fixture
def examples() -> list[Example]:
    """All fields in use: windows, types, class lists, own candidates, references, texts that are not ASCII."""
    return [
        Example("a", "clips/1.mp4", None, None, "what?", "a dog", "what"),
        Example("b", "clips/2.mp4", 0.1, 2.0, "ein 犬 ?", "größe\x1f\ud800", "how", candidates=CLASSES, answer_index=7),
        Example("c", "clips/1.mp4", None, None, "who?", "x", "who", ("x", "y", "z"), "vid", ("x", "why"), 0, True),
        Example("d", "clips/2.mp4", 2.0, None, "", "", "", candidates=CLASSES),
        Example("e", "clips/3.mp4", None, 1 / 3, 'quote " and \n line', "t", "what"),
        Example("f", "clips/1.mp4", None, None, "when?", "now", "what"),
    ]


def selections(table: ExampleTable) -> list[np.ndarray]:
    return [np.ones(len(table), bool), table.windowed, ~table.windowed, np.arange(len(table)) > 0]


def test_a_table_is_the_sequence_it_was_made_of(examples):
    table = ExampleTable.of(examples)
    assert list(table) == examples == table[:]
    assert table == examples
    assert table[-1] == examples[-1]
    assert table[1:4] == examples[1:4]
    assert table != examples[1:]
    assert table[1].candidates is table[3].candidates, "a class list is kept once"
    assert ExampleTable.of(table) is table
    with pytest.raises(IndexError):
        table[len(examples)]


def test_clips_are_those_that_grouping_gives(examples):
    table = ExampleTable.of(examples)
    for wanted in selections(table):
        expected = group_by_clip(example for example, used in zip(examples, wanted, strict=True) if used)
        clips = table.clips(wanted)
        assert list(clips) == expected
        assert list(clips.windows()) == [(clip.media, clip.start, clip.end) for clip in expected]
        assert clips[:1] == expected[:1]


def test_a_stored_table_travels_as_the_name_of_its_files(examples, tmp_path):
    many = [replace(example, id=f"{number}{example.id}") for number in range(2000) for example in examples]
    table = ExampleTable.of(many)
    stored = table.store(tmp_path / "examples")
    clips = table.clips(~table.windowed).store(tmp_path / "clips", stored)
    assert len(pickle.dumps(clips)) < 10_000 < table.nbytes < len(pickle.dumps(table))
    elsewhere = pickle.loads(pickle.dumps(clips))
    assert list(elsewhere) == group_by_clip(example for example in many if example.start is example.end is None)
    assert pickle.loads(pickle.dumps(table)) == many
    assert pickle.loads(pickle.dumps(stored)) == many


def test_storing_anew_leaves_whoever_reads_the_old_files_in_peace(examples, tmp_path):
    first = ExampleTable.of(examples).store(tmp_path)
    second = ExampleTable.of(examples[:2]).store(tmp_path)
    assert first == examples
    assert second == examples[:2]


def test_clips_can_be_left_out(examples):
    table = ExampleTable.of(examples).without([("clips/1.mp4", None, None), ("clips/2.mp4", 2.0, None)])
    assert [example.id for example in table] == ["b", "e"]


def test_no_examples_are_a_table_too():
    table = ExampleTable.of([])
    assert len(table) == len(table.clips(table.windowed)) == 0
    assert table.types == ()
