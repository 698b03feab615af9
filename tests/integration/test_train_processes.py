"""Real training runs: the same losses again, on two processes, and from other batch splits."""

import json

import pytest
from safetensors.torch import load_file

from lost.testing.forked import carry_out
from lost.testing.runs import losses, read_metrics, succeed, tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def single(tmp_path_factory, corpus):
    """20 steps on one process, micro-batch 8."""
    folder = tmp_path_factory.mktemp("single")
    carry_out(folder / "output", tiny_run(folder / "run", corpus, "train.max_steps=20", "train.micro_batch_size=8"))
    return folder / "run"


def relative_differences(ours, theirs):
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def test_the_same_command_gives_the_same_losses_and_weights_bit_for_bit(single, corpus, tmp_path):
    again = tmp_path / "again"
    succeed(*tiny_run(again, corpus, "train.max_steps=20", "train.micro_batch_size=8"))
    assert read_metrics(again) == read_metrics(single)
    ours, theirs = (load_file(run_dir / "final" / "model.safetensors") for run_dir in (again, single))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_two_processes_under_torchrun_with_micro_batch_4_give_the_losses_of_one_with_8(single, corpus, tmp_path):
    run_dir = tmp_path / "two"
    succeed(*tiny_run(run_dir, corpus, "train.max_steps=20", "train.micro_batch_size=4"), num_processes=2)
    assert len(losses(run_dir)) == 20
    assert max(relative_differences(losses(run_dir), losses(single))) < 1e-5
    ours, theirs = ([line for line in read_metrics(d) if "eval/loss" in line] for d in (run_dir, single))
    assert [line["eval/tokens"] for line in ours] == [line["eval/tokens"] for line in theirs]
    pairs = zip(ours, theirs, strict=True)
    assert max(abs(a["eval/loss"] - b["eval/loss"]) / b["eval/loss"] for a, b in pairs) < 1e-5
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_another_seed_gives_other_losses(single, corpus, tmp_path):
    """Negative control of the two tests above."""
    run_dir = tmp_path / "other"
    carry_out(tmp_path, tiny_run(run_dir, corpus, "train.max_steps=3", "train.micro_batch_size=8", "seed=1"))
    assert min(relative_differences(losses(run_dir), losses(single)[:3])) > 1e-4
