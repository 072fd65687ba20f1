"""Whether a model has seen rendered scenes only is recorded by training and export, from the data's manifests."""

import dataclasses
import json

import pytest

from mirasol.checkpoint import read_rendered_world
from mirasol.training.export import export_run
from mirasol.training.run_folder import find_rendered_world

WORLD = "shapes and sounds"
RENDERED = {"data_set": WORLD, "data_version": 1, "kind": "questions", "seed": 3}


def test_a_run_on_rendered_clips_says_so_and_its_export_too(finished_run, tmp_path):
    assert read_rendered_world(finished_run / "checkpoint") == WORLD
    exported = export_run(finished_run, tmp_path / "export")
    assert read_rendered_world(exported) == WORLD
    assert f"rendered scenes only ({WORLD})" in (exported / "README.md").read_text()


@pytest.mark.parametrize(
    ("manifest", "start", "expected"),
    [
        (RENDERED, None, WORLD),
        (RENDERED, WORLD, WORLD),
        (RENDERED, "another world", None),
        (RENDERED, "unknown", None),
        ({"data_set": "my films"}, None, None),
        ([RENDERED], None, None),
        ("not json", None, None),
        (None, None, None),
    ],
)
def test_one_thing_that_is_not_rendered_is_enough(recipe, untrained, tmp_path, manifest, start, expected):
    data = dataclasses.replace(recipe.data, root=str(tmp_path))
    changed = dataclasses.replace(recipe, data=data)
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (tmp_path / "manifest.json").write_text(text)
    if start is not None:
        (tmp_path / "start").mkdir()
        (tmp_path / "start" / "config.json").write_text("{}")
        if start != "unknown":
            (tmp_path / "start" / "training.json").write_text(json.dumps({"rendered_world": start}))
        model = dataclasses.replace(recipe.model, init=str(tmp_path / "start"))
        object.__setattr__(changed, "model", model)  # the other rules about `init` are not the subject
    assert find_rendered_world(changed) == expected
