"""The benchmarks parse their arguments before anything heavy, run on a bare machine and write what they promise."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "benchmarks"
NAMES = [path.stem for path in sorted(FOLDER.glob("[a-z]*.py"))]

# Runs the benchmarks named in argv, [name, arguments] each, one after the other in this process, without the packages
# in the first argument. What a benchmark would run in child processes runs here too, so that torch is imported once.
RUN_WITHOUT = """
import contextlib, importlib, importlib.abc, io, json, sys, traceback

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is not installed here")

def run_json(script, arguments):
    module = importlib.import_module(script.rsplit("/", 1)[1].removesuffix(".py"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(arguments)
    return json.loads(printed.getvalue().splitlines()[-1])

blocked, folder, runs = json.loads(sys.argv[1])
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, folder)
report = {}
for key, (name, arguments) in runs.items():
    out, error, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            module = importlib.import_module(name)
            module.run_json = run_json
            module.main(arguments)
    except SystemExit as exit:
        code = exit.code
    except Exception:
        code = traceback.format_exc()
    report[key] = {"code": code, "out": out.getvalue(), "error": error.getvalue()}
print(json.dumps(report))
"""


def run_without(blocked: list[str], runs: dict[str, tuple[str, list[str]]]) -> dict[str, dict]:
    """Exit code, stdout and stderr of each run, all in one process that cannot import the blocked packages."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-c", RUN_WITHOUT, json.dumps([blocked, str(FOLDER), runs])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_arguments_are_parsed_before_anything_heavy_is_imported():
    runs = {f"{name} {option}": (name, [option]) for name in NAMES for option in ("--help", "--no-such-option")}
    runs |= {"a choice": ("train_step", ["--precision", "int3"]), "an item": ("peer", ["--items", "huge"])}
    done = run_without(["torch", "transformers", "mirasol", "av", "numpy"], runs)
    assert len(NAMES) == 11
    for name in NAMES:
        assert done[f"{name} --help"]["code"] == 0 and "--quick" in done[f"{name} --help"]["out"], done
        assert done[f"{name} --no-such-option"]["code"] == 2, done
        assert "unrecognized arguments: --no-such-option" in done[f"{name} --no-such-option"]["error"]
    assert done["a choice"]["code"] == 2 and "int3" in done["a choice"]["error"]
    assert done["an item"]["code"] == 2 and "huge" in done["an item"]["error"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[dict[str, dict], Path]:
    """Tiny runs of all benchmarks that need torch and transformers only, as on a bare GPU machine."""
    folder = tmp_path_factory.mktemp("bare")

    def write_to(name: str) -> list[str]:
        return ["--quick", "--out", str(folder / f"{name}.json")]

    small = ["--device", "cpu", "--preset", "tiny", "--quick"]
    runs = {
        "step": ("train_step", [*small, "--precision", "bfloat16", *write_to("step")]),
        "generate": ("generate", [*small, "--batch", "2", "--chunks", "2", *write_to("generate")]),
        "stream": ("stream", ["--combiner", "ttm", *write_to("stream")]),
        "no peer": ("peer", ["--quick", "--items", "tiny-T2", "--peer", str(folder)]),
        "peer": ("peer", ["--items", "tiny-T2", *write_to("peer")]),
    }
    return run_without(["av", "jsonargparse", "gradio"], runs), folder


def read_results(bare, name: str) -> tuple[dict, str]:
    done, folder = bare
    assert done[name]["code"] == 0, done[name]
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()


def test_a_training_step_where_only_torch_and_transformers_are(bare):
    data, text = read_results(bare, "step")
    assert {"cpu", "commit", "torch", "transformers"} <= set(data["surroundings"])
    (row,) = data["rows"]
    assert row["clips_per_second"] > 0 and row["mfu"] > 0 and row["peak_tflops"] > 0
    assert set(row["forward_seconds"]) == {"tubes", "vit", "audio", "combiner", "latent", "reconstruction", "text"}
    assert all(seconds > 0 for seconds in row["forward_seconds"].values())
    assert "tiny" in text


def test_answering_where_only_torch_and_transformers_are(bare):
    data, text = read_results(bare, "generate")
    (row,) = data["rows"]
    assert row["batch"] == 2 and row["ms_of_a_4_token_answer"] > 0 and row["prefill_ms"] > 0
    assert row["bound_tokens_per_second"] > 0 and row["prefill_floor_ms"] > 0
    assert "tiny" in text


def test_streaming_where_only_torch_and_transformers_are(bare):
    data, text = read_results(bare, "stream")
    (result,) = data["results"].values()
    assert result["against encoding all"]["ratio"] > 0 and result["against encoding all"]["ratio of FLOPs"] > 1
    assert result["late against early"]["growth"]["state, MiB"] == 0
    assert data["surroundings"]["commit"] and data["config"] and data["goals"]
    assert "tiny, ttm" in text


def test_a_missing_peer_is_one_line_that_says_how_to_install_it(bare):
    done, _ = bare
    if done["no peer"]["code"] == 0:
        pytest.skip("the peer is installed here: what happens without it was not tested")
    assert "\n" not in done["no peer"]["code"] and "pip install" in done["no peer"]["code"]


def test_without_a_peer_the_benchmark_is_skipped_so_that_the_others_run(bare):
    done, _ = bare
    assert done["peer"]["code"] == 0, done["peer"]
    assert done["peer"]["out"].startswith(("skipped: the peer is missing", "tiny-T2"))


@pytest.fixture
def benchmark_of(monkeypatch):
    """Imports a benchmark by its name, as its own command does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_choices_are_those_of_the_model(benchmark_of):
    from mirasol.model.kernels import ATTENTION, RECOMPUTE

    train_step = benchmark_of("train_step")
    assert train_step.RECOMPUTE == RECOMPUTE and train_step.ATTENTION == ATTENTION


def test_measurements_in_a_child_come_back_or_end_the_benchmark(benchmark_of, tmp_path):
    measure = benchmark_of("_measure")
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('progress')\nprint(sys.argv[1])\nsys.exit(int(sys.argv[2]))\n")
    assert measure.run_json(str(script), ['{"a": [1]}', "0"]) == {"a": [1]}
    with pytest.raises(SystemExit, match="ended with status 3"):
        measure.run_json(str(script), ["{}", "3"])
    assert measure.run_in_child(lambda: {"pid": os.getpid()})["pid"] != os.getpid()


def test_decoding_keeps_the_same_frames_in_both_ways(benchmark_of, tmp_path):
    pytest.importorskip("av")
    decode = benchmark_of("decode")
    [(name, settings), *_] = decode.FILES.items()
    decode.FILES = {name: (*settings[:3], 1, settings[4])}
    out = tmp_path / "decode.json"
    with contextlib.redirect_stdout(io.StringIO()):
        decode.main(["--quick", "--out", str(out)])
    data = json.loads(out.read_text())
    [row] = data["results"].values()
    assert row["ratio"] > 0 and row["frames_kept"] > 0
    assert {"av", "libavcodec", "commit", "cpu"} <= set(data["surroundings"])


def test_a_simulated_index_repeats_the_clips(benchmark_of):
    pytest.importorskip("av")
    from mirasol.data.example import Example

    reading = benchmark_of("_reading_measure")
    examples = [Example(name, name, None, None, "what?", "this") for name in ("a.mp4", "b.mp4")]
    table = reading.repeat_examples(examples, 5)
    assert [table[place].media for place in range(4)] == ["a.mp4", "b.mp4", "a.mp4", "b.mp4"]
    assert len(table) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key"),
    [("reading", "throughput"), ("trainer", "figures"), ("feature_cache", "rows"), ("realtime", "rows")],
)
def test_the_data_path_is_measured(benchmark_of, name, key, tmp_path):
    out = tmp_path / f"{name}.json"
    with contextlib.redirect_stdout(io.StringIO()):
        benchmark_of(name).main(["--quick", "--out", str(out)])
    assert json.loads(out.read_text())[key]
    assert out.with_suffix(".md").read_text().startswith("# ")


@pytest.mark.slow
def test_the_work_of_both_is_equal_within_two_percent(tmp_path):
    folder = os.environ.get("MIRASOL_PEER")
    if not folder:
        pytest.skip("MIRASOL_PEER names no folder with the peer: see benchmarks/peer.py --help")
    out = tmp_path / "peer.json"
    command = [sys.executable, str(FOLDER / "peer.py"), "--peer", folder, "--quick", "--items", "tiny-T2", "gen-T8"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert abs(results["tiny-T2"]["gflop"]["ratio"] - 1) <= 0.02
    assert results["tiny-T2"]["bfloat16"]["saved_bytes"] > 0
    assert results["gen-T8"]["float32"]["ours"]["ms_per_token"]["median"] > 0
