"""Signals to real runs: the step is finished, the state saved, and the same command goes on bit for bit."""

import json
import os
import signal

import pytest

from lost.testing.forked import Forked
from lost.testing.runs import lost_here, num_lines, read_metrics, tiny_run, write_corpus

KEYS = ["train.max_steps=80", "evaluation.every_steps=0", "checkpoint.every_steps=0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert lost_here(*tiny_run(run_dir, corpus, *KEYS)) == 0
    return run_dir


@pytest.mark.parametrize(
    ("name", "keys"),
    [("SIGINT", []), ("SIGTERM", ["data.num_workers=1"]), ("SIGUSR1", [])],
    ids=["Ctrl-C", "SIGTERM to the whole group, with a reader", "early warning of SLURM"],
)
def test_a_signal_saves_and_the_same_command_goes_on(unbroken, corpus, tmp_path, name, keys):
    run_dir = tmp_path / "run"
    command = tiny_run(run_dir, corpus, *KEYS, *keys)
    with Forked(tmp_path / "output", command) as forked:
        forked.wait_until(lambda: num_lines(run_dir) > 5)
        # As launchers do: to the process and whatever it started.
        os.killpg(forked.processes[0].pid, signal.Signals[name])
        assert forked.exit_code() == 1, forked.output()
        assert "stopping: finishing this step" in forked.output()
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", f"received {name}")
    assert 5 <= status["step"] < 80
    assert lost_here(*command) == 0
    assert read_metrics(run_dir) == read_metrics(unbroken)
