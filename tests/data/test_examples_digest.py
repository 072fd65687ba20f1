"""One hash says whether two readings of a data set gave the same."""

import shutil
from dataclasses import replace

from mirasol.data.datasets.folder import read_examples
from mirasol.data.digest import digest_examples


def test_it_notices_texts_and_sizes_of_media_and_not_where_they_lie(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "data")
    examples = read_examples(root, "train")
    before = digest_examples(root, examples)
    assert not before.missing
    assert digest_examples(shapes, read_examples(shapes, "train")) == before
    assert digest_examples(root, examples[1:]) != before
    assert digest_examples(root, [replace(examples[0], target="other"), *examples[1:]]) != before
    media = examples[0].media
    contents = digest_examples(root, examples, contents=True)
    content = (root / media).read_bytes()
    (root / media).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert digest_examples(root, examples) == before
    assert digest_examples(root, examples, contents=True) != contents
    (root / media).write_bytes(content + b"\0")
    assert digest_examples(root, examples).sha256 != before.sha256


def test_it_names_what_is_missing_and_looks_at_no_other_media_than_it_is_told_to(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "data")
    examples = read_examples(root, "train")
    first, *others = dict.fromkeys(example.media for example in examples)
    (root / first).unlink()
    assert digest_examples(root, examples).missing == (first,)
    assert not digest_examples(root, examples, media=others).missing
    assert digest_examples(root, examples, media=others) == digest_examples(shapes, examples, media=others)
