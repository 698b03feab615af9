"""Runs that lose a process or are told to stop while a checkpoint is being written end as if nothing had happened."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lost.testing.forked import Forked, carry_out
from lost.testing.runs import environment, read_metrics, tiny_run, write_corpus

ROOT = Path(__file__).parents[2]
KEYS = ["train.max_steps=60", "checkpoint.every_steps=4", "evaluation.every_steps=20", "runtime.timeout_seconds=60"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    carry_out(folder / "output", tiny_run(folder / "run", corpus, *KEYS), count=2)
    return folder / "run"


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert read_metrics(ours) == read_metrics(theirs)
    assert (ours / "final/model.safetensors").read_bytes() == (theirs / "final/model.safetensors").read_bytes()


def is_saving(run_dir: Path, after: int) -> bool:
    """Whether a checkpoint is being written, and one of a step up to `after` is there."""
    folder = run_dir / "checkpoints"
    return any(folder.glob(".tmp_step_*")) and (folder / f"step_{after:08d}").exists()


@pytest.mark.parametrize(
    ("sent", "victims"),
    [(signal.SIGTERM, (0, 1)), (signal.SIGINT, (1,)), (signal.SIGUSR1, (0,))],
    ids=["SIGTERM to both", "Ctrl-C to the second", "early warning to the first"],
)
def test_stopped_while_a_checkpoint_is_written_it_goes_on(unbroken, corpus, tmp_path, sent, victims):
    run_dir = tmp_path / "run"
    command = tiny_run(run_dir, corpus, *KEYS)
    with Forked(tmp_path / "output", command, count=2) as forked:
        forked.wait_until(lambda: is_saving(run_dir, 4))
        for index in victims:
            forked.send(index, sent)
        # Both, and both say it: the group stops as one.
        assert forked.exit_codes() == [1, 1]
    assert '"state": "preempted"' in (run_dir / "status.json").read_text()
    assert not any((run_dir / "checkpoints").glob(".tmp_*"))
    assert len(read_metrics(run_dir)) < len(read_metrics(unbroken))
    carry_out(tmp_path / "output", command, count=2)
    assert_same_run(run_dir, unbroken)


def test_torchrun_starts_the_group_again_from_the_last_checkpoint(unbroken, corpus, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "lost", *tiny_run(run_dir, corpus, *KEYS)],
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 200
        while not (run_dir / "checkpoints/step_00000004").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.005)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(max(map(int, workers)), signal.SIGKILL)
        assert process.wait(200) == 0, log.read_text()
    finally:
        process.kill()
    # Its table of facts is printed at each start: one restart was enough.
    assert log.read_text().count("runs on ") == 2, log.read_text()
    assert_same_run(run_dir, unbroken)


@pytest.mark.parametrize(
    "options", [["--processes", "1", "--background", "false"], ["--processes", "2", "--background", "true"]]
)
def test_a_short_soak(tmp_path, capsys, monkeypatch, options):
    """Three random kills; scripts/soak.py takes twenty."""
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts/soak.py")
    assert spec is not None
    assert spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--kills", "3", "--folder", str(tmp_path / "soak"), *options])
    assert soak.main() == 0, capsys.readouterr().out
    # The control: a run with one loss changed is not equal.
    metrics = tmp_path / "soak/killed/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 5', '"loss": 6', 1))
    assert any("metrics.jsonl differs" in line for line in soak.differences(*pair(tmp_path / "soak"), 100))


def pair(folder: Path) -> tuple[Path, Path]:
    return folder / "killed", folder / "unbroken"
