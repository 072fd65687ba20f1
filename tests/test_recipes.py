"""The recipes that come with the project: all can be read, and those of the paper say what the paper says."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.cost.assumptions import Assumptions
from mirasol.cost.plan import StagePlan, plan_run, read_clips_of_stages
from mirasol.errors import UserError
from mirasol.training.build import check_loss_weights
from mirasol.training.weights.initial import change_config, load_initial
from mirasol.training.weights.stages import StageWeights

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = sorted(path.stem for path in (RECIPES / "paper").glob("*.yaml"))
QUESTIONS = ["msrvtt_qa", "activitynet_qa", "activitynet_qa_512", "nextqa", "nextqa_512"]
SOUNDS = ["vggsound", "epic_sounds", "kinetics_sound"]
HEADER = ("# Command:", "# Hardware:", "# Time:", "# Expected score:")


@functools.cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml")


@pytest.fixture(scope="module")
def models():
    """Models of a preset without memory, made once for each size."""
    made: dict[tuple, MirasolForConditionalGeneration] = {}

    def make(recipe: Recipe, preset: str) -> MirasolForConditionalGeneration:
        key = (preset, recipe.model.image_size, recipe.model.num_chunks)
        if key not in made:
            config = change_config(MirasolConfig.preset(preset), recipe.model)
            with torch.device("meta"):
                made[key] = MirasolForConditionalGeneration(config)
        return made[key]

    return make


def is_suite(file: Path) -> bool:
    """Whether a file is a suite of `mirasol ablate`, or what several suites share."""
    return not {"rows", "base", "extends"}.isdisjoint(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "file", sorted(file for file in RECIPES.rglob("*.yaml") if not is_suite(file)), ids=lambda file: file.stem
)
def test_every_recipe_loads_and_says_command_hardware_time_and_score(file):
    load_recipe(file)
    lines = file.read_text().splitlines()
    for wanted in HEADER:
        assert any(line.startswith((wanted, wanted.replace("Expected score", "Score"))) for line in lines), wanted
    relative = file.relative_to(RECIPES.parent).as_posix()
    assert f"--config {relative}" in file.read_text()


def test_all_the_papers_trainings_are_there():
    assert set(PAPER) == {"image_text", "video_text", "audio", *(f"finetune_{name}" for name in QUESTIONS + SOUNDS)}


@pytest.mark.parametrize("name", PAPER)
def test_where_the_paper_is_silent_a_recipe_says_so_and_why(name):
    lines = (RECIPES / f"paper/{name}.yaml").read_text().splitlines()
    for line in lines:
        assert "silent" not in line or re.search(r"silent(: | whether )\w+ \w+", line), line
    # No paper of these trainings gives a limit for gradients, or says in what precision it computed.
    never_said = ["gradient_clip", "precision", *([] if name == "image_text" else ["warmup_steps"])]
    for key in never_said:
        [line] = [line for line in lines if line.split(":")[0].strip() == key]
        assert re.search(r"# (silent|the paper does not say)", line), line


@pytest.mark.parametrize("preset", ["3b", "1b"])
@pytest.mark.parametrize("name", PAPER)
def test_each_stage_trains_what_the_paper_trains_in_models_of_both_sizes(models, name, preset):
    recipe = recipe_of(f"paper/{name}")
    model = models(recipe, preset)
    check_loss_weights(recipe, model.config)
    [(stage, trained)] = StageWeights(recipe, model).to_dict()["vit"]["trained"].items()
    rows = StageWeights(recipe, model).to_dict()
    whole = {part for part, row in rows.items() if row["trained"][stage] == row["parameters"] > 0}
    frozen = {part for part, row in rows.items() if row["trained"][stage] == 0}
    if name == "image_text":
        assert {"text", "vocabulary", "cross_attention", "contrastive"} == whole
        assert {"audio", "combiner", "latent", "reconstruction"} == frozen
        assert trained > 0.99 * rows["vit"]["parameters"]  # all but what stands for a video that is missing
        flat = [tube for tube in model.config.video.tubes if tube.flat]
        width = model.config.vit.width
        [tube] = flat
        assert rows["tubes"]["trained"][stage] == width * (3 * tube.kernel[1] * tube.kernel[2] + 1)
    elif name == "video_text":
        assert frozen == {"text", "vocabulary", "contrastive"}
    elif name == "audio":
        assert whole == {"audio"} == set(rows) - frozen
    else:
        assert frozen == {"contrastive"}
        assert whole == set(rows) - frozen


@pytest.mark.parametrize("name", PAPER)
def test_frames_chunks_and_pixels(models, name):
    recipe = recipe_of(f"paper/{name}")
    config = models(recipe, "3b").config
    fine = name.startswith("finetune")
    assert config.video.image_size == (448 if fine else 224)
    assert config.video.tokens == (1612 if fine else 403)
    chunks = 64 if name.endswith("_512") else 16
    assert config.chunking.num_chunks == chunks <= config.chunking.max_chunks
    assert chunks * config.video.frames_per_chunk == (512 if name.endswith("_512") else 128)


@pytest.mark.parametrize("name", PAPER)
def test_each_training_starts_from_the_one_before(name):
    before = {"image_text": None, "video_text": "runs/paper/image_text", "audio": "runs/paper/video_text"}
    recipe = recipe_of(f"paper/{name}")
    assert recipe.model.init == before.get(name, "runs/paper/audio")
    assert recipe.output == f"runs/paper/{name}"


# Recipes whose steps cost the same as another's.
COSTS_AS = {
    "finetune_activitynet_qa": "finetune_msrvtt_qa",
    "finetune_nextqa": "finetune_msrvtt_qa",
    "finetune_activitynet_qa_512": "finetune_nextqa_512",
    "finetune_epic_sounds": "finetune_vggsound",
    "finetune_kinetics_sound": "finetune_vggsound",
}


def of_a_step(recipe: Recipe) -> tuple:
    """All that a step's cost follows from."""
    [stage] = recipe.stages.values()
    how = (recipe.parallel, recipe.recompute, recipe.accumulation, recipe.precision, recipe.optimizer.name)
    span = "clip" if stage.span == "any" else stage.span
    once = dataclasses.replace(stage, steps=1, epochs=None, span=span, label_smoothing=0.0)
    return once, recipe.model, how


def count_steps(recipe: Recipe) -> int:
    """The steps that `mirasol plan` prints where the data are not there."""
    absent = dataclasses.replace(recipe.data, root=str(RECIPES / "absent"))
    return read_clips_of_stages(dataclasses.replace(recipe, data=absent), [])[0].total_steps


@functools.cache
def step_plan(name: str, preset: str) -> StagePlan:
    """One step of a recipe on the eight GPUs that its header names."""
    model = [f"--model.preset={preset}"] if name == "image_text" else []
    recipe = load_recipe(RECIPES / f"paper/{name}.yaml", [f"--data.root={RECIPES / 'absent'}", *model])
    [stage] = plan_run(recipe, Assumptions(processes=8, peak_tflops=989.0, preset=preset)).stages.values()
    return stage


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_hours_of_a_header_are_the_plans_and_its_gpus_hold_what_it_says(name):
    """Minutes: every kind of step is counted for both sizes."""
    header = (RECIPES / f"paper/{name}.yaml").read_text()
    said = re.search(r"# Time: +about ([\d.]+) (hours|days) for 3b, ([\d.]+) of it for 1b \(arithmetic: 40%", header)
    assert "# Hardware:       8 GPUs of 80 GiB" in header
    recipe, like = recipe_of(f"paper/{name}"), COSTS_AS.get(name, name)
    assert of_a_step(recipe) == of_a_step(recipe_of(f"paper/{like}"))
    large, small = (step_plan(like, preset) for preset in ("3b", "1b"))
    seconds = float(said[1]) * {"hours": 3600, "days": 86_400}[said[2]]
    assert count_steps(recipe) * large.step_seconds == pytest.approx(seconds, rel=0.05)
    assert small.step_seconds / large.step_seconds == pytest.approx(float(said[3]), abs=0.04)
    # Some room for the allocator, for communication and for PyTorch itself.
    assert max(large.memory.peak, small.memory.peak) < 68 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gigabytes"), [("small", 8), ("base", 24)])
def test_recipes_of_the_sizes_between_fit_the_gpu_they_name_and_take_the_hours_they_say(name, gigabytes):
    """Half a minute each: clips of 10 s, and the longest that the preset takes."""
    header = (RECIPES / f"{name}.yaml").read_text()
    said = re.search(
        r"# Time: +about ([\d.]+) hours for clips of 10 s, ([\d.]+) for the longest \(arithmetic: 40%", header
    )
    assert f"# Hardware:       one GPU of {gigabytes} GB" in header
    recipe = load_recipe(RECIPES / f"{name}.yaml", [f"--data.root={RECIPES / 'absent'}"])
    for chunks, hours in ((10, said[1]), (None, said[2])):
        plan = plan_run(recipe, Assumptions(peak_tflops=165.0, chunks=chunks, preset=name))
        assert plan.seconds == pytest.approx(3600 * float(hours), rel=0.05)
    # Some room for the allocator and for PyTorch itself.
    assert max(stage.memory.peak for stage in plan.stages.values()) < 0.8 * gigabytes * 1e9


def test_image_text_is_mammuts():
    recipe = recipe_of("paper/image_text")
    [stage], optimizer = recipe.stages.values(), recipe.optimizer
    assert recipe.model.preset == "3b"
    assert stage.objective == "image_text"
    assert (stage.loss_weights.contrastive, stage.loss_weights.text) == (1.0, 1.0)
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", 1e-3, 0.01)
    assert (optimizer.warmup_steps, optimizer.schedule) == (10_000, "linear")
    assert recipe.tokenizer.vocab_size == 256_000
    small = load_recipe(RECIPES / "paper/image_text.yaml", ["--model.preset=1b", "--output=runs/paper/1b/image_text"])
    assert small.model.preset == "1b"


def test_video_text_is_the_papers():
    recipe = recipe_of("paper/video_text")
    [stage] = recipe.stages.values()
    weights = stage.loss_weights
    assert (weights.text, weights.latent, weights.video) == (1.0, 1.0, 1.0)
    assert (recipe.optimizer.learning_rate, stage.clips_per_step) == (1e-5, 32)


def test_audio_learns_the_text_of_audiosets_class_names():
    recipe = recipe_of("paper/audio")
    assert (recipe.data.dataset, recipe.data.train_split, recipe.data.options.targets) == ("audioset", "train", "all")


def test_both_readings_of_the_audio_stage_are_fields():
    """The page's table says the default and the other reading, and the recipe's comments give the latter's options."""
    page = (RECIPES.parent / "docs" / "training.md").read_text(encoding="utf-8")
    lines = page.split("| open point of `audio` |")[1].split("\n\n")[0].splitlines()[2:]
    table = {cells[2].strip(" `"): cells[3:5] for cells in (line.split("|") for line in lines)}
    said = " ".join(
        (RECIPES / "paper/audio.yaml").read_text().split("The other reading is")[1].split("(learning")[0].split()
    )
    options = [option.strip("# ") for option in said.split("--") if option.strip("# ")]
    for column, recipe in enumerate((recipe_of("paper/audio"), load_recipe(RECIPES / "paper/audio.yaml", options))):
        for path, cells in table.items():
            wanted = cells[0] if cells[column].strip() == "the same" else cells[column]
            found = functools.reduce(lambda part, name: part[name], path.split("."), dataclasses.asdict(recipe))
            assert found == yaml.safe_load(wanted.split("`")[1]), path
    assert set(table) >= {option.split("=")[0] for option in options}
    fine = recipe_of("paper/finetune_vggsound")
    assert (recipe.optimizer.name, recipe.optimizer.schedule) == (fine.optimizer.name, fine.optimizer.schedule)
    assert recipe.optimizer.weight_decay == fine.optimizer.weight_decay
    assert recipe.model.image_size == fine.model.image_size


@pytest.mark.parametrize(
    ("name", "dataset", "epochs", "questions"),
    [
        ("msrvtt_qa", "msrvtt_qa", 10, 158_581),
        ("activitynet_qa", "activitynet_qa", 80, 32_000),
        ("activitynet_qa_512", "activitynet_qa", 80, 32_000),
        ("nextqa", "nextqa_oe", 20, 37_523),
        ("nextqa_512", "nextqa_oe", 20, 37_523),
    ],
)
def test_question_answering_is_fine_tuned_as_in_the_paper(name, dataset, epochs, questions):
    recipe = recipe_of(f"paper/finetune_{name}")
    [stage], optimizer = recipe.stages.values(), recipe.optimizer
    assert recipe.data.dataset == dataset
    assert stage.clips_per_step * stage.questions_per_clip == 32
    assert stage.epochs == epochs and count_steps(recipe) == math.ceil(epochs * questions / 32)
    assert (stage.loss_weights.text, stage.loss_weights.latent, stage.loss_weights.video) == (10.0, 1.0, 1.0)
    assert (stage.dropout, stage.label_smoothing) == (0.1, 0.2)
    assert (optimizer.learning_rate, optimizer.weight_decay) == (5e-6, 0.01)


def test_nextqa_is_fine_tuned_on_multiple_choice_as_its_header_says():
    for name in ("finetune_nextqa", "finetune_nextqa_512"):
        file = RECIPES / f"paper/{name}.yaml"
        assert "--data.dataset nextqa_mc\n" in file.read_text() and "21,333 steps" in file.read_text()
        recipe = load_recipe(file, ["--data.dataset=nextqa_mc"])
        assert count_steps(recipe) == math.ceil(20 * 34_132 / 32) == 21_333


@pytest.mark.parametrize(
    ("name", "clips"), [("vggsound", 183_730), ("epic_sounds", 60_055), ("kinetics_sound", 22_000)]
)
def test_sounds_are_fine_tuned_as_in_the_paper_and_in_its_reference_5(name, clips):
    recipe = recipe_of(f"paper/finetune_{name}")
    [stage], optimizer = recipe.stages.values(), recipe.optimizer
    assert (recipe.data.dataset, stage.clips_per_step, stage.span) == (name, 32, "any")
    assert count_steps(recipe) == math.ceil(20 * clips / 32)
    assert stage.epochs == (None if name == "kinetics_sound" else 20)
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-5, 1e-4)
    assert (optimizer.name, optimizer.betas, optimizer.schedule) == ("adam", (0.9, 0.999), "cosine")
    mask = stage.augment.spec_augment
    assert (mask.frequency_masks, mask.frequency_width, mask.time_masks, mask.time_width) == (1, 48, 4, 48)
    assert (stage.augment.mixup, stage.label_smoothing, stage.dropout) == (0.5, 0.3, 0.1)
    assert stage.loss_weights.text == 10.0


def test_a_checkpoint_is_gone_on_with_at_another_size(tmp_path):
    values = {"seed": 1, "output": "x", "data": {"root": "x"}, "stages": {"a": {"steps": 1}}}
    larger = load_initial(recipe_from_dict({**values, "model": {"init": "tiny", "image_size": 64}}))
    assert larger.model.config.video.image_size == larger.processor.feature_extractor.image_size == 64
    with pytest.raises(UserError, match=r"model\.num_chunks=4: tiny cuts clips into chunks of 0\.5 s"):
        load_initial(recipe_from_dict({**values, "model": {"init": "tiny", "num_chunks": 4}}))
    with pytest.raises(UserError, match=r"model\.image_size=64 needs model\.init"):
        recipe_from_dict({**values, "model": {"image_size": 64}})
    with pytest.raises(UserError, match=r"model\.num_chunks=0 must be positive"):
        recipe_from_dict({**values, "model": {"init": "tiny", "num_chunks": 0}})
    with pytest.raises(UserError, match=r"tokenizer\.init=tiny has no effect with model\.init"):
        recipe_from_dict({**values, "model": {"init": "tiny"}, "tokenizer": {"init": "tiny"}})
    with pytest.raises(UserError, match=r"vocab_size=300 has no effect with tokenizer\.init"):
        recipe_from_dict({**values, "tokenizer": {"init": "tiny", "vocab_size": 300}})
