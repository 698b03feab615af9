"""metrics.jsonl: one whole JSON object a line, at once, on process 0 only."""

import json
import math
import multiprocessing
import os
import signal
import time

import pytest

from lost.checkpoint import truncate_metrics
from lost.config.runtime import LoggingConfig
from lost.train.metrics import MetricsLogger

NO_WANDB = LoggingConfig(name="none")


def lines_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_there_at_once_and_exact(tmp_path):
    with MetricsLogger(tmp_path / "run", NO_WANDB) as metrics:
        metrics.log({"step": 1, "loss": 0.1 + 0.2, "note": "é\n", "is_last": False})
        assert lines_of(tmp_path / "run") == [{"step": 1, "loss": 0.1 + 0.2, "note": "é\n", "is_last": False}]
        metrics.log({"step": 2, "loss": 5e-324})
        metrics.sync()
    assert lines_of(tmp_path / "run")[1] == {"step": 2, "loss": 5e-324}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(tmp_path, value):
    with MetricsLogger(tmp_path, NO_WANDB) as metrics:
        metrics.log({"step": 1, "loss": value, "grad_norm": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": 1.0}\n'


def test_other_processes_write_nothing(tmp_path):
    with MetricsLogger(tmp_path / "run", NO_WANDB, is_main=False) as metrics:
        metrics.log({"step": 1})
        metrics.sync()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_appends(tmp_path):
    for first, last in ((1, 5), (4, 7)):
        truncate_metrics(tmp_path / "metrics.jsonl", first - 1)
        with MetricsLogger(tmp_path, NO_WANDB) as metrics:
            for step in range(first, last):
                metrics.log({"step": step, "loss": 1 / step})
    assert lines_of(tmp_path) == [{"step": step, "loss": 1 / step} for step in range(1, 7)]


def test_closing_twice_is_fine(tmp_path):
    metrics = MetricsLogger(tmp_path, NO_WANDB)
    metrics.close()
    metrics.close()
    metrics.log({"step": 1})
    assert lines_of(tmp_path) == []


def log_for_ever(run_dir) -> None:
    metrics = MetricsLogger(run_dir, NO_WANDB)
    step = 0
    while True:
        step += 1
        metrics.log({"step": step, "text": "x" * 300})


def test_a_kill_loses_no_line_but_the_last(tmp_path):
    writer = multiprocessing.get_context("fork").Process(target=log_for_ever, args=(tmp_path,))
    writer.start()
    path, end = tmp_path / "metrics.jsonl", time.monotonic() + 60
    while not (path.is_file() and path.stat().st_size > 20_000):
        assert time.monotonic() < end, "the writer wrote nothing"
        time.sleep(0.001)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    truncate_metrics(tmp_path / "metrics.jsonl", 10**9)
    steps = [line["step"] for line in lines_of(tmp_path)]
    assert len(steps) > 10
    assert steps == list(range(1, len(steps) + 1))
