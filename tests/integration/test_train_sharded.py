"""fsdp2 and ddp on two processes against one: losses, elastic resume across runtimes, row order, hybrid sharding."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lost.checkpoint import CheckpointManager
from lost.testing.forked import Forked, carry_out
from lost.testing.runs import losses, read_metrics, tiny_run, write_corpus

FSDP2 = "runtime=fsdp2"
DDP = "runtime=ddp"
NORMS = "logging.group_norms_every_steps=5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus):
    """20 steps of one process."""
    folder = tmp_path_factory.mktemp("alone")
    carry_out(folder / "output", command(folder / "run", corpus, "runtime=single"))
    return folder / "run"


def command(run_dir, corpus, *overrides):
    return tiny_run(run_dir, corpus, "train.max_steps=20", "checkpoint.every_steps=10", NORMS, *overrides)


def assert_same_losses(ours, theirs, limit=1e-5):
    """Relative, of every training loss, gradient norm and validation loss."""
    for key in ("loss", "grad_norm", "eval/loss"):
        mine = [line[key] for line in read_metrics(ours) if key in line]
        other = [line[key] for line in read_metrics(theirs) if key in line]
        assert len(mine) == len(other) > 2, key
        assert max(abs(a - b) / abs(b) for a, b in zip(mine, other, strict=True)) < limit, key


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, corpus):
    """20 steps of two processes with fsdp2, its first checkpoint kept as well."""
    folder = tmp_path_factory.mktemp("sharded")
    carry_out(folder / "output", command(folder / "run", corpus, FSDP2), count=2)
    return folder / "run"


def test_fsdp2_on_two_processes_gives_the_losses_of_one(sharded, alone):
    assert_same_losses(sharded, alone)
    ours, theirs = load_file(sharded / "final/model.safetensors"), load_file(alone / "final/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)


def test_norms_by_group_are_those_of_the_whole_model(sharded, alone):
    ours = next(line for line in read_metrics(sharded) if line["step"] == 20 and "loss" in line)
    theirs = next(line for line in read_metrics(alone) if line["step"] == 20 and "loss" in line)
    groups = [key for key in theirs if key.startswith(("grad_norm/", "weight_norm/"))]
    assert len(groups) > 10
    for key in groups:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_every_process_writes_its_shards(sharded):
    newest = CheckpointManager(sharded / "checkpoints").complete()[-1]
    names = {path.name for path in newest.glob("*.safetensors")}
    assert {"model_00000_process_00000.safetensors", "model_00000_process_00001.safetensors"} <= names
    assert {"optimizer_00000_process_00000.safetensors", "optimizer_00000_process_00001.safetensors"} <= names


def continued(tmp_path, corpus, half, runtime, num_processes):
    """`half`, whose newest checkpoint is that of step 10, carried on to step 20 in another way."""
    run_dir = tmp_path / "run"
    shutil.copytree(half, run_dir)
    shutil.rmtree(run_dir / "final")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000020")
    carry_out(tmp_path / "output", command(run_dir, corpus, runtime), num_processes)
    return run_dir


@pytest.mark.parametrize(
    ("saved", "runtime", "num_processes"),
    [("sharded", "runtime=single", 1), ("sharded", DDP, 2), ("alone", FSDP2, 2)],
    ids=["fsdp2 on 2 to single", "fsdp2 on 2 to ddp on 2", "single to fsdp2 on 2"],
)
def test_a_run_moves_between_runtimes_and_process_counts(
    request, tmp_path, corpus, alone, saved, runtime, num_processes
):
    run_dir = continued(tmp_path, corpus, request.getfixturevalue(saved), runtime, num_processes)
    assert_same_losses(run_dir, alone)
    assert [line["step"] for line in read_metrics(run_dir) if "loss" in line] == list(range(1, 21))


def test_hybrid_sharding_recompute_and_compiled_blocks(tmp_path, corpus, alone):
    options = ("runtime.recompute=block", "runtime.replicas=2", "train.micro_batch_size=2")
    carry_out(tmp_path / "output", command(tmp_path / "run", corpus, FSDP2, *options), count=2)
    assert_same_losses(tmp_path / "run", alone)


def test_replicas_that_do_not_divide_the_processes_are_refused(tmp_path, corpus):
    with Forked(tmp_path / "output", command(tmp_path / "run", corpus, FSDP2, "runtime.replicas=3"), count=2) as forked:
        assert forked.exit_codes() == [2, 2]
        assert "runtime.replicas = 3 does not divide the 2 processes" in forked.output()


def test_one_process_needs_no_launcher(tmp_path, corpus, alone):
    carry_out(tmp_path / "output", command(tmp_path / "run", corpus, FSDP2))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-6)
    facts = json.loads((CheckpointManager(tmp_path / "run/checkpoints").complete()[-1] / "state.json").read_text())
    assert facts["runtime"] == "fsdp2"
