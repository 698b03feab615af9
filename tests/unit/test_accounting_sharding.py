"""Memory on one of several devices, against sums over the parameters of a real model."""

import re

import pytest

from lost.accounting import GIB, memory_per_device
from lost.accounting.sharding import SPLIT_PARTS, memory_over_devices, whole_weights_bytes
from lost.cli import plan
from lost.config.compose import compose
from lost.config.model import LostConfig, ModelConfig
from lost.model.build import build_meta_model

MODEL = ModelConfig(
    name="odd",
    vocab_size=301,
    hidden_size=40,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    lineage_rank=9,
)
FORM = LostConfig(lost_rank=9, density=0.1)


def memory_of(precision="bf16"):
    return memory_per_device(MODEL, FORM, micro_batch_size=3, seq_len=17, precision=precision, recompute="none")


@pytest.fixture(scope="module")
def parameters():
    """Number of elements by name."""
    return {name: parameter.numel() for name, parameter in build_meta_model(MODEL, FORM).named_parameters()}


@pytest.mark.parametrize("runtime", SPLIT_PARTS)
def test_one_device_holds_everything(runtime):
    assert memory_over_devices(memory_of(), MODEL, runtime, 1, "bf16") == memory_of().total


@pytest.mark.parametrize(("precision", "weight", "product"), [("fp32", 4, 4), ("bf16", 4, 2), ("pure_bf16", 2, 2)])
def test_every_runtime_against_the_parameters_of_the_model(parameters, precision, weight, product):
    memory = memory_of(precision)
    total = sum(parameters.values()) * weight
    rest = memory.total - 4 * total
    of_block = sum(number for name, number in parameters.items() if ".layers.1." in name)
    outside = sum(number for name, number in parameters.items() if ".layers." not in name)
    whole = (outside + 2 * of_block) * product
    expected = {
        "ddp": 4 * total,
        "zero1": 2 * total + 2 * total / 5,
        "zero2": total + 3 * total / 5,
        "zero3": 4 * total / 5 + whole,
        "fsdp2": 4 * total / 5 + whole,
    }
    ours = {name: memory_over_devices(memory, MODEL, name, 5, precision) - rest for name in SPLIT_PARTS}
    assert ours == pytest.approx(expected, rel=1e-12)
    # Negative control: forgetting the weights that are whole for a moment would be noticed.
    assert ours["fsdp2"] != pytest.approx(4 * total / 5, rel=1e-3)


def test_tied_embeddings_are_whole_once():
    values = {key: getattr(MODEL, key) for key in MODEL.__dataclass_fields__} | {"tie_word_embeddings": True}
    tied = ModelConfig(**values)
    difference = whole_weights_bytes(0, MODEL, "fp32") - whole_weights_bytes(0, tied, "fp32")
    # With no weights at all the blocks are what is missing to the root: two of three blocks give back two thirds.
    assert difference == pytest.approx(301 * 40 * 4 / 3)


def printed(capsys, *overrides: str) -> str:
    assert plan.run(compose("plan", ["experiment=c4_7b", "runtime.precision=bf16", *overrides])) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_plan_names_the_first_runtime_that_fits(capsys):
    text = printed(capsys, "num_devices=64", "device_memory_gib=60")
    lost, dense = re.findall(r"64 devices peak of one with (.*?)(?= └)", text)
    assert lost.endswith("the first that fits is runtime=zero1")
    assert dense.endswith("the first that fits is runtime=zero2")
    peaks = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) GiB[,;]", lost)}
    assert list(peaks) == ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    config = compose("plan", ["experiment=c4_7b", "runtime.precision=bf16"])
    whole = plan.plan_of(config, config.model, config.parameterization, "bf16").memory
    assert peaks["ddp"] == pytest.approx(whole.total / GIB, abs=0.006)
    assert "none fits" in printed(capsys, "num_devices=8", "device_memory_gib=16")


def test_one_device_needs_no_comparison(capsys):
    assert "zero1" not in printed(capsys)


def test_replicas_hold_larger_shards(capsys):
    def fsdp2(*overrides: str) -> float:
        return float(re.search(r"fsdp2 ([\d.]+) GiB", printed(capsys, "num_devices=64", *overrides))[1])

    assert fsdp2("runtime=fsdp2", "runtime.replicas=8") > fsdp2() + 3
