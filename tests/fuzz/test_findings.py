"""What fuzzing found, in its smallest form, and what became of it: mended, and refused in one line or read."""

import copy
import functools
import json
import operator
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from fuzz import Fuzzer

from mirasol.config.recipe_io import load_recipe
from mirasol.data.media_files import get_index_path, read_tar_index
from mirasol.data.shards.verify import _find_member_problems
from mirasol.errors import UserError

# (seed, mutations, number of the case) of media, rendered and mutated here
MEDIA = {
    # Sound that begins after the end that the header states left nothing to write, which was taken for something.
    "re-encoding": ("wmv2.wmv", [("repeat", 12763, 8192, 3342)], 2157),
    # A page without content was looked at for ever.
    "an Ogg page without content": ("vp8.ogg", [("repeat", 144, 256, 274)], 6064),
    "an Ogg page cut short": ("vp8.ogg", [("cut", 22509)], 8763),
}


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Fuzzer:
    return Fuzzer("media", 0, tmp_path_factory.mktemp("media"))


@pytest.mark.parametrize("name", MEDIA)
def test_media(media, name):
    seed, mutations, number = MEDIA[name]
    if ("media", seed) not in media.seeds:
        pytest.skip(f"this PyAV cannot make {seed}")
    outcomes = media.run(("media", seed), seed, mutations, number)
    assert not [outcome for outcome in outcomes if outcome.startswith("FOUND")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: " + "[" * 3000, "nested too deeply"),
        ("seed: " + '{"a":' * 3000, "nested too deeply"),
        ("seed: 2001-99-01", "not a YAML file"),
        ("data: {augment: {mixup: null}}", "."),
        ("steps: null", "."),
    ],
)
def test_recipes(tmp_path, text, reason):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=reason) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(refused.value)


def test_null_is_refused_where_a_recipe_has_a_number_and_as_an_option_is_its_default(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for path in ("log_every", "optimizer.learning_rate", "validation_clips", "optimizer.warmup_steps"):
        *parents, key = path.split(".")
        changed = copy.deepcopy(values)
        part = functools.reduce(operator.getitem, parents, changed)
        part[key] = None
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(UserError, match=f"{path}: null, expected "):
            load_recipe(tmp_path / "recipe.yaml")
        del part[key]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed))
        assert load_recipe(recipe, [f"{path}=null"]) == load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="seed: null, expected "):  # has no default
        load_recipe(recipe, ["seed=null"])


@pytest.mark.parametrize("index", ["[" * 100_000, "{}", '{"members": []}', '{"members": {"a": 1}}', "\xff"])
def test_an_unreadable_index_of_a_shard_is_a_problem(tmp_path, index):
    tar = tmp_path / "00000.tar"
    tar.write_bytes(bytes(10_240))
    get_index_path(tar).write_text(index, encoding="latin-1")
    assert read_tar_index(tar).members == {}
    assert _find_member_problems(tar, tar.name, hashes=False) == [("wrong index", "its index file cannot be read", "")]


def test_matrices_of_predictions(tmp_path):
    from mirasol.evaluation.predictions import read_predictions

    file = tmp_path / "pred.npy"
    np.save(file, np.zeros((1, 2)))
    whole = file.read_bytes()
    for content in (
        whole.replace(b"(1, 2)", b"(1, 2 "),
        whole.replace(b"{'descr'", b"{'des\ncr"),
        whole[:20],
        b"PK\3\4",
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not an array of numbers"):
            read_predictions(file, "vggsound", [])
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UserError, match="not an array of numbers"):
        read_predictions(file, "vggsound", [])


@pytest.mark.parametrize("part", ["[" * 100_000, '{"model": {"type": ""}}', '{"added_tokens": [{"id": 1e99}]}', "{}"])
def test_tokenizers(untrained, tmp_path, part):
    from mirasol.checkpoint import load_processor

    for file in untrained.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(part)
    with pytest.raises(UserError) as refused:
        load_processor(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_config_nested_too_deeply(untrained, tmp_path):
    from mirasol.checkpoint import read_config

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mirasol"})[:-1] + ', "a": ' + "[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_config(tmp_path)


def test_messages_on_the_command_line_are_short_and_printable():
    from mirasol.cli.main import LONGEST_MESSAGE, _shorten

    assert _shorten("a\nb\x1b[31m \x00") == "a b\\x1b[31m \\x00"
    assert len(_shorten("a" * 10**6)) < LONGEST_MESSAGE + 10
