"""Progress as its reader meets it."""

import io

from rich.console import Console

from mirasol.console import Progress, format_table, show_progress


def test_progress_off_a_terminal_tells_rate_and_time_left_on_plain_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mirasol.console.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(Console(file=out), "Training", 120, "steps", start=20) as progress:
        for done in range(21, 71):
            now[0] += 1.0
            progress.update(done, "text 0.5")
    lines = out.getvalue().splitlines()
    assert lines[0] == "Training: 35/120 steps, 1 steps/s, 1:25 left, text 0.5"
    assert len(lines) == 4, "one in 15 seconds and one at the end"
    assert lines[-1].endswith("text 0.5"), "the last step's losses are told however short the run is"


def test_rate_and_time_left_go_without_the_first_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mirasol.console.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(Console(file=out), "Training", 20, "steps") as progress:
        for done in range(1, 11):
            now[0] += 100.0 if done <= 3 else 2.0
            progress.update(done)
    first, *_, last = out.getvalue().splitlines()
    assert first == "Training: 1/20 steps, 0.01 steps/s, 31:40 left", "there is nothing else yet"
    assert last == "Training: 10/20 steps, 0.5 steps/s, 0:20 left"


def test_progress_on_a_terminal_shows_a_bar():
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True), "Decoding", 2, "clips") as progress:
        progress.update(2)
    assert "2/2 clips" in out.getvalue()


def test_a_total_that_is_only_known_later_reaches_the_bar():
    out = io.StringIO()
    with show_progress(Console(file=out, force_terminal=True), "Decoding", "clips") as report:
        report(1, 4)
    assert "1/4 clips" in out.getvalue()


def test_a_table_aligns_its_first_column_left_and_numbers_right():
    assert (
        format_table([["", "score"], ["sight", "9.0"], ["all", "10.25"]]) == "       score\nsight    9.0\nall    10.25"
    )
