"""Mirasol as a model of lmms-eval (extra `lmms-eval`): found by its entry point, asked as it was trained to be."""

import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="pip install 'mirasol[lmms-eval]', then lmms-eval without its dependencies")

from lmms_eval.models.registry_v2 import ModelRegistryV2

from mirasol import load_checkpoint
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.evaluation.answer import answer_clips, load_clip
from mirasol.evaluation.lmms import MirasolLmms, split_options

LETTERS = "ABCDEFGHIJKLMNOP"


class Request:
    def __init__(self, *arguments):
        self.args = arguments


@pytest.fixture(scope="module")
def clips(shapes) -> dict[str, list[dict]]:
    """Rows of the test split by file."""
    rows = [json.loads(line) for line in (shapes / "test.jsonl").read_text().splitlines()]
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["start"] is None and row["candidates"]:
            found.setdefault(str(shapes / row["file"]), []).append(row)
    return found


@pytest.fixture(scope="module")
def model() -> MirasolLmms:
    return MirasolLmms(pretrained="tiny", device="cpu")


def ask(model: MirasolLmms, kind: str, rows: list[tuple[str, object, object]]) -> list:
    """The model's answers to (context, second argument, media) rows."""
    model.task_dict = {"task": {"test": [media for _, _, media in rows]}}
    return getattr(model, kind)(
        [Request(context, wanted, lambda doc: [doc], place, "task", "test") for place, (context, wanted, _) in
         enumerate(rows)]
    )  # fmt: skip


def lettered(row: dict, style: str = "{}. {}") -> str:
    return "\n".join([row["prompt"], *(style.format(*pair) for pair in zip(LETTERS, row["candidates"], strict=False))])


def test_the_entry_point_gives_a_model_that_lmms_eval_takes():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["mirasol"].partition(":")
    registry = ModelRegistryV2()
    [manifest] = registry._coerce_payload_to_manifests(getattr(import_module(module), name))
    registry.register_manifest(manifest)
    assert registry.get_model_class("mirasol") is MirasolLmms
    assert not any("torch" in package for package in project["optional-dependencies"]["lmms-eval"])


@pytest.mark.parametrize("before", ["", "Choose the best answer.\n"])
@pytest.mark.parametrize("after", ["", "\nAnswer with the option's letter from the given choices directly."])
@pytest.mark.parametrize("style", ["{}. {}", "({}) {}", "{}) {}", "{}: {}"])
@pytest.mark.parametrize("options", [["yes", "no"], ["a. b", "B. c", "", "(C) d", "e"][:2], ["1", "2", "3", "4", "5"]])
def test_options_are_found_in_a_context_whatever_stands_around_them(before, after, style, options):
    lines = "\n".join(style.format(*pair) for pair in zip(LETTERS, options, strict=False))
    question, found = split_options(f"{before}what is it?\n{lines}{after}")
    assert (question, list(found.values())) == ("what is it?", options)
    assert "".join(found) == LETTERS[: len(options)]


@pytest.mark.parametrize("more", ["", "\nAnswer with one word.", "\n\nA. is the only option", "\nB. x\nC. y"])
def test_a_context_without_options_is_its_first_line(more):
    assert split_options(f"what?{more}") == ("what?", {})


def test_letters_and_texts_are_those_of_mirasol_itself(model, clips):
    own = load_checkpoint("tiny")
    rows, expected = [], []
    for file, questions in clips.items():
        tensors = load_clip(own.processor.feature_extractor, Path("/"), Example("", file, None, None, "", ""))
        prompts = [row["prompt"] for row in questions]
        [answers] = answer_clips(own.model, own.processor, [tensors], [prompts])
        expected += [answer.text for answer in answers]
        rows += [(row["prompt"], {"max_new_tokens": 16}, file) for row in questions]
    assert ask(model, "generate_until", rows) == expected
    chosen = [(lettered(row), {}, file) for file, questions in clips.items() for row in questions]
    targets = [row["target"] for questions in clips.values() for row in questions]
    letters = ask(model, "generate_until", chosen)
    texts = [split_options(context)[1][letter] for (context, _, _), letter in zip(chosen, letters, strict=True)]
    right = sum(text == target for text, target in zip(texts, targets, strict=True))
    assert right > 0.7 * len(targets)


def test_log_likelihoods_prefer_what_is_generated(model, clips):
    file, questions = next(iter(clips.items()))
    row = questions[0]
    rows = [(row["prompt"], f" {text}", file) for text in row["candidates"]]
    scores = ask(model, "loglikelihood", rows)
    [answer] = ask(model, "generate_until", [(row["prompt"], {}, file)])
    best = max(range(len(rows)), key=lambda place: scores[place][0])
    assert row["candidates"][best] == answer and [greedy for _, greedy in scores].index(True) == best
    assert all(score < 0 for score, _ in scores)


def test_generation_stops_where_the_task_says(model, clips):
    file, questions = next(iter(clips.items()))
    [answer] = ask(model, "generate_until", [(questions[0]["prompt"], {}, file)])
    [cut] = ask(model, "generate_until", [(questions[0]["prompt"], {"until": [answer[1]]}, file)])
    assert cut == answer.partition(answer[1])[0] != answer


def test_sound_as_numbers_is_read(model):
    import numpy as np

    for channels in (1, 2):
        array = np.zeros((channels, 16_000)) if channels > 1 else np.zeros(16_000)
        [answer] = ask(model, "generate_until", [("what?", {}, {"array": array, "sampling_rate": 16_000})])
        assert isinstance(answer, str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give pretrained=DIR"),
        ({"pretrained": "tiny", "prompt": "chat"}, "prompt=chat: choose question or full"),
        ({"pretrained": "tiny", "on_bad_clip": "x"}, "on_bad_clip=x: choose error or skip"),
        ({"pretrained": "tiny", "use_cache": True}, "unknown use_cache"),
        ({"pretrained": "tiny", "batch_size": 8}, "--batch_size 8: set 1"),
        ({"pretrained": "/nowhere"}, "no such checkpoint"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        MirasolLmms(**arguments)
    assert "\n" not in str(error.value)


def test_what_cannot_be_answered_is_refused_by_name(model, clips):
    file = next(iter(clips))
    for wanted in ({"do_sample": True}, {"num_beams": 4}):
        with pytest.raises(UserError, match="decodes greedily"):
            ask(model, "generate_until", [("what?", wanted, file)])
    model.task_dict = {"task": {"test": [file]}}
    with pytest.raises(UserError, match="task task: 2 media for a question"):
        model.generate_until([Request("what?", {}, lambda doc: [doc, doc], 0, "task", "test")])
    with pytest.raises(UserError, match="several rounds"):
        model.generate_until_multi_round([])


def test_bad_media_stop_or_are_counted(model, clips, tmp_path):
    file = next(iter(clips))
    (tmp_path / "bad.mp4").write_text("<html>")
    rows = [("what?", {}, str(tmp_path / "bad.mp4")), ("what?", {}, file)]
    with pytest.raises(UserError, match=r"bad.mp4.*on_bad_clip=skip"):
        ask(model, "generate_until", rows)
    lenient = MirasolLmms(pretrained="tiny", device="cpu", on_bad_clip="skip")
    assert ask(lenient, "generate_until", rows)[0] == "" and lenient.bad == [str(tmp_path / "bad.mp4")]


def test_lmms_eval_runs_a_task_from_start_to_end(clips, tmp_path):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    rows = [
        {"file": file, "context": lettered(row), "letter": LETTERS[row["candidates"].index(row["target"])]}
        for file, questions in clips.items()
        for row in questions
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tools.py").write_text("def visual(doc):\n    return [doc['file']]\n")
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function tools.visual\n"
        "doc_to_text: '{{context}}'\ndoc_to_target: '{{letter}}'\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    import lmms_eval.models

    from mirasol.evaluation.lmms import make_manifest

    lmms_eval.models.MODEL_REGISTRY_V2.register_manifest(make_manifest(), overwrite=True)
    found = simple_evaluate(
        model="mirasol", model_args="pretrained=tiny", tasks=["own"], device="cpu", batch_size=1,
        task_manager=TaskManager("ERROR", include_path=str(tmp_path), model_name="mirasol"),
    )  # fmt: skip
    assert found["results"]["own"]["exact_match,none"] > 0.7
