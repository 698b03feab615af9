"""Real processes killed while they save, and disks that fill up: what counts afterwards is whole and right."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lost.checkpoint import CheckpointManager
from lost.testing.disk import small_disk_at
from lost.testing.runs import wait_until
from lost.utils.errors import CheckpointError

NUM_KILLS = 20
# 4 MB a file: long enough to be hit in the middle, short enough for a fast test.
NUM_VALUES = 1_000_000


def contents(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Every value of every file is the step: a mixture of two saves cannot pass."""
    return {
        name: {"values": torch.full((NUM_VALUES,), float(step)), "tail": torch.tensor([step])}
        for name in ("model", "optimizer")
    }


def assert_holds(manager: CheckpointManager, path: Path, step: int) -> None:
    tensors, facts = manager.load(path)
    assert facts == {"step": step}
    assert set(tensors) == {"model", "optimizer"}
    for group in tensors.values():
        assert group["values"].shape == (NUM_VALUES,)
        assert bool((group["values"] == step).all())
        assert group["tail"].item() == step


def save_for_ever(folder: Path, first_step: int, started: Any) -> None:
    """Like a training run that does nothing but save."""
    torch.set_num_threads(1)
    manager = CheckpointManager(folder, keep=2)
    manager.clean()
    step = first_step
    started.set()
    while True:
        manager.save(step, contents(step), {"step": step})
        step += 1


def fork(target: Callable[..., None], *arguments: Any) -> Any:
    """A started process; forked, because importing torch again takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def newest_of(folder: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in folder.glob("step_*")), default=0)


def test_a_checkpoint_survives_a_kill_at_any_moment(tmp_path):
    """After each of many kills: the newest checkpoint loads, is no older than before, and holds one step only."""
    folder = tmp_path / "checkpoints"
    moments = random.Random(5)
    newest_step, num_in_the_middle = 0, 0
    for _ in range(NUM_KILLS):
        started = multiprocessing.get_context("fork").Event()
        process = fork(save_for_ever, folder, newest_step + 1, started)
        # Not counted: how long a busy machine takes to fork.
        assert started.wait(120)
        # Some moments after so many more saves, however long those take here.
        wanted = newest_step + moments.randint(0, 2)
        wait_until(lambda: newest_of(folder) >= wanted, 120, lambda: "no checkpoint came within 120 s")  # noqa: B023
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_in_the_middle += any(folder.glob(".tmp_*"))

        manager = CheckpointManager(folder, keep=2)
        seen_before_clean = manager.latest()
        manager.clean()
        latest = manager.latest()
        assert not any(folder.glob(".tmp_*"))
        if latest is None:
            assert newest_step == 0
            continue
        step = json.loads((latest / "state.json").read_text())["step"]
        assert step >= newest_step
        assert seen_before_clean is None or seen_before_clean <= latest
        assert_holds(manager, latest, step)
        newest_step = step
    assert newest_step > 0
    assert num_in_the_middle >= NUM_KILLS // 4
    # Deletions that were interrupted are made good by the next save.
    CheckpointManager(folder, keep=2).save(newest_step + 1, contents(newest_step + 1), {"step": newest_step + 1})
    assert len(list(folder.iterdir())) == 2


def save_under_a_size_limit(folder: Path, limit_bytes: int, message: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        CheckpointManager(folder).save(2, {"model": {"values": torch.zeros(100_000)}}, {"step": 2})
    except CheckpointError as error:
        message.write_text(str(error))


def test_a_file_that_cannot_grow_leaves_the_older_checkpoint(tmp_path):
    folder, message = tmp_path / "checkpoints", tmp_path / "message"
    old = CheckpointManager(folder).save(1, contents(1), {"step": 1})

    def save(limit_bytes: int) -> None:
        process = fork(save_under_a_size_limit, folder, limit_bytes, message)
        process.join()
        assert process.exitcode == 0

    save(100_000)
    assert "could not be written" in message.read_text()
    assert [path.name for path in folder.iterdir()] == [old.name]
    assert_holds(CheckpointManager(folder), old, 1)
    # The control: the same process under a limit that is large enough.
    message.unlink()
    save(10_000_000)
    assert not message.exists()
    assert CheckpointManager(folder).latest() == folder / "step_00000002"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for one checkpoint of `contents`, not for two."""
    with small_disk_at(tmp_path / "disk", "12m") as folder:
        yield folder


def test_a_full_disk_leaves_the_older_checkpoint(small_disk):
    manager = CheckpointManager(small_disk / "checkpoints")
    old = manager.save(1, contents(1), {"step": 1})
    with pytest.raises(CheckpointError) as error:
        manager.save(2, contents(2), {"step": 2})
    for part in ("could not be written", "Free space there", "make room, or choose another run_dir"):
        assert part in str(error.value)
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert_holds(CheckpointManager(old.parent), old, 1)
    # With room again the same manager goes on.
    manager.save(2, {"model": {"values": torch.ones(3)}}, {"step": 2})
    assert manager.latest() == old.parent / "step_00000002"


def test_a_read_only_disk_leaves_the_older_checkpoint(small_disk):
    manager = CheckpointManager(small_disk / "checkpoints")
    old = manager.save(1, contents(1), {"step": 1})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"step_00000002 could not be written.*Read-only"):
        manager.save(2, contents(2), {"step": 2})
    assert_holds(CheckpointManager(old.parent), old, 1)
