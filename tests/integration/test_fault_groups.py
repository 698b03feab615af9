"""Two real processes of which one freezes or dies: the other says which and where, soon, and status.json keeps it."""

import json
import signal
import time
from pathlib import Path

import pytest

from lost.testing.forked import Forked
from lost.testing.runs import lost_here, num_lines, tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """With its rows, so that no process of a busy machine waits for another one that prepares them."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    keys = [key for key in tiny_run(corpus.parent / "run", corpus)[1:] if not key.startswith("run_dir")]
    assert lost_here("prepare", *keys) == 0
    return corpus


@pytest.mark.parametrize(
    ("victim", "sent"),
    [(1, signal.SIGSTOP), (0, signal.SIGSTOP), (1, signal.SIGKILL)],
    ids=["the second freezes", "the first freezes", "the second dies"],
)
def test_the_other_process_names_step_and_culprit(tmp_path, corpus, victim, sent):
    run_dir, timeout_seconds = tmp_path / "run", 8
    options = (f"runtime.timeout_seconds={timeout_seconds}", "train.max_steps=3000", "evaluation.every_steps=0")
    with Forked(tmp_path / "output", tiny_run(run_dir, corpus, *options), count=2) as forked:
        forked.wait_until(lambda: num_lines(run_dir) > 6)
        started = time.monotonic()
        forked.send(victim, sent)
        survivor = 1 - victim
        # Without a limit of ours it would be half an hour.
        assert forked.exit_code(survivor, 90) == 1
        seconds = time.monotonic() - started
        output = forked.output(survivor)
    if sent == signal.SIGSTOP:
        assert seconds > 0.9 * timeout_seconds
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "failed"
    assert f"process {survivor} lost the others in step {status['step']}: process {victim} is silent" in output
    assert "Traceback" not in output
    assert status["reason"] in output
    assert abs(status["step"] - (num_lines(run_dir) - 1)) <= 1
