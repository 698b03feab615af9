"""Damaged, hostile and unwritable checkpoints of two processes, met by real runs of two processes."""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lost.checkpoint import CheckpointManager
from lost.testing.disk import small_disk_at
from lost.testing.forked import Forked, carry_out
from lost.testing.runs import losses, lost_here, read_metrics, tiny_run, write_corpus
from lost.utils.errors import CheckpointError

FSDP2 = "runtime=fsdp2"
KEYS = ["evaluation.every_steps=0", "checkpoint.keep=3", "runtime.timeout_seconds=60"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus) -> Path:
    """12 steps of two processes with fsdp2, checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    carry_out(folder / "output", tiny_run(folder / "run", corpus, FSDP2, *KEYS), count=2)
    names = sorted(path.name for path in (folder / "run/checkpoints/step_00000012").glob("optimizer*"))
    assert names == [f"optimizer_00000_process_0000{index}.safetensors" for index in (0, 1)]
    return folder / "run"


@pytest.fixture
def unfinished(finished, tmp_path) -> Path:
    """The same run as if it had been killed in its last step."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "final")
    (run_dir / "status.json").unlink()
    return run_dir


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {"truncated": truncate, "bit": flip_a_bit, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_two_processes_go_on_from_the_checkpoint_before_a_damaged_one(unfinished, finished, corpus, tmp_path, damage):
    newest = unfinished / "checkpoints/step_00000012"
    DAMAGES[damage](newest / "optimizer_00000_process_00001.safetensors")
    outputs = carry_out(tmp_path / "output", tiny_run(unfinished, corpus, FSDP2, *KEYS), count=2)
    assert "optimizer_00000_process_00001.safetensors is" in outputs[0]
    assert "Skipping this checkpoint, trying the one before it" in outputs[0]
    assert read_metrics(unfinished) == read_metrics(finished)
    ours, theirs = ((run / "final/model.safetensors").read_bytes() for run in (unfinished, finished))
    assert ours == theirs


def test_a_damaged_checkpoint_asked_for_by_path_stops_both_processes(unfinished, corpus, tmp_path):
    newest = unfinished / "checkpoints/step_00000012"
    flip_a_bit(newest / "model_00000_process_00001.safetensors")
    before = (unfinished / "metrics.jsonl").read_bytes()
    with Forked(
        tmp_path / "output", tiny_run(unfinished, corpus, FSDP2, *KEYS, f"checkpoint.resume={newest}"), count=2
    ) as forked:
        assert forked.exit_codes() == [2, 2]
        output = forked.output()
    assert "model_00000_process_00001.safetensors is damaged" in output
    assert "Traceback" not in output + forked.output(1)
    assert (unfinished / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.2 MB: room for one checkpoint of the run and part of another."""
    with small_disk_at(tmp_path / "disk", "1200k") as folder:
        yield folder


@pytest.mark.parametrize(("background", "count"), [("true", 2), ("true", 1), ("false", 2)])
def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(small_disk, corpus, tmp_path, background, count):
    run_dir = small_disk / "run"
    keys = [FSDP2, *KEYS, f"checkpoint.background={background}", "train.max_steps=40"]
    with Forked(tmp_path / "output", tiny_run(run_dir, corpus, *keys), count) as forked:
        assert forked.exit_codes() == [1] * count
        output = forked.output()
    for part in ("could not be written", "No space left on device", "make room, or choose another run_dir"):
        assert part in output, output
    assert "Traceback" not in output
    manager = CheckpointManager(run_dir / "checkpoints")
    kept = manager.complete()
    assert kept
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [path.name for path in kept]
    for path in kept:
        manager.load(path)
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left on device" in status["reason"]
    # With room again the same command goes on from there.
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    first = json.loads((kept[-1] / "state.json").read_text())["counters"]["step"] + 1
    outputs = carry_out(tmp_path / "again", tiny_run(run_dir, corpus, *keys), count)
    assert f"from step {first - 1}" in outputs[0] or f"step {first}" in outputs[0], outputs[0]
    assert len(losses(run_dir)) == 40


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_nothing_in_a_hostile_checkpoint_is_run(unfinished, corpus, tmp_path):
    """Pickles under every name that some loader would open, beside and in the place of what belongs there."""
    newest = unfinished / "checkpoints/step_00000012"
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    for name in (".metadata", "model.pt", "optimizer.bin", "pytorch_model.bin", "training_args.bin", "note.pkl"):
        (newest / name).write_bytes(payload)
    # What is not listed is not opened: the run goes on from this checkpoint.
    assert lost_here(*tiny_run(unfinished, corpus, *KEYS)) == 0
    assert not marker.exists()

    for name in ("model_00000_process_00000.safetensors", "state.json", "manifest.json"):
        kept = (newest / name).read_bytes()
        (newest / name).write_bytes(payload)
        assert lost_here(*tiny_run(unfinished, corpus, *KEYS, f"checkpoint.resume={newest}")) == 2
        (newest / name).write_bytes(kept)
    assert not marker.exists()
    # The control: the payload does what it should when someone unpickles it.
    pickle.loads(payload)
    assert marker.exists()


def test_tensors_beside_the_listed_files_are_refused(unfinished):
    newest = unfinished / "checkpoints/step_00000012"
    manager = CheckpointManager(newest.parent)
    manager.load(newest)
    shutil.copy(newest / "model_00000_process_00000.safetensors", newest / "model_00007_process_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"model_00007_process_00000\.safetensors is not listed in the manifest"):
        CheckpointManager(newest.parent).load(newest)


def test_an_absurdly_large_manifest_is_not_read(unfinished):
    newest = unfinished / "checkpoints/step_00000012"
    with (newest / "manifest.json").open("wb") as file:
        # A hole: it takes no room on the disk, and would take 8 GiB of memory.
        file.truncate(2**33)
    with pytest.raises(CheckpointError, match=r"manifest\.json.* is too large"):
        CheckpointManager(newest.parent).load(newest)
