"""`lost finetune` on two processes, in every runtime, comes to what one process comes to."""

import json

import pytest
from safetensors.torch import load_file

from lost.testing.examples import finetune_run, write_labelled
from lost.testing.forked import carry_out
from lost.testing.runs import lost_here, read_metrics
from lost.testing.tiny import tiny_llama, tiny_tokenizer

# Another order of sums in float32, over 12 steps.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    tiny_llama(initializer_range=0.1).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    write_labelled(folder / "train.jsonl", 60)
    write_labelled(folder / "test.jsonl", 21, seed=1)
    return folder


def arguments_of(place, name, *overrides):
    test = f"data.test_files=[{place / 'test.jsonl'}]"
    # With a small epsilon AdamW turns the rounding of tiny gradients into whole steps.
    more = ["train.micro_batch_size=2", "optimizer.epsilon=0.01", test]
    return finetune_run(place / name, place / "dense", place / "train.jsonl", *more, *overrides)


@pytest.fixture(scope="module")
def alone(place):
    for method in ("full", "lost_adapter"):
        assert lost_here(*arguments_of(place, f"alone_{method}", f"method={method}")) == 0
    return {method: place / f"alone_{method}" for method in ("full", "lost_adapter")}


@pytest.mark.parametrize(
    ("runtime", "method"),
    [
        ("ddp", "full"),
        ("fsdp2", "full"),
        ("fsdp2", "lost_adapter"),
        ("zero2", "lost_adapter"),
        ("zero3", "lost_adapter"),
    ],
)
def test_two_processes_are_one(place, alone, runtime, method):
    if runtime.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = place / f"{runtime}_{method}"
    carry_out(place / "out", arguments_of(place, run.name, f"method={method}", f"runtime={runtime}"), 2)
    one, two = read_metrics(alone[method]), read_metrics(run)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "tokens_seen", "eval/loss", "eval/accuracy"):
            if key in first:
                assert second[key] == pytest.approx(first[key], rel=TOLERANCE, abs=TOLERANCE), (first["step"], key)
    results = [json.loads((folder / "result.json").read_text())["test"]["test"] for folder in (alone[method], run)]
    assert results[1] == pytest.approx(results[0], rel=TOLERANCE, abs=TOLERANCE)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    weights = [load_file(folder / "final" / name) for folder in (alone[method], run)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] - weights[1][key]).abs().max() < TOLERANCE for key in weights[0])
