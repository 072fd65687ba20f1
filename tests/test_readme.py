"""What the README says can be done is done here."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from mirasol.cli.main import COMMANDS, main

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
[EXAMPLE] = [text for language, text in BLOCKS if language == "python"]


def test_the_example_is_about_ten_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 10


def test_the_example_runs(shapes, tmp_path, monkeypatch):
    clip = sorted((shapes / "clips" / "test").iterdir())[0]
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(EXAMPLE, "README.md", "exec"), {})
    assert said.getvalue().strip()


def test_the_first_screen_answers_as_it_says(tmp_path, monkeypatch, capsys):
    """Its two commands in their order; probabilities are not compared, shipped weights may be trained anew."""
    (_, commands), (_, shown) = BLOCKS[:2]
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands.splitlines() if line.startswith("mirasol ")]
    assert len(lines) == 2
    for line in lines:
        main(shlex.split(line, comments=True)[1:])
    remark, *answers = shown.splitlines()
    found = capsys.readouterr()
    assert remark in found.err
    assert [line.split("  ")[0] for line in found.out.splitlines()[-2:]] == [line.split("  ")[0] for line in answers]


def test_every_command_line_is_one_that_exists():
    lines = [line for _, block in BLOCKS for line in block.splitlines()]
    lines += re.findall(r"`(mirasol [^`]*)`", README)
    commands = [line.split("#")[0].split() for line in lines if line.startswith("mirasol ")]
    assert {words[1] for words in commands} >= {"ask", "train", "evaluate", "data"}
    for words in commands:
        assert words[1] in COMMANDS
        helped = io.StringIO()
        with contextlib.redirect_stdout(helped), pytest.raises(SystemExit):
            main([words[1], *(["synthesize"] if words[1] == "data" else []), "--help"])
        for option in (word for word in words if word.startswith("--")):
            assert option in helped.getvalue(), f"{option} of {' '.join(words)}"


def test_its_two_commands_are_targets_and_its_links_lead_somewhere():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (REPOSITORY / link).exists(), link
