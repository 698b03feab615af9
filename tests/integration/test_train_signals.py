"""Signals to real runs: the step is finished, the state saved, and the same command goes on bit for bit."""

import json
import os
import signal
import time

import pytest

from lost.testing.runs import lost_here, read_metrics, start, tiny_run, write_corpus

KEYS = ["train.max_steps=300", "evaluation.every_steps=0", "checkpoint.every_steps=0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert lost_here(*tiny_run(run_dir, corpus, *KEYS)) == 0
    return run_dir


def wait_for_steps(run_dir, process, num_lines):
    deadline = time.monotonic() + 240
    path = run_dir / "metrics.jsonl"
    while not (path.is_file() and path.read_bytes().count(b"\n") > num_lines):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run never trained a step"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("SIGINT", []), ("SIGTERM", ["data.num_workers=1"]), ("SIGUSR1", [])],
    ids=["Ctrl-C", "SIGTERM to the whole group, with a reader", "early warning of SLURM"],
)
def test_a_signal_saves_and_the_same_command_goes_on(unbroken, corpus, tmp_path, name, keys):
    run_dir = tmp_path / "run"
    command = tiny_run(run_dir, corpus, *KEYS, *keys)
    process = start(*command)
    wait_for_steps(run_dir, process, 5)
    # As launchers do: to the process and whatever it started.
    os.killpg(process.pid, signal.Signals[name])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "stopping: finishing this step" in errors
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", f"received {name}")
    assert 5 <= status["step"] < 300
    assert lost_here(*command) == 0
    assert read_metrics(run_dir) == read_metrics(unbroken)
