"""What a worker does when its torchrun is killed, and with the single thread that torchrun leaves it."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path

from lost.checkpoint import RunLock
from lost.testing.runs import (
    children_of,
    environment,
    num_lines,
    read_metrics,
    tiny_run,
    wait_until,
    write_corpus,
)
from lost.utils.errors import CheckpointError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
# A shell that stays is the parent, as a terminal or a job script is.
SHELL = ["sh", "-c", '"$@"; true', "sh", sys.executable]
# More steps than the test waits for.
KEYS = ["train.max_steps=100000", "schedule=constant", "evaluation.every_steps=0"]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_free(run_dir: Path) -> bool:
    """Whether a new run could take the lock."""
    try:
        with RunLock(run_dir):
            return True
    except CheckpointError:
        return False


def test_workers_end_with_their_torchrun_and_a_run_without_one_does_not(tmp_path):
    corpus = write_corpus(tmp_path)
    log = tmp_path / "log.txt"
    workers: dict[str, list[int]] = {}
    started = {}
    try:
        with log.open("w") as file:
            for name, launcher in (("torchrun", TORCHRUN), ("shell", SHELL)):
                started[name] = subprocess.Popen(
                    [*launcher, "-m", "lost", *tiny_run(tmp_path / name, corpus, *KEYS)],
                    env=environment(),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
        for name in started:
            wait_until(lambda name=name: num_lines(tmp_path / name) > 3, 120, log.read_text)
            workers[name] = children_of(started[name].pid)
        assert [len(found) for found in workers.values()] == [1, 1]
        assert not is_free(tmp_path / "torchrun")
        for process in started.values():
            process.kill()
            process.wait()
        wait_until(lambda: is_free(tmp_path / "torchrun"), 20, log.read_text)
        assert "is gone, so its processes end too" in log.read_text()
        # The lock is free a moment before the process has ended.
        wait_until(lambda: not any(map(is_running, workers["torchrun"])), 20, log.read_text)
        # Two polls later the one whose parent was a shell still trains.
        lines = num_lines(tmp_path / "shell")
        wait_until(lambda: num_lines(tmp_path / "shell") > lines, 10, log.read_text)
        assert all(map(is_running, workers["shell"]))
        assert read_metrics(tmp_path / "shell")[-1]["step"] > 3
    finally:
        for name, process in started.items():
            if process.poll() is None:
                workers[name] = children_of(process.pid)
                process.kill()
        for index in filter(is_running, chain.from_iterable(workers.values())):
            with suppress(ProcessLookupError):
                os.kill(index, signal.SIGKILL)
