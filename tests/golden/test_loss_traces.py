"""50 steps of a tiny model against stored losses: a change that should not alter numbers does not.

`python tests/golden/test_loss_traces.py` writes the traces. A change that should alter them stores new ones and says
so in its message.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from lost.testing.runs import losses, lost_here, tiny_run, write_corpus

TRACES = Path(__file__).with_name("loss_traces.json")
# One and two threads give the same bits (x86-64, torch 2.13); other processors sum in another order. What a real change
# does is above (the last test).
RELATIVE = 1e-4
ARMS = {
    "lost": [],
    "lost_options": [
        *["parameterization.gamma_mode=learnable", "parameterization.activation=gelu"],
        *["parameterization.selection_axis=rows", "parameterization.factor_init=cola", "data.isolate_documents=true"],
    ],
    "dense": ["parameterization=dense"],
    "pure_bf16": ["runtime.precision=pure_bf16"],
}


def trace(folder: Path, *overrides: str) -> list[float]:
    folder.mkdir(exist_ok=True)
    keys = tiny_run(folder / "run", write_corpus(folder), "train.max_steps=50", "evaluation.every_steps=0")
    if "parameterization=dense" in overrides:
        keys = [key for key in keys if not key.startswith("parameterization")]
    assert lost_here(*keys, "checkpoint.every_steps=0", *overrides) == 0
    return losses(folder / "run")


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "pure_bf16"])
def test_the_losses_are_the_stored_ones(tmp_path, arm):
    stored = json.loads(TRACES.read_text())[arm]
    assert len(stored) == 50
    assert stored[-1] < stored[0]
    assert largest_difference(trace(tmp_path, *ARMS[arm]), stored) < RELATIVE


def test_pure_bf16_is_near_its_stored_losses(tmp_path):
    """One rounding of a bfloat16 weight is 0.4 %, and which way it goes depends on the processor."""
    stored = json.loads(TRACES.read_text())["pure_bf16"]
    assert largest_difference(trace(tmp_path, *ARMS["pure_bf16"]), stored) < 1e-2


@pytest.mark.parametrize(
    "change",
    ["parameterization.gamma=0.65", "optimizer.learning_rate=0.00303", "parameterization.score=random"],
)
def test_a_small_change_of_the_method_is_seen(tmp_path, change):
    """Negative control of the traces and their limit."""
    stored = json.loads(TRACES.read_text())["lost"]
    assert largest_difference(trace(tmp_path, change), stored) > 3 * RELATIVE


def write_traces() -> None:
    with tempfile.TemporaryDirectory() as folder:
        traces = {arm: trace(Path(folder) / arm, *overrides) for arm, overrides in ARMS.items()}
    TRACES.write_text(json.dumps(traces, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write_traces())
