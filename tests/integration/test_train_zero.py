"""ZeRO on two processes against one: losses, norms, skipped steps, and runs that move between all runtimes."""

import sys

import pytest
import torch

from lost.config.runtime import RuntimeConfig
from lost.model.split import Processes
from lost.testing import group_runs
from lost.testing.processes import run_processes
from lost.testing.runs import lost_here, read_metrics, tiny_run, write_corpus
from lost.train.runtime import start_runtime
from lost.utils.errors import ConfigError

STAGES = ("zero1", "zero2", "zero3")
CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in STAGES]
# The learning rate does not depend on the last step, so that a run may be carried on in pieces.
FORM = ("schedule=constant", "schedule.warmup_steps=2", "train.micro_batch_size=2")
NORMS = "logging.group_norms_every_steps=10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    write_corpus(folder)
    return folder


def command(folder, name, num_steps, *overrides):
    """Trains <folder>/<name> up to a step."""
    steps = (f"train.max_steps={num_steps}", "checkpoint.every_steps=0", "evaluation.every_steps=10")
    return tiny_run(folder / name, folder / "corpus.jsonl", *FORM, NORMS, *steps, *overrides)


def carry_out(folder, count, *commands):
    """One after the other in one group of `count` processes, whose start takes longer than such a run."""
    meeting = folder / f"group_{len(list(folder.glob('group_*')))}"
    statuses = run_processes(group_runs.carry_out, meeting, commands, count=count)
    assert statuses == [[0] * len(commands)] * count


@pytest.fixture(scope="module")
def alone(folder):
    """20 steps of one process without DeepSpeed."""
    carry_out(folder, 1, command(folder, "alone", 20, "runtime=single"))
    return folder / "alone"


@pytest.fixture(scope="module")
def on_two(folder):
    """The folder of runs of 20 steps on two processes, named by their stage."""
    carry_out(folder, 2, *(command(folder, stage, 20, f"runtime={stage}") for stage in STAGES))
    return folder


def by_step(run_dir, key):
    return {line["step"]: line[key] for line in read_metrics(run_dir) if key in line}


def assert_same(run_dir, other, keys, limit):
    for key in keys:
        ours, theirs = by_step(run_dir, key), by_step(other, key)
        assert len(theirs) >= 2, key
        assert ours.keys() >= theirs.keys(), key
        differing = {step: (ours[step], value) for step, value in theirs.items()}
        assert all(abs(a - b) < limit * abs(b) for a, b in differing.values()), (key, differing)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_norms_on_two_processes_are_those_of_one(on_two, alone, stage):
    run_dir = on_two / stage
    groups = {key for line in read_metrics(alone) for key in line if key.startswith(("grad_norm/", "weight_norm/"))}
    assert len(groups) > 30
    assert_same(run_dir, alone, ("loss", "grad_norm", "eval/loss", *groups), 1e-5)
    assert (run_dir / "sample.txt").read_text() == (alone / "sample.txt").read_text()


def test_a_run_moves_between_all_runtimes_and_process_counts(folder, alone):
    """Each leg reads what another runtime has saved; the trace is the unbroken one, every step once."""
    legs = [
        ("zero1", 2, 3),
        ("single", 1, 5),
        ("zero3", 2, 7),
        ("zero2", 1, 9),
        ("fsdp2", 2, 11),
        ("zero2", 2, 13),
        ("ddp", 2, 15),
        ("zero1", 1, 20),
    ]
    for runtime, count, last_step in legs:
        carry_out(folder, count, command(folder, "moving", last_step, f"runtime={runtime}", "runtime.recompute=block"))
        steps = [line["step"] for line in read_metrics(folder / "moving") if "loss" in line]
        assert steps == list(range(1, last_step + 1)), runtime
    assert_same(folder / "moving", alone, ("loss", "grad_norm"), 1e-5)


def test_float32_weights_of_bf16_move_to_ddp(folder):
    """20 steps in bf16: with DeepSpeed to the middle and without it to the end, against without it alone."""
    alone, first, second = (
        command(folder, name, last_step, f"runtime={runtime}", "runtime.precision=bf16")
        for name, last_step, runtime in (
            ("alone_bf16", 20, "single"),
            ("moving_bf16", 10, "zero3"),
            ("moving_bf16", 20, "single"),
        )
    )
    carry_out(folder, 2, first)
    carry_out(folder, 1, second, alone)
    # DeepSpeed's forward rounds norms and residuals too.
    assert_same(folder / "moving_bf16", folder / "alone_bf16", ("loss",), 1e-3)


@pytest.fixture(scope="module")
def stepped(folder):
    """What `steps_of` finds, by runtime and precision, on both processes."""
    done = run_processes(group_runs.steps_of_each, folder / "stepped", CASES)
    return {case: [results[number] for results in done] for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_skipped_step_changes_nothing_on_any_process(stepped, case):
    for result in stepped[case]:
        first, poisoned, unwanted, last = result["states"]
        trained = {key for key, value in first.items() if value.is_floating_point()}
        assert len(trained) > 100
        for key, value in first.items():
            assert torch.equal(poisoned[key], value), key
            assert torch.equal(unwanted[key], value), key
            assert torch.equal(last[key], value) == (key not in trained), key
        assert not torch.isfinite(torch.tensor(result["norms"][1]))
        assert result["norms"][::2] == stepped[case][0]["norms"][::2]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_first_weights_are_those_of_one_process_bit_by_bit(stepped, case):
    engine = group_runs.make_engine("single", "fp32", Processes())
    for result in stepped[case]:
        assert result["first"].keys() == engine.model_tensors().keys()
        for name, value in engine.model_tensors().items():
            assert torch.equal(result["first"][name], value), name


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_updates_are_those_of_the_definition(stepped, case):
    # With bf16 DeepSpeed rounds norms and residuals besides, and AdamW's first updates are signs, which that may turn:
    # there the mean gradient of the first step is compared.
    steps, ending, limit = {"fp32": ((1, 4), "", 1e-5), "bf16": ((1,), "/exp_avg", 2e-2)}[case[1]]
    expected = reference_state(case[1], steps)
    found = stepped[case][0]["states"][-1 if len(steps) == 2 else 0]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith(ending):
            assert (found[key] - value.double()).norm() <= limit * value.double().norm(), key


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_weights_can_be_put_back(stepped, case):
    for result in stepped[case]:
        before, after = result["losses"]
        assert before == after


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_zero3_keeps_no_parameter_whole_between_steps(stepped, case):
    for result in stepped[case]:
        assert [size == 0 for size in result["whole_sizes"]] == [case[0] == "zero3"] * 4


def reference_state(precision, steps):
    """What these updates of `steps_of` come to, from the definition: AdamW on the mean over both processes."""
    engine = group_runs.make_engine("single", precision, Processes())
    for step in steps:
        for process in range(2):
            for micro_step in range(2):
                loss = group_runs.loss_of(engine, group_runs.tokens(step, process, micro_step))
                (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(engine.model.parameters(), 0.01)
        engine.step()
        engine.zero_grad()
    return group_runs.state_of(engine)


def test_without_deepspeed_there_is_one_clear_message(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"runtime = zero2 needs DeepSpeed, which is not installed.*runtime=fsdp2"):
        start_runtime(RuntimeConfig(name="zero2", device="cpu"))
    write_corpus(tmp_path)
    assert lost_here(*tiny_run(tmp_path / "run", tmp_path / "corpus.jsonl", "runtime=zero3")) == 2
    assert "needs DeepSpeed, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pure_bf16_is_refused(capsys):
    assert lost_here("pretrain", "experiment=c4_60m", "runtime=zero3", "run_dir=nowhere") == 2
    assert "runtime.precision = pure_bf16 with runtime=zero3" in " ".join(capsys.readouterr().err.split())
