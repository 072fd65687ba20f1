"""Texts that are too long: known before a tokenizer is trained, listed with their place, refused, left out or cut."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from mirasol import MirasolConfig
from mirasol.checkpoint import load_checkpoint, load_processor
from mirasol.cli.main import main
from mirasol.config.recipe import DataRecipe
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.data.check import check_dataset
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import Example
from mirasol.data.text_lengths import TextLimit, count_row_tokens, cut_text, make_counter
from mirasol.errors import UserError
from mirasol.evaluation.evaluate import AnswerSettings, _select_askable
from mirasol.media.tokenizer import TextRows, train_tokenizer
from mirasol.training import build
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train

# Four options, as multiple choice asks them: 67 tokens of the shipped tokenizer and more.
OPTIONS = (
    "which of these is the shape that is seen first in the clip? answer with one of the four options: a small yellow "
    "circle on the left, a large blue triangle on the right, a green square in the middle, a red star at the top"
)
STRANGE = ["ein Glöckchen, läutend …", "何が聞こえますか", "x" * 90, "a, b; c: d! " * 20, "🎵" * 9, " "]
TEXTS = ["what is heard?", "a bell", *STRANGE]


def rows_of(prompts_and_targets) -> list[Example]:
    pairs = enumerate(prompts_and_targets)
    return [Example(str(number), "a.mp4", None, None, prompt, target) for number, (prompt, target) in pairs]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def test_the_least_count_is_never_more_than_any_tokenizers():
    least, rows = make_counter(None), rows_of((prompt, target) for prompt in TEXTS for target in TEXTS)
    for vocabulary in (270, 400, 2000):
        trained = make_counter(train_tokenizer(TEXTS, vocabulary))
        for (_, low), (example, exact) in zip(
            count_row_tokens(rows, least), count_row_tokens(rows, trained), strict=True
        ):
            assert low <= exact, example
    assert [count for _, count in count_row_tokens(rows_of([("a b c", "d e")]), least)] == [8]


def test_counts_are_those_of_the_rows_that_are_trained_on(tokenizer):
    rows = TextRows(tokenizer, 10_000)
    for example, count in count_row_tokens(rows_of([(a, b) for a in TEXTS for b in TEXTS]), make_counter(tokenizer)):
        assert rows.encode([example.prompt], [example.target])["decoder_input_ids"].shape[1] == count


@pytest.mark.parametrize("limit", [8, 20, 64])
def test_what_is_cut_fits_and_what_fits_is_not_touched(tokenizer, tmp_path, limit):
    rows = rows_of([(prompt, target) for prompt in TEXTS for target in TEXTS if prompt.strip() and target.strip()])
    rows.append(
        dataclasses.replace(rows[0], id="many", target="a bell", references=("a bell", "b " * 80), random_target=True)
    )
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"id": e.id, "file": e.media, "prompt": e.prompt, "target": e.target}) + "\n" for e in rows)
    )
    (tmp_path / "a.mp4").touch()
    data = DataRecipe(str(tmp_path), on_long_text="truncate")
    kept, long = TextLimit(data, limit, learned=False).apply({"": rows}, "train", tokenizer)
    count = make_counter(tokenizer)
    before = dict(zip((e.id for e in rows), (n for _, n in count_row_tokens(rows, count)), strict=True))
    assert {text.id: text.tokens for text in long} == {id: n for id, n in before.items() if n > limit}
    for old, (new, tokens) in zip(rows, count_row_tokens(kept[""], count), strict=True):
        assert tokens <= limit
        assert (new == old) == (before[old.id] <= limit)
        assert old.prompt.startswith(new.prompt) and old.target.startswith(new.target)
    lines = {e.id: number for number, e in enumerate(rows, 1)}
    assert all(text.place == f"train.jsonl, line {lines[text.id]}" for text in long)


def test_a_text_is_cut_at_the_end_of_a_word(tokenizer):
    count = make_counter(tokenizer)
    text = "what is heard? a bell, then what is heard again and again"
    for most in range(3, 12):
        cut = cut_text(text, most, count)
        assert count([cut])[0] <= most and text.startswith(cut)
        assert text[len(cut)].isspace()
    assert count([cut_text("x" * 90, 5, count)])[0] <= 5


@pytest.fixture
def wordy(values, data_root, tmp_path) -> dict:
    """The recipe on data with two texts of different lengths that are too long, in both splits."""
    root = Path(shutil.copytree(data_root, tmp_path / "wordy"))
    for split, number in (("train", 2), ("validation", 1)):
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        long = {"file": rows[0]["file"], "target": "so"}
        extra = [{**long, "id": f"long-{place}", "prompt": "why " * (80 + place)} for place in range(number)]
        rows = [*rows[:3], *extra, *rows[3:]]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"]["root"] = str(root)
    values["stages"] = {"slots": {"steps": 2, "span": "segment", "clips_per_step": 2, "questions_per_clip": 1},
                        "questions": {"epochs": 1, "clips_per_step": 5, "questions_per_clip": 60}}  # fmt: skip
    return values


def test_a_long_text_is_refused_with_its_place_before_a_tokenizer_is_trained(wordy, console, monkeypatch):
    monkeypatch.setattr(build, "train_tokenizer", lambda *given: pytest.fail("trained"))
    with pytest.raises(
        UserError, match=r"^2 of \d+ train examples .* max_text_length=64 .*train\.jsonl, line 4: at least"
    ):
        train(recipe_from_dict(wordy), console=console)
    assert not Path(wordy["output"]).exists()


@pytest.mark.parametrize("policy", ["skip", "truncate"])
def test_long_texts_are_left_out_or_cut_counted_and_listed(wordy, console, policy):
    wordy["data"]["on_long_text"] = policy
    folder = Path(train(recipe_from_dict(wordy), console=console)).parent
    said = console.file.getvalue()
    done = {"skip": "left out", "truncate": "cut"}[policy]
    assert "2 train examples have too long texts" in said and f"and are {done}: see" in said.replace("\n", " ")
    listed = [json.loads(line) for line in (folder / "long_texts.jsonl").read_text().splitlines()]
    assert [(row["part"], row["id"], row["place"]) for row in listed] == [
        ("train", "long-0", "train.jsonl, line 4"),
        ("train", "long-1", "train.jsonl, line 5"),
        ("validation", "long-0", "validation.jsonl, line 4"),
    ]
    asked = len([e for e in read_examples(Path(wordy["data"]["root"]), "train") if e.start is None and e.end is None])
    assert f"1 epochs of {asked - 2 * (policy == 'skip')} questions" in said
    # A resumed run finds the same.
    shutil.rmtree(folder / "checkpoint")
    before = (folder / "metrics.jsonl").read_bytes()
    train(recipe_from_dict(wordy), resume=True, console=console)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_fixed_code_goes_beyond_its_default_and_learned_positions_do_not(wordy, console):
    wordy["data"]["max_text_length"] = 100
    folder = Path(train(recipe_from_dict(wordy), console=console)).parent
    assert read_metrics(folder / "metrics.jsonl")
    wordy["output"] += "-learned"
    wordy["model"]["overrides"]["text"] = {**wordy["model"]["overrides"]["text"], "learned_positions": True}
    with pytest.raises(UserError, match=r"data\.max_text_length=100: the model has 64 learned positions: set at most"):
        train(recipe_from_dict(wordy), console=console)
    wordy["data"]["max_text_length"] = None
    with pytest.raises(UserError, match="the model has no positions beyond: data.on_long_text to skip or truncate"):
        train(recipe_from_dict(wordy), console=console)
    wordy["data"].update(on_long_text="skip")
    checkpoint = train(recipe_from_dict(wordy), console=console)
    assert load_processor(checkpoint).max_text_length == 64


@pytest.mark.parametrize(("value", "said"), [(4, "at least 5"), (0, "at least 5"), (9000, "at most 8192")])
def test_impossible_limits_are_refused(values, console, value, said):
    values["data"]["max_text_length"] = value
    with pytest.raises(UserError, match=rf"data\.max_text_length={value}.*{said}"):
        train(recipe_from_dict(values), console=console)


def test_data_check_tells_of_long_texts(wordy, capsys):
    root = wordy["data"]["root"]
    least = check_dataset("folder", Path(root), open_media=False)
    found = [p for p in least.problems if p.kind == "long text"]
    assert [(p.file, p.line) for p in found] == [("train.jsonl", 4), ("train.jsonl", 5), ("validation.jsonl", 4)]
    assert "at least 85 tokens, over 64" in found[0].message and least.good
    main(["data", "check", "folder", root, "--skip-media", "--tokenizer", "tiny", "--max-text-length", "20"])
    shown = capsys.readouterr().out
    assert "warning: long text (" in shown and "tokens, over 20: 'why" in shown and "at least" not in shown
    assert shown.count("over 20") >= 3


def test_web_recipes_leave_long_captions_out():
    recipes = Path(__file__).parents[2] / "recipes" / "paper"
    policies = {name: load_recipe(recipes / f"{name}.yaml").data.on_long_text for name in ("image_text", "audio")}
    assert policies == {"image_text": "skip", "audio": "error"}
    assert load_recipe(recipes / "video_text.yaml").data.on_long_text == "skip"


def test_the_shipped_model_takes_a_prompt_of_four_options(capsys, data_root, tmp_path):
    loaded = load_checkpoint("tiny")
    media = data_root / read_examples(data_root, "train")[0].media
    batch = loaded.processor([media], [OPTIONS])
    assert batch["decoder_input_ids"].shape[1] >= 67
    assert loaded.model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 1
    main(["ask", "tiny", str(media), OPTIONS])
    assert capsys.readouterr().out.strip()
    example = Example("a", str(media), None, None, OPTIONS, "a bell", candidates=("a bell", "a drum"))
    askable, left_out = _select_askable(loaded.processor, [example], AnswerSettings(tmp_path))
    assert askable == [example] and not left_out


def test_what_an_older_version_saved_has_its_limit_only_where_positions_are_learned(finished_run):
    file = finished_run / "checkpoint" / "processor_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "max_text_length": 64}))
    assert load_processor(finished_run).max_text_length == MirasolConfig.preset("tiny").text.longest_text == 8192
    file.write_text(json.dumps({**saved, "max_text_length": 30}))
    assert load_processor(finished_run).max_text_length == 30
