"""Stages with epochs: every question exactly once in each of them, whatever the data, the batches and the processes."""

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mirasol import MirasolForConditionalGeneration, MirasolProcessor
from mirasol.config.model import MirasolConfig
from mirasol.config.parts import IGNORED_LABEL
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.cost.plan import read_clips_of_stages
from mirasol.data.clip_cache import BadWindow, ClipCache
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import Example
from mirasol.data.loader import BatchTexts, RowsOfRank, StepBatches
from mirasol.data.sampler import Batch, BatchPlan
from mirasol.errors import UserError
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.training import trainer
from mirasol.training.export import export_run
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train

VIDEOS = {"one": 1, "five": 5, "forty": 40, "two": 2, "another": 1}


def ask(videos: dict[str, int], prefix: str = "", types: str = "ab") -> list[Example]:
    """So many questions about each video, of the types in turn."""
    return [
        Example(
            f"{prefix}{name}-{number}", f"{name}.mp4", None, None, f"what {number}?", "yes", types[number % len(types)]
        )
        for name, count in videos.items()
        for number in range(count)
    ]


def plan_of(stage: dict, examples, seed: int = 3, data: dict | None = None) -> BatchPlan:
    values = {"seed": seed, "output": "x", "data": data or {"root": "x"}, "stages": {"all": stage}}
    return BatchPlan(recipe_from_dict(values), examples)


def counted(batch: Batch) -> list[tuple[int, str]]:
    """(epoch, id) of every question that counts."""
    flags = batch.counted
    return [
        (epoch, example.id)
        for epoch, row, counts in zip(batch.epochs, batch.examples, flags, strict=True)
        for example, one in zip(row, counts, strict=True)
        if one
    ]


def batches_of(plan: BatchPlan) -> list[Batch]:
    return [plan.batch(step) for step in range(plan.recipe.total_steps)]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("clips", "questions"), [(1, 1), (4, 1), (6, 3), (12, 8), (6, 64)])
def test_each_question_comes_exactly_once_an_epoch(epochs, clips, questions):
    examples = ask(VIDEOS)
    plan = plan_of({"epochs": epochs, "clips_per_step": clips, "questions_per_clip": questions}, examples)
    batches = batches_of(plan)
    asked = Counter(entry for batch in batches for entry in counted(batch))
    assert asked == Counter((epoch, example.id) for epoch in range(epochs) for example in examples)
    assert all(len(row) == questions for batch in batches for row in batch.examples)
    # No step more than the questions need, and none of it but in the last step only to fill it.
    needed = epochs * sum(-(-count // questions) for count in VIDEOS.values())
    assert len(batches) == -(-needed // clips)
    assert [len(batch.fillers) for batch in batches[:-1]] == [0] * (len(batches) - 1)
    assert len(batches[-1].fillers) == len(batches) * clips - needed
    assert not any(batch.repeated for batch in batches)


def test_order_follows_from_seed_and_epoch_alone():
    stage = {"epochs": 3, "clips_per_step": 5, "questions_per_clip": 2}

    def orders(plan) -> list[list[str]]:
        every = [entry for batch in batches_of(plan) for entry in counted(batch)]
        return [[id for epoch, id in every if epoch == number] for number in range(plan.recipe.stages["all"].epochs)]

    first = orders(plan_of(stage, ask(VIDEOS)))
    assert all(one != two for one, two in pairwise(first))
    assert first[:2] == orders(plan_of({**stage, "epochs": 2, "clips_per_step": 7}, ask(VIDEOS)))
    assert first != orders(plan_of(stage, ask(VIDEOS), seed=4))
    # Questions of a clip that come together are not the same ones in every epoch.
    plan = plan_of(stage, ask({"forty": 40}))
    pairs = [frozenset(e.id for e in row) for batch in batches_of(plan) for row in batch.examples]
    assert len(set(pairs)) > 0.9 * len(pairs)


def test_any_step_on_its_own_and_from_files_is_the_same(tmp_path):
    plan = plan_of({"epochs": 2, "clips_per_step": 4, "questions_per_clip": 3}, ask(VIDEOS))
    forwards = batches_of(plan)
    stored = plan.store(tmp_path)
    assert [stored.batch(step) for step in reversed(range(len(forwards)))] == forwards[::-1]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_processes_shares_the_same_questions(processes, accumulation):
    stage = {"epochs": 2, "clips_per_step": 12, "questions_per_clip": 2}
    values = {"seed": 3, "output": "x", "data": {"root": "x"}, "stages": {"all": stage}, "accumulation": accumulation}
    plan = BatchPlan(recipe_from_dict(values), ask(VIDEOS))
    asked = Counter()
    for rank in range(processes):
        rows = RowsOfRank(plan.recipe, rank, processes)
        for step in range(plan.recipe.total_steps):
            asked.update(counted(plan.batch(step).select_rows(rows(step))))
    assert asked == Counter((epoch, example.id) for epoch in range(2) for example in ask(VIDEOS))


def test_several_data_sets_are_one_epoch_and_types_can_be_chosen():
    data = {"mixture": {"a": {"root": "x/a"}, "b": {"root": "x/b"}}}
    examples = {"a": ask({"one": 1, "nine": 9}, "a"), "b": ask(VIDEOS, "b")}
    stage = {"epochs": 2, "clips_per_step": 3, "questions_per_clip": 4, "question_types": ["b"]}
    batches = batches_of(plan_of(stage, examples, data=data))
    wanted = [example for own in examples.values() for example in own if example.question_type == "b"]
    assert Counter(entry for batch in batches for entry in counted(batch)) == Counter(
        (epoch, example.id) for epoch in range(2) for example in wanted
    )
    for batch in batches:
        assert all(row[0].id.startswith(name) for name, row in zip(batch.data_sets, batch.examples, strict=True))


def test_a_bad_clip_is_replaced_by_one_that_does_not_count():
    plan = plan_of({"epochs": 1, "clips_per_step": 4, "questions_per_clip": 2}, ask(VIDEOS))
    batch = plan.batch(1)
    replaced = plan.replace_clip(batch, 2, 1, BadWindow("x.mp4", None, None, "bad"))
    assert replaced.fillers == [2] and replaced.counted[:2] == batch.counted[:2]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({}, r"stages\.\w+: a stage has one of steps and epochs, found neither: set one"),
        ({"steps": 5, "epochs": 2}, r"found both \(steps=5, epochs=2\): set one, the other to null"),
        ({"epochs": 0}, "epochs=0 must be positive"),
        ({"epochs": -1}, "epochs=-1 must be positive"),
        ({"epochs": 1.5}, r"epochs.*1\.5"),
        ({"epochs": "ten"}, "epochs.*ten"),
        ({"epochs": 1, "type_weights": {"a": 2.0}}, "type_weights has no effect with epochs"),
    ],
)
def test_impossible_lengths_are_refused_in_one_line(stage, said):
    with pytest.raises(UserError, match=said) as refused:
        plan_of(stage, ask(VIDEOS))
    assert "\n" not in str(refused.value)


def test_weights_of_data_sets_that_only_epochs_use_are_refused():
    data = {"mixture": {"a": {"root": "x/a", "weight": 3.0}, "b": {"root": "x/b"}}}
    with pytest.raises(UserError, match=r"data\.mixture\.a\.weight=3 has no effect with epochs"):
        plan_of({"epochs": 1}, {}, data=data)
    values = {"seed": 0, "output": "x", "data": data, "stages": {"one": {"epochs": 1}, "two": {"steps": 1}}}
    assert recipe_from_dict(values).stages["two"].steps == 1


def test_steps_are_unknown_until_the_data_are_read(tmp_path):
    values = {"seed": 0, "output": "x", "data": {"root": str(tmp_path)}, "stages": {"all": {"epochs": 2}}}
    recipe = recipe_from_dict(values)
    for ask_for in (lambda: recipe.total_steps, lambda: read_clips_of_stages(recipe, [])):
        with pytest.raises(UserError, match=r"stages\.all\.epochs=2: its number of steps is unknown"):
            ask_for()
    assert BatchPlan(recipe, ask(VIDEOS)).recipe.to_dict() == recipe.to_dict()
    assert BatchPlan(recipe, ask(VIDEOS)).recipe.compute_fingerprint() == recipe.compute_fingerprint()


@pytest.fixture
def ragged(values, data_root, tmp_path) -> dict:
    """The recipe on clips of 1, 2, 3 … questions, in epochs."""
    root = tmp_path / "ragged"
    root.mkdir()
    for file in data_root.iterdir():
        if file.is_dir():
            (root / file.name).symlink_to(file)
    for split in ("train", "validation"):
        kept, seen = [], Counter()
        for line in (data_root / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            seen[row["file"]] += row.get("start") is None
            if row.get("start") is None and seen[row["file"]] <= list(seen).index(row["file"]) + 1:
                kept.append(line)
        (root / f"{split}.jsonl").write_text("\n".join(kept) + "\n")
    values["data"]["root"] = str(root)
    values["stages"] = {"questions": {"epochs": 3, "clips_per_step": 4, "questions_per_clip": 2}}
    values.update(validate_every=100, checkpoint_every=2)
    return values


def test_a_run_in_epochs_counts_its_steps_logs_its_epochs_and_resumes(ragged, console, monkeypatch):
    recipe = recipe_from_dict(ragged)
    total = BatchPlan(recipe, ragged_examples(ragged)).recipe.total_steps
    folder = Path(train(recipe, console=console)).parent
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    assert [line["epoch"] for line in lines] == sorted(line["epoch"] for line in lines)
    assert lines[0]["epoch"] == 1 and lines[-1]["epoch"] == 3
    assert lines[-1]["learning_rate"] == pytest.approx(0.05 * 1e-3)  # the schedule ends with the last step
    assert load_recipe(folder / "recipe.yaml").stages["questions"] == recipe.stages["questions"]
    assert json.loads((export_run(folder, folder / "out") / "training.json").read_text())["steps"] == total
    # Stopped in the middle of an epoch, another run of the recipe ends in the same weights.
    ragged["output"] += "-again"
    again = recipe_from_dict(ragged)
    step = trainer.training_step

    def stop_at_third(run, batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        return step(run, batch)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "training_step", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            train(again, console=console)
    other = Path(train(again, console=console, resume=True)).parent
    resumed = [line for line in read_metrics(other / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines]
    assert (other / "checkpoint/model.safetensors").read_bytes() == (
        folder / "checkpoint/model.safetensors"
    ).read_bytes()


def ragged_examples(values) -> list[Example]:
    return read_examples(Path(values["data"]["root"]), "train")


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_nothing_of_what_only_fills_a_batch_reaches_a_loss(ragged, finished_run, mixup, tmp_path):
    """Whatever stands in the rows that do not count, and in the clips that only fill, changes no loss."""
    ragged["stages"]["questions"]["augment"] = {"mixup": mixup}
    settings = MirasolConfig.preset("tiny").media_settings()
    plan = BatchPlan(recipe_from_dict(ragged), ragged_examples(ragged))
    cache = ClipCache(tmp_path / "cache", Path(ragged["data"]["root"]), settings)
    processor = MirasolProcessor.from_pretrained(finished_run / "processor")
    batches = StepBatches(plan, cache, MirasolFeatureExtractor(**settings), texts=BatchTexts(processor.text_rows))
    model = MirasolForConditionalGeneration.from_pretrained(finished_run / "checkpoint").eval()
    last = plan.recipe.total_steps - 1
    batch, tensors = batches[last]
    fillers = plan.batch(last).fillers
    assert fillers and batch.uncounted_rows
    assert not tensors["video_mask"][fillers].any() and not tensors["audio_mask"][fillers].any()
    assert (tensors["labels"][batch.uncounted_rows] == IGNORED_LABEL).all()
    kept = [row for row in range(4) if row not in fillers]
    width = len(tensors["labels"]) // 4
    rows = [clip * width + row for clip in kept for row in range(width)]
    text = ("labels", "decoder_input_ids", "decoder_attention_mask", "row_weights")
    smaller = {name: value[rows if name in text else kept] for name, value in tensors.items()}
    with torch.no_grad():
        losses, wanted = model(**tensors), model(**smaller)
    for name in ("text_loss", "latent_loss", "video_loss"):
        assert torch.allclose(getattr(losses, name), getattr(wanted, name), rtol=1e-5), name
    assert dataclasses.asdict(batch)["counted"]
