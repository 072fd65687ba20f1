"""The command line as its user meets it: what it prints, how it ends, and what bad input gets."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from untrained import only_stream

from mirasol.cli.main import COMMANDS, main
from mirasol.cli.train import split_overrides

RECIPE = """
seed: 1
output: {output}
data: {{root: {root}}}
stages:
  questions: {{steps: 2, clips_per_step: 2, questions_per_clip: 2}}
log_every: 1
validation_clips: 1
"""


@pytest.fixture
def recipe(shapes, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(output=tmp_path / "run", root=shapes))
    return file


@pytest.fixture
def clip(shapes):
    return sorted((shapes / "clips" / "test").iterdir())[0]


@pytest.fixture
def refused(capsys):
    """Runs the command line, which has to end with code 2 and one line; returns the line."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert err.startswith("mirasol: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err.strip()

    return run


def run(capsys, *arguments) -> tuple[str, str]:
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr()


# Help


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [["ask"], ["train"], ["evaluate"], ["data"], ["data", "synthesize"], ["data", "check"], ["demo"]]
)
def test_help_of_each_command_explains_it(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: mirasol" in text
    assert len(text) > 300


def test_help_of_train_names_the_recipes_keys(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for key in (
        "--seed",
        "--optimizer.learning_rate",
        "--data.on_bad_clip",
        "--stages.NAME.steps",
        "--stages.NAME.epochs",
    ):
        assert key in text


def test_nothing_at_all_gets_help(capsys):
    assert "COMMAND" in run(capsys).out


def test_help_comes_without_the_heavy_libraries():
    code = (
        "import sys\nfrom mirasol.cli.main import main\n"
        "try:\n main(['ask', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'av', 'rich', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=600)


def test_importing_mirasol_needs_neither_media_nor_command_line_libraries():
    code = (
        "import sys\nfor name in ('av', 'jsonargparse', 'jinja2', 'rich', 'tensorboard', 'gradio'):\n"
        "    sys.modules[name] = None\n"
        "import mirasol\n"
        "from mirasol import MirasolConfig, MirasolForConditionalGeneration, MirasolProcessor\n"
        "MirasolConfig.preset('tiny')\n"
        "from mirasol.cli.main import main\n"
        "try: main(['ask'])\nexcept SystemExit as stop: assert stop.code == 2"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "pip install jsonargparse" in result.stderr


# Ask (answers: test_ask.py)


def test_an_audio_only_file_is_answered_with_a_note(capsys, untrained, clip, tmp_path):
    sound = only_stream("audio", clip, tmp_path / "sound.mp4")
    result, err = run(capsys, "ask", untrained, sound, "which sound is heard first?", "--json")
    assert json.loads(result)["chunks"] > 0
    assert "video" in err


def bad_clips(clip, folder):
    """Bad input by name: (file, further arguments)."""
    files = {"empty.mp4": b"", "text.mp4": b"This is a letter, not a film.\n" * 50}
    files["cut.mp4"] = clip.read_bytes()[: clip.stat().st_size // 2]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    cases = {name: (folder / name, []) for name in files}
    cases["missing.mp4"] = (folder / "missing.mp4", [])
    cases["zero length"] = (clip, ["--start", 2, "--end", 2])
    cases["backwards"] = (clip, ["--start", 3, "--end", 1])
    cases["beyond the end"] = (clip, ["--start", 500])
    return cases


BAD = ["empty.mp4", "text.mp4", "cut.mp4", "missing.mp4", "zero length", "backwards", "beyond the end"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_clip_is_named_with_its_reason(name, refused, untrained, clip, tmp_path):
    file, more = bad_clips(clip, tmp_path)[name]
    message = refused("ask", untrained, file, "what?", *more)
    assert file.name in message
    assert len(message) > len(f"mirasol: {file}: ") + 5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["ask", "CHECKPOINT"], "file"),
        (["ask", "CHECKPOINT", "CLIP", "what?", "--start", "soon"], "soon"),
        (["ask", "CHECKPOINT", "CLIP", "what?", "--loud"], "--loud"),
        (["ask", "CHECKPOINT", "CLIP", "what?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["ask", "CHECKPOINT", "CLIP", "what? " * 5000], "max_text_length"),
        (["ask", "CHECKPOINT", "CLIP", "what?", "--device", "abacus"], "abacus"),
        (["ask", "no/such/checkpoint", "CLIP", "what?"], "no/such/checkpoint"),
        (["aks"], "aks"),
        (["data", "syn"], "syn"),
    ],
)
def test_bad_arguments_are_named(arguments, word, refused, untrained, clip):
    known = {"CHECKPOINT": untrained, "CLIP": clip}
    assert word in refused(*[known.get(argument, argument) for argument in arguments])


def test_a_question_that_is_not_utf8_is_refused(refused, untrained, clip):
    message = refused("ask", untrained, clip, b"caf\xe9?".decode(errors="surrogateescape"))
    assert r"QUESTION 'caf\udce9?': not UTF-8 text (its character 4)" in message


def test_a_prompt_that_is_not_utf8_is_refused(refused, tmp_path):
    message = refused("data", "check", "folder", tmp_path, "--prompt", b"\xff".decode(errors="surrogateescape"))
    assert "--prompt" in message and "not UTF-8 text" in message


def test_a_question_that_is_too_long_is_not_printed_in_full(refused, untrained, clip):
    message = refused("ask", untrained, clip, "is it " + "very " * 20000 + "loud?")
    assert "max_text_length" in message and "'is it very" in message and "loud?' (100011 characters)" in message
    assert len(message) < 300


def test_a_file_whose_name_is_not_utf8_is_answered_as_json(untrained, clip, tmp_path):
    name = b"caf\xe9.mp4".decode(errors="surrogateescape")
    shutil.copy(clip, tmp_path / name)
    command = [sys.executable, "-m", "mirasol.cli", "ask", untrained, tmp_path / name, "what?", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert r"caf\udce9.mp4" in json.loads(ended.stdout)["file"].encode("unicode_escape").decode()


# Evaluate


def test_evaluate_of_a_folder_is_that_of_the_source_folder(capsys, untrained, shapes, tmp_path):
    output = tmp_path / "results"
    out, _ = run(capsys, "evaluate", untrained, shapes, "--output", output)
    assert re.search(r"no +no +no +shifted\n.* video +audio +media +audio\n", out) and "train majority" in out
    names = ("predictions.jsonl", "predictions.candidates.jsonl", "report.html", "results.json")
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    same, _ = run(capsys, "evaluate", untrained, "folder", shapes, "--output", tmp_path / "named")
    assert same == out
    for name in names[:-2]:
        assert (tmp_path / "named" / name).read_bytes() == (output / name).read_bytes()


def test_evaluate_as_json_and_without_controls(capsys, untrained, shapes):
    result = json.loads(run(capsys, "evaluate", untrained, shapes, "--json", "--skip-controls").out)
    assert result["source"] == "folder" and result["settings"]["controls"] == []
    assert {"metrics", "baselines", "headline"} <= result["protocols"]["open generation"].keys()


def test_figures_have_two_formats_and_need_a_folder(refused, untrained, shapes, tmp_path):
    assert "--figures svg: choose pdf or png" in refused("evaluate", untrained, shapes, "--figures", "svg")
    assert "no effect without --output" in refused("evaluate", untrained, shapes, "--figures", "pdf")
    assert "--figures svg" in refused("demo", "--output", tmp_path / "demo", "--figures", "svg")
    assert not (tmp_path / "demo").exists()


def test_evaluate_of_a_data_set_asks_for_its_folder(refused, untrained):
    assert "msrvtt_qa needs ROOT" in refused("evaluate", untrained, "msrvtt_qa")


def test_evaluate_overwrites_nothing(refused, untrained, shapes, tmp_path):
    (tmp_path / "results.json").write_text("precious")
    assert str(tmp_path) in refused("evaluate", untrained, shapes, "--output", tmp_path)
    assert (tmp_path / "results.json").read_text() == "precious"


def test_an_output_that_cannot_be_made_is_found_before_the_answering(refused, untrained, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("mirasol.evaluation.evaluate.evaluate_dataset", None)
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "results"
    assert str(output) in refused("evaluate", untrained, shapes, "--output", output)
    monkeypatch.setattr("mirasol.cli.common.os.access", lambda path, mode: False)
    assert "sealed" in refused("evaluate", untrained, shapes, "--output", tmp_path / "sealed")


def test_evaluate_names_the_splits_there_are(refused, untrained, shapes):
    message = refused("evaluate", untrained, shapes, "--split", "tset")
    assert "'tset'" in message
    assert "test" in message


def test_evaluate_needs_a_data_folder(refused, untrained, tmp_path):
    assert "nowhere" in refused("evaluate", untrained, tmp_path / "nowhere")


# Data


def test_synthesize_renders_and_refuses_to_do_so_twice(capsys, refused, tmp_path):
    folder = tmp_path / "new"
    arguments = ["data", "synthesize", folder, "--train", 0, "--validation", 0, "--test", 1, "--workers", 1]
    run(capsys, *arguments)
    assert len(list(folder.glob("clips/test/*.mp4"))) == 1
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert str(folder) in refused(*arguments)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


# Train


def test_train_makes_a_checkpoint_that_answers(capsys, recipe, clip, tmp_path, refused):
    out, _ = run(capsys, "train", "--config", recipe)
    assert out.strip() == str(tmp_path / "run" / "checkpoint")
    assert run(capsys, "ask", tmp_path / "run", clip, "what?", "--max-new-tokens", 2).out.endswith("\n")
    assert "--resume" in refused("train", "--config", recipe), "an output that holds a run is not written to again"
    assert run(capsys, "train", "--config", recipe, "--resume").out.strip() == out.strip()


def test_keys_of_the_recipe_are_options(capsys, recipe):
    arguments = ["train", "--config", recipe, "--print-recipe", "--optimizer.learning_rate", "1e-5", "--seed=9"]
    text = run(capsys, *arguments, "--stages.questions.steps", "7").out
    assert "learning_rate: 1.0e-05" in text
    assert "seed: 9" in text
    assert "steps: 7" in text


def test_later_recipes_lie_over_earlier_ones(capsys, recipe, tmp_path):
    (tmp_path / "more.yaml").write_text("seed: 77\n")
    text = run(capsys, "train", "--config", recipe, "--config", tmp_path / "more.yaml", "--print-recipe").out
    assert "seed: 77" in text
    assert "learning_rate" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer.learning_rte", "1e-5"], ["learning_rte", "optimizer.learning_rate"]),
        (["--optimiser.name", "adamw"], ["optimiser", "optimizer"]),
        (["--optimizer.learning_rate", "fast"], ["fast"]),
        (["--seed"], ["--seed"]),
        (["--data.root", "/no/such/data"], ["/no/such/data"]),
    ],
)
def test_a_wrong_key_or_value_is_named(arguments, words, refused, recipe, tmp_path):
    message = refused("train", "--config", recipe, *arguments)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_train_without_a_recipe_says_how(refused):
    assert "--config" in refused("train")


def test_only_train_has_recipe_options():
    assert split_overrides(["ask", "--a.b", "3"]) == (["ask", "--a.b", "3"], [])
    own, overrides = split_overrides(["train", "--config", "a", "--x.y", "3", "--resume", "--z=4", "--config=b"])
    assert own == ["train", "--config", "a", "--resume", "--config=b"]
    assert overrides == ["x.y=3", "z=4"]


# How it ends


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("mirasol.cli.ask.run", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["ask", "a", "b", "c"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "mirasol: interrupted\n"


def test_a_folder_that_may_not_be_written_is_named(monkeypatch, refused):
    def denied(options):
        raise PermissionError(13, "Permission denied", "/sealed/metrics.json")

    monkeypatch.setattr("mirasol.cli.ask.run", denied)
    assert "/sealed/metrics.json" in refused("ask", "a", "b", "c")


def test_a_warning_is_one_line_without_its_place_in_the_code(untrained, clip, tmp_path):
    """Here of an unknown key in the config, and of letters that no font has."""
    checkpoint = shutil.copytree(untrained, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "my_note": 1}))
    command = [sys.executable, "-m", "mirasol.cli", "explain", checkpoint, clip, "\u0b95?", "--end", "1"]
    command += ["--figures", "png", "--output", tmp_path / "page.html"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0
    warned = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert [line.split(":")[0] for line in warned] == ["warning", "warning"]
    assert "'my_note'" in warned[0] and "'\u0b95'" in warned[1]
    assert ".py" not in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(options):
        raise OSError("no errno, no file: this is ours")

    monkeypatch.setattr("mirasol.cli.ask.run", broken)
    with pytest.raises(OSError, match="ours"):
        main(["ask", "a", "b", "c"])


def test_the_module_is_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "mirasol.cli", "compare", "nowhere", "elsewhere"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_plan_tells_what_a_recipe_costs_before_it_runs(tmp_path, monkeypatch, capsys):
    from mirasol.cost import plan as planning

    monkeypatch.setattr(planning, "count_step_cost", lambda *given, **named: planning.StepCost(1, 2, 3, 4, 5))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"seed: 0\noutput: {tmp_path / 'x'}\ndata: {{root: absent}}\nstages: {{a: {{steps: 2}}}}\n")
    options = ["--peak-tflops", "0.1", "--chunks", "2", "--text-length", "8", "--device-memory", "0.001"]
    shown, _ = run(capsys, "plan", "--config", file, "--stages.a.steps", "3", *options, "--json")
    plan = json.loads(shown)
    stage = plan["stages"]["a"]
    assert stage["steps"] == 3 and stage["shape"]["chunks"] == 2 and stage["fits"] is False
    assert plan["parameters"] == sum(row["parameters"] for row in plan["components"].values())
    shown, _ = run(capsys, "plan", "--config", file, *options)
    assert f"{plan['parameters']:,}" in shown and "absent: no such data folder" in shown and "NO" in shown
    assert "note: a stage that does not fit takes less memory with more microbatches (accumulation)" in shown
    assert not (tmp_path / "x").exists()


def test_plan_refuses_what_it_cannot_count(tmp_path, refused):
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 0\noutput: x\ndata: {root: absent}\nstages: {a: {steps: 2, clips_per_step: 3}}\n")
    assert "--config recipes/demo.yaml" in refused("plan")
    assert "--mfu 2.0: must be above 0 and at most 1" in refused("plan", "--config", file, "--mfu", "2")
    assert "--chunks 0: must be at least 1" in refused("plan", "--config", file, "--chunks", "0")
    shared = ("plan", "--config", file, "--parallel.kind", "ddp", "--processes", "2")
    assert "does not divide among 2 processes" in refused(*shared)
