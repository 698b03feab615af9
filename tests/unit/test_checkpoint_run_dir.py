"""One writer at a time, a status for schedulers, and a metrics file without gaps or repeats after a resume."""

import json
import multiprocessing
import os
import threading
import time

import pytest

from lost.checkpoint import RunLock, read_status, truncate_metrics, write_status
from lost.utils.errors import CheckpointError


def hold_the_lock(run_dir, locked) -> None:
    RunLock(run_dir).acquire()
    locked.set()
    time.sleep(600)


def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    holder = context.Process(target=hold_the_lock, args=(tmp_path / "run", locked))
    holder.start()
    try:
        assert locked.wait(120)
        with pytest.raises(CheckpointError) as error:
            RunLock(tmp_path / "run").acquire()
        for part in (str(tmp_path / "run"), f"process {holder.pid} on {os.uname().nodename}", "choose another run_dir"):
            assert part in str(error.value)
    finally:
        holder.kill()
        holder.join()
    # Killed, not closed: the operating system gave the lock back.
    with RunLock(tmp_path / "run"):
        pass


def test_a_released_lock_can_be_taken_again(tmp_path):
    for _ in range(3):
        with RunLock(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
            RunLock(tmp_path).acquire()


def live_on(started) -> None:
    started.set()
    time.sleep(600)


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    lock = RunLock(tmp_path)
    lock.acquire()
    worker = context.Process(target=live_on, args=(started,))
    worker.start()
    try:
        assert started.wait(120)
        with pytest.raises(CheckpointError):
            RunLock(tmp_path).acquire()
        lock.release()
        # The child, a data worker say, is still alive.
        with RunLock(tmp_path):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


def test_an_unusable_run_dir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
        RunLock(tmp_path / "file").acquire()


def test_status_is_written_and_read(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", 3)
    write_status(tmp_path, "preempted", 7, "SIGTERM")
    status = read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["step"], status["reason"]) == ("preempted", 7, "SIGTERM")
    assert json.loads((tmp_path / "status.json").read_text()) == status


def test_a_reader_never_sees_half_a_status(tmp_path):
    write_status(tmp_path, "running", 0)
    is_done = threading.Event()

    def write() -> None:
        for step in range(60):
            write_status(tmp_path, "running", step, "x" * 5000)
        is_done.set()

    writer = threading.Thread(target=write)
    writer.start()
    num_reads = 0
    while not is_done.is_set():
        status = read_status(tmp_path)
        assert status is not None
        assert status["state"] == "running"
        num_reads += 1
    writer.join()
    assert num_reads > 10


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_cut_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [{"step": 0, "eval/loss": 9.0}]
    for step in range(1, 6):
        written.append({"step": step, "loss": 0.1 * step})
        if step % 2 == 0:
            written.append({"step": step, "eval/loss": 1.0 / step})
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    truncate_metrics(path, 4)
    assert lines_of(path) == [line for line in written if line["step"] <= 4]
    assert path.read_text().endswith("\n")
    truncate_metrics(path, 0)
    assert lines_of(path) == written[:1]
    truncate_metrics(path, -1)
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_kept_lines_keep_their_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step":1,  "loss":1e-3}\n{"loss": null, "step": 2}\n'
    path.write_text(text)
    truncate_metrics(path, 2)
    assert path.read_text() == text


@pytest.mark.parametrize("torn", ['{"step": 2, "loss": 0.1', '{"step"', "12", '{"loss": 1.0}', "\x00\x00\x00", "é"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + torn.encode("latin-1"))
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_each_step_and_kind_is_kept_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [
        {"step": 1, "loss": 1.0},
        {"step": 1, "eval/loss": 1.5, "set": "english"},
        {"step": 1, "eval/loss": 1.6, "set": "python"},
        {"step": 2, "loss": 0.9},
        {"step": 1, "loss": 1.25},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    truncate_metrics(path, 2)
    assert lines_of(path) == [{"step": 1, "loss": 1.25}, *written[1:4]]


def test_no_metrics_file_is_fine(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []
