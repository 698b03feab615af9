"""A real `lost pretrain` killed with SIGKILL at three places and started again ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lost.checkpoint import read_status, write_status
from lost.testing.forked import carry_out
from lost.testing.runs import lost_here, read_metrics, start, succeed, tiny_run, write_corpus

# Wide enough that a checkpoint takes milliseconds to write and a step to compute.
OVERRIDES = [
    "model.hidden_size=128",
    "model.intermediate_size=344",
    "train.max_steps=12",
    "checkpoint.every_steps=3",
    "evaluation.every_steps=5",
    "logging.group_norms_every_steps=4",
    "runtime.device=cpu",
    "runtime.precision=fp32",
]


def command(run_dir: Path, corpus: Path, *overrides: str) -> list[str]:
    return tiny_run(run_dir, corpus, *OVERRIDES, *overrides)


def wait_until(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 200) -> None:
    """Returns as soon as the condition holds; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"exit status {process.returncode} before the moment came\n{process.communicate()[1]}")
        if time.monotonic() > end:
            process.kill()
            pytest.fail(f"the moment did not come within {seconds:.0f} s")
        time.sleep(0.0005)


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def kill_a_run(run_dir: Path, corpus: Path, moment: Callable[[], bool], is_hit: Callable[[], bool]) -> None:
    """Starts the command and kills it at a moment that passes in milliseconds.

    On a busy machine the kill can come too late; then it is tried again from the same run directory.
    """
    before = run_dir.with_name("before")
    if run_dir.exists():
        shutil.copytree(run_dir, before)
    for _ in range(5):
        process = start(*command(run_dir, corpus))
        wait_until(process, moment)
        kill(process)
        if is_hit():
            shutil.rmtree(before, ignore_errors=True)
            return
        shutil.rmtree(run_dir)
        if before.exists():
            shutil.copytree(before, run_dir)
    pytest.fail("five kills came too late")


def last_step(run_dir: Path) -> int:
    """Step of the newest whole training line; -1 before the first."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.is_file() else []
    return max((line["step"] for line in map(json.loads, whole) if "loss" in line), default=-1)


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def final_bytes(run_dir: Path) -> bytes:
    return (run_dir / "final" / "model.safetensors").read_bytes()


def same_error(capsys, arguments: list[str]) -> str:
    """The message of a command that must end with exit status 2."""
    capsys.readouterr()
    assert lost_here(*arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@dataclass
class Runs:
    """The unbroken run, and one killed three times, before its last start."""

    corpus: Path
    unbroken: Path
    broken: Path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    carry_out(folder / "output", command(folder / "run", corpus))
    return folder / "run"


@pytest.fixture(scope="module")
def broken(tmp_path_factory, corpus) -> Path:
    """A run killed in the middle of step 2, while it writes the checkpoint of step 6, and just after that of step 9."""
    run_dir = tmp_path_factory.mktemp("broken") / "run"
    folder = run_dir / "checkpoints"

    # Before the first checkpoint: the next start begins anew.
    kill_a_run(run_dir, corpus, lambda: last_step(run_dir) >= 1, lambda: last_step(run_dir) == 1)
    assert not folder.exists()

    half, whole = folder / ".tmp_step_00000006", folder / "step_00000006"
    kill_a_run(run_dir, corpus, lambda: half.exists() or whole.exists(), half.exists)
    assert last_step(run_dir) == 6
    assert checkpoint_names(run_dir) == [half.name, "step_00000003"]

    newest = folder / "step_00000009"
    kill_a_run(run_dir, corpus, newest.exists, lambda: last_step(run_dir) == 9)
    assert {whole.name, newest.name} <= set(checkpoint_names(run_dir))
    return run_dir


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert read_metrics(ours) == read_metrics(theirs)
    assert final_bytes(ours) == final_bytes(theirs)
    newest = "checkpoints/step_00000012"
    names = sorted(path.name for path in (ours / newest).glob("*.safetensors"))
    assert [name.split("_")[0] for name in names] == ["model", "optimizer", "rng"]
    for name in names:
        # Not the bytes of the files: their facts about shards come in any order.
        mine, other = load_file(ours / newest / name), load_file(theirs / newest / name)
        assert mine.keys() == other.keys()
        assert all(mine[key].numpy().tobytes() == other[key].numpy().tobytes() for key in other), name


def test_the_unbroken_run_has_every_line(unbroken):
    lines = read_metrics(unbroken)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 5, 10, 12]
    assert checkpoint_names(unbroken) == ["step_00000009", "step_00000012"]


def test_killed_three_times_and_started_again_it_ends_like_the_unbroken_run(broken, unbroken, corpus, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(broken, run_dir)
    succeed(*command(run_dir, corpus))
    assert_same_run(run_dir, unbroken)
    assert checkpoint_names(run_dir) == ["step_00000009", "step_00000012"]
    status = read_status(run_dir)
    assert status is not None
    assert (status["state"], status["step"]) == ("finished", 12)


def test_with_its_newest_checkpoint_damaged_it_goes_on_from_the_one_before(broken, unbroken, corpus, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(broken, run_dir)
    damaged = run_dir / "checkpoints" / "step_00000009" / "optimizer_00000_process_00000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    outputs = carry_out(tmp_path / "output", command(run_dir, corpus))
    assert f"{damaged} is damaged" in outputs[0]
    assert_same_run(run_dir, unbroken)


def test_a_finished_run_prints_its_summary_again(unbroken, corpus, capsys):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert lost_here(*command(unbroken, corpus)) == 0
    assert str(unbroken / "final") in "".join(capsys.readouterr().out.split("\n"))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("has_final", [False, True])
def test_killed_after_its_last_step_it_only_writes_the_end_again(unbroken, corpus, tmp_path, has_final):
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    write_status(run_dir, "running", 12)
    if not has_final:
        (run_dir / "final").rename(run_dir / ".final.partial")
    assert lost_here(*command(run_dir, corpus)) == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    assert_same_run(run_dir, unbroken)
    status = read_status(run_dir)
    assert status is not None
    assert (status["state"], status["step"]) == ("finished", 12)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.seq_len=16", "train.seq_len: checkpoint 32, now 16"),
        ("model.hidden_size=64", "model.hidden_size: checkpoint 128, now 64"),
        ("parameterization=dense", "parameterization.name: checkpoint lost, now dense"),
        ("seed=3", "seed: checkpoint 0, now 3"),
        ("checkpoint.resume=never", "already holds"),
    ],
)
def test_what_must_not_change_is_named(broken, corpus, capsys, override, difference):
    before = (broken / "metrics.jsonl").read_bytes()
    arguments = command(broken, corpus, override)
    if override == "parameterization=dense":
        arguments = [argument for argument in arguments if not argument.startswith("parameterization.")]
    assert difference in same_error(capsys, arguments)
    assert (broken / "metrics.jsonl").read_bytes() == before
    assert "step_00000009" in checkpoint_names(broken)


def test_changed_documents_are_refused(broken, tmp_path, capsys):
    other = write_corpus(tmp_path, seed=1)
    config = (broken / "config.yaml").read_text()
    assert str(other) not in config
    message = same_error(capsys, command(broken, other))
    assert "data.train_files: checkpoint" in message


def test_the_same_files_with_other_contents_are_refused(broken, corpus, capsys):
    kept = corpus.read_bytes()
    corpus.write_bytes(kept + b'{"text": "one more document"}\n')
    try:
        message = same_error(capsys, command(broken, corpus))
    finally:
        corpus.write_bytes(kept)
    assert "was trained on other data" in message


def test_a_second_run_in_the_same_run_dir_stops(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    process = start(*command(run_dir, corpus))
    try:
        wait_until(process, lambda: last_step(run_dir) >= 1)
        # Held still, so that it cannot finish before the second one looks.
        os.kill(process.pid, signal.SIGSTOP)
        before = (run_dir / "metrics.jsonl").read_bytes()
        message = same_error(capsys, command(run_dir, corpus))
        for part in (f"process {process.pid} on", "choose another run_dir"):
            assert part in message
        assert (run_dir / "metrics.jsonl").read_bytes() == before
    finally:
        kill(process)
