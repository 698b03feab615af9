"""scripts/gpu_check.py as a process: every item on the CPU, a failing item, a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}

# The script promises to need none of these.
FORBIDDEN = ["hydra", "omegaconf", "datasets", "accelerate", "wandb", "deepspeed", "rich", "matplotlib"]


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script through `code` from another folder, so that only its own sys.path finds the packages."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )


def script_with(preparation: str) -> str:
    return f"""
import runpy, sys
sys.argv = ["gpu_check.py", "--device", "cpu", "--tiny"]
{preparation}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def test_every_item_passes_on_the_cpu_without_the_training_packages(tmp_path):
    done = run_python(
        script_with(
            f"""
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        is_there = name.partition(".")[0] not in {FORBIDDEN!r}
        return self.finder.find_spec(name, path, target) if is_there else None
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
try:
    import accelerate
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("accelerate can still be imported")
"""
        ),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["status"] for line in lines] == ["passed"] * len(lines)
    names = [line["item"] for line in lines]
    assert names[0] == "versions"
    assert names[-1] == "end"
    assert sum(name.startswith("layer") for name in names) == 4
    assert sum(name.startswith("cross-entropy") for name in names) == 2
    steps = [line for line in lines if line["item"].startswith("steps")]
    assert {line["item"].split()[-1] for line in steps} == {"eager", "compiled"}
    assert {line["item"].split()[-2] for line in steps} == {"dense", "lost"}
    assert all(line["tokens_per_second"] > 0 for line in steps)


def test_a_failing_item_is_reported_and_the_next_one_runs(tmp_path):
    """A layer that forgets gamma: the four exactness items fail, the steps of the dense model still run."""
    done = run_python(
        script_with(
            f"""
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "kernels")!r}]
import torch, lost.model.lost_linear as home
right = home.lost_linear
def wrong(x, *args, **kwargs):
    if x.dtype == torch.float64:
        return right(x, *args, **kwargs)
    if x.shape[-1] == 64:
        raise RuntimeError("a broken kernel")
    return right(x, *args, **kwargs) * 1.05
home.lost_linear = wrong
"""
        ),
        tmp_path,
    )
    assert done.returncode == 1, done.stderr
    lines = {line["item"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines["layer silu float32"]["status"] == "failed"
    assert lines["layer silu bfloat16"]["status"] == "failed"
    assert lines["layer silu bfloat16"]["errors"]["y"] == pytest.approx(0.05, rel=0.1)
    assert lines["steps llama_tiny dense eager"]["status"] == "passed"
    assert "a broken kernel" in lines["steps llama_tiny lost eager"]["error"]
    assert lines["end"]["num_failed"] == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert done.stdout == ""


def test_it_ends_at_the_deadline(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--deadline-seconds", "0.5"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert lines[-1]["item"] == "end"
    assert lines[-1]["status"] == "failed"
    assert all(line["status"] == "left out" for line in lines[:-1])
