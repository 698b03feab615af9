"""runtime.kernels in whole runs: equal losses, a resume with another backend, what is printed, mistakes."""

import pytest
import torch
from safetensors.torch import load_file

from lost.config.runtime import RuntimeConfig
from lost.testing.runs import losses, lost_here, tiny_run, write_corpus
from lost.train.runtime import pick_kernels
from lost.utils.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(run_dir, corpus, *overrides):
    assert lost_here(*tiny_run(run_dir, corpus, "evaluation.every_steps=0", *overrides)) == 0
    return run_dir


def largest_difference(ours, theirs):
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def test_fifty_steps_of_llama_tiny_have_the_losses_of_the_definition(tmp_path, corpus):
    """model=llama_tiny as it is packaged but for its vocabulary; a changed gamma shows what a difference looks like.

    At this learning rate rounding grows to 2e-7 in fifty steps, as between the definition with and without
    runtime.recompute=p1; at 0.003 that difference is 4e-5.
    """
    traces = {}
    arms = {"grouped": [], "reference": [], "changed": ["parameterization.gamma=0.71"]}
    for name, changes in arms.items():
        kernels = "reference" if name == "reference" else "grouped"
        arguments = [
            key
            for key in tiny_run(
                tmp_path / name, corpus, "train.max_steps=50", "checkpoint.every_steps=0", "evaluation.every_steps=0"
            )
            if not key.startswith(("model.", "parameterization.")) or key.startswith("model.vocab_size")
        ]
        small = ["train.global_batch_size=2", "train.micro_batch_size=2", "optimizer.learning_rate=0.001"]
        assert lost_here(*arguments, "model=llama_tiny", f"runtime.kernels={kernels}", *small, *changes) == 0
        traces[name] = losses(tmp_path / name)
    assert len(traces["grouped"]) == 50
    assert traces["grouped"][-1] < 0.95 * traces["grouped"][0]
    assert largest_difference(traces["grouped"], traces["reference"]) < 1e-5
    assert traces["grouped"] != traces["reference"], "the same bits: was it the same code?"
    assert largest_difference(traces["changed"], traces["reference"]) > 1e-4


@pytest.mark.parametrize(("first", "second"), [("grouped", "reference"), ("reference", "grouped")])
def test_a_run_goes_on_with_another_backend(tmp_path, corpus, first, second):
    whole = run(tmp_path / "whole", corpus, f"runtime.kernels={first}")
    changed = run(tmp_path / "changed", corpus, f"runtime.kernels={first}", "train.max_steps=8")
    run(changed, corpus, f"runtime.kernels={second}", "train.max_steps=12")
    assert largest_difference(losses(changed)[:1], losses(whole)[:1]) == 0
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (changed, whole))
    assert ours.keys() == theirs.keys()
    assert len(losses(changed)) == 12


def test_the_choice_and_its_reason_are_printed(tmp_path, corpus, capsys):
    run(tmp_path / "run", corpus, "train.max_steps=1")
    assert "LOST kernels: grouped (auto: the device is cpu)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("wanted", ["reference", "grouped"])
def test_what_is_set_is_taken(wanted):
    assert pick_kernels(wanted, CPU) == (wanted, "as set")


def test_triton_needs_cuda():
    assert RuntimeConfig(name="single").kernels == "auto"
    assert pick_kernels("auto", torch.device("cuda"))[0] == "triton"
    with pytest.raises(
        ConfigError, match=r"runtime.kernels = triton: needs a CUDA device.* the device is cpu; use grouped"
    ):
        pick_kernels("triton", CPU)
