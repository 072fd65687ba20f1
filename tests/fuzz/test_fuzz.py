"""The fuzzing itself: its cases are reproducible, it goes on where it stopped, and it sees what it is there to see."""

import json

import fuzz
import pytest
from fuzz import KINDS, Finding, Fuzzer, State, load_state, replay
from mutations import mutate

from mirasol.media.isolation import decoders as isolation

SLOW_KINDS = ("config", "safetensors", "tokenizers")


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """The decoders of this test alone."""
    fresh = isolation._Pool()
    monkeypatch.setattr(isolation, "_pool", fresh)
    yield
    fresh.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SLOW_KINDS])
def test_a_case_follows_from_its_seed_and_number(kind, tmp_path):
    one, other = Fuzzer(kind, 3, tmp_path), Fuzzer(kind, 3, tmp_path)
    cases = [one.draw(number) for number in range(40)]
    assert cases == [other.draw(number) for number in range(40)]
    assert cases != [Fuzzer(kind, 4, tmp_path).draw(number) for number in range(40)]
    changed = 0
    for key, name, mutations in cases:
        if mutations[0][0] != "remux":
            content = one.seeds[key][name]
            changed += mutate(content, mutations, one.media) != content
    assert changed > 20


def test_seeds_as_they_are_are_read(tmp_path):
    fuzzer = Fuzzer("annotations", 1, tmp_path)
    for key in fuzzer.seeds:
        [name, *_] = fuzzer._mutable(fuzzer.seeds[key])
        assert "read" in fuzzer.run(key, name, [], 0), key


def test_a_run_goes_on_where_it_stopped(tmp_path):
    fuzz.fuzz("predictions", 1, 8, tmp_path / "a")
    together = fuzz.fuzz("predictions", 1, 16, tmp_path / "a")
    at_once = fuzz.fuzz("predictions", 1, 16, tmp_path / "b")
    assert (together.done, together.outcomes) == (at_once.done, at_once.outcomes)
    assert sum(at_once.outcomes.values()) == 16
    assert load_state(tmp_path / "a" / "state.json").done == 16
    assert not (tmp_path / "a" / "sandbox").exists()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("crash", "FOUND the decoder crashed: SIGSEGV"),
        ("fail", "FOUND the reader failed: IndexError"),
        ("write", "FOUND written: "),
    ],
)
def test_what_goes_wrong_is_found_made_smaller_and_replayed(monkeypatch, tmp_path, fault, found):
    import decoder_faults

    monkeypatch.setattr(fuzz.targets, "exercise_recipe", getattr(decoder_faults, f"{fault}_if_changed"))
    fuzzer = Fuzzer("recipes", 1, tmp_path)
    key = ("recipe", "recipes/tiny.yaml")
    mutations = [("flip", 700, 1), ("fill", 0, 8, 0), ("flip", 900, 1)]
    [outcome] = [outcome for outcome in fuzzer.run(key, "recipe.yaml", mutations, 0) if outcome.startswith("FOUND")]
    assert outcome.startswith(found)
    finding = fuzzer.shrink(Finding("recipes", "/".join(key), "recipe.yaml", mutations, 0, outcome), key)
    assert finding.mutations == [("fill", 0, 8, 0)]
    again = replay(json.loads(json.dumps(vars(finding))), tmp_path)
    assert any(outcome.startswith(found) for outcome in again)


def test_a_state_is_kept_whole(tmp_path):
    state = State(done=3)
    state.outcomes["read"] = 3
    fuzz.save_state(tmp_path / "state.json", state)
    assert load_state(tmp_path / "state.json") == state


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_300_cases_of_each_kind_are_read_or_refused(kind, tmp_path):
    state = fuzz.fuzz(kind, 2, 300, tmp_path)
    findings = (tmp_path / "findings.jsonl").read_text() if state.findings else ""
    assert state.done == 300
    assert not state.findings, findings
