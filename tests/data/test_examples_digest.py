"""One hash says whether two readings of a data set gave the same."""

import shutil
from dataclasses import replace

from mirasol.data.datasets.folder import read_examples
from mirasol.data.digest import examples_digest


def test_it_notices_texts_and_sizes_of_media_and_not_where_they_lie(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "data")
    examples = read_examples(root, "train")
    before = examples_digest(root, examples)
    assert not before.missing
    assert examples_digest(shapes, read_examples(shapes, "train")) == before
    assert examples_digest(root, examples[1:]) != before
    assert examples_digest(root, [replace(examples[0], target="other"), *examples[1:]]) != before
    media = examples[0].media
    contents = examples_digest(root, examples, contents=True)
    content = (root / media).read_bytes()
    (root / media).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert examples_digest(root, examples) == before
    assert examples_digest(root, examples, contents=True) != contents
    (root / media).write_bytes(content + b"\0")
    assert examples_digest(root, examples).sha256 != before.sha256


def test_it_names_what_is_missing_and_looks_at_no_other_media_than_it_is_told_to(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "data")
    examples = read_examples(root, "train")
    first, *others = dict.fromkeys(example.media for example in examples)
    (root / first).unlink()
    assert examples_digest(root, examples).missing == (first,)
    assert not examples_digest(root, examples, media=others).missing
    assert examples_digest(root, examples, media=others) == examples_digest(shapes, examples, media=others)
