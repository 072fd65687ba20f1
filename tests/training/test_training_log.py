"""metrics.jsonl."""

import json

import pytest

from mirasol.errors import UserError
from mirasol.training.logging import RunLog, read_metrics


def test_resuming_takes_back_what_lies_beyond_the_checkpoint_and_a_line_cut_short(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 6):
        log.log_step(step, {"loss": float(step), "stage": "a"})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    log = RunLog(tmp_path, step=3)
    log.log_step(4, {"loss": 0.5, "stage": "a"})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 0.5)]


def test_validation_is_logged_by_type(tmp_path):
    log = RunLog(tmp_path)
    part = {"accuracy": 0.5, "by_type": {"sight": {"accuracy": 0.5, "text_loss": 1.0, "rows": 2}}}
    log.log_validation(7, {"clip": part})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "validation", "step": 7, "clip": part}]


def test_a_line_damaged_amid_others_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: is damaged .*: remove the line"):
        read_metrics(file)
