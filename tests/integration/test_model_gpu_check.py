"""scripts/gpu_check.py as a process: every item on the CPU, items that fail, hang or die, wrong kernels, no GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "scripts"
KERNELS = REPOSITORY / "kernels"
TINY = [str(SCRIPTS / "gpu_check.py"), "--device", "cpu", "--tiny"]

# The script promises to need none of these.
FORBIDDEN = ["hydra", "omegaconf", "datasets", "accelerate", "wandb", "deepspeed", "rich", "matplotlib"]
HIDE_FORBIDDEN = f"""
import sys

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
# Of the process that holds the device: K1 gives 5 % too much.
WRONG_KERNEL = f"""
import sys
if "--multiprocessing-fork" in sys.orig_argv:
    sys.path[:0] = [{str(REPOSITORY)!r}, {str(KERNELS)!r}]
    import lost_kernels.lost_linear as home
    right = home.lost_group
    home.lost_group = lambda *args, **kwargs: [1.05 * y for y in right(*args, **kwargs)]
"""


def run(arguments: list[str], folder: Path, in_every_process: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder`, so that only the script's own sys.path finds our packages."""
    (folder / "sitecustomize.py").write_text(in_every_process)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=550
    )


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def ends(lines: list[dict]) -> dict[str, dict]:
    """The last line of every item."""
    return {line["item"]: line for line in lines if "stage" in line and "what" not in line}


def test_every_item_passes_on_the_cpu_without_the_training_packages(tmp_path):
    done = run([*TINY, "--to", "results/lines.jsonl"], tmp_path, HIDE_FORBIDDEN)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json_lines(done.stdout)
    assert {line["status"] for line in ends(lines).values()} == {"passed"}
    stages = [line["stage"] for line in lines if "stage" in line]
    assert stages == sorted(stages)
    assert set(stages) == {"S0", "S1", "S2", "S3", "S4", "S5"}
    assert json_lines((tmp_path / "results" / "lines.jsonl").read_text()) == lines
    rows = {line["what"]: line for line in lines if "what" in line}
    assert rows["versions"]["torch"] == torch.__version__
    assert {name for name, row in rows.items() if row["stage"] == "S3"} == {
        "dense, compiled",
        "dense unpadded, compiled",
        "CoLA, compiled",
        "SLTrain, eager",
        "LOST plain, eager",
        "LOST plain, compiled",
        "LOST op, eager",
        "LOST op, compiled",
    }
    steps = [row for row in rows.values() if row["stage"] == "S4"]
    assert all(row["tokens_per_second"] > 0 and row["losses"][1] < row["losses"][0] for row in steps)
    assert rows["tiny 2x32 lost none compiled"]["graph_breaks"] == 0
    # A GPU's memory decides; there is none.
    assert lines[-1] == {"item": "default kernels", "default": "not measured"}
    table = done.stdout.splitlines()[-20:]
    assert sum(line.startswith("S3  ") for line in table) > 5


def test_a_wrong_kernel_stops_every_item_that_is_timed(tmp_path):
    done = run(TINY, tmp_path, WRONG_KERNEL)
    assert done.returncode == 1, done.stderr
    lines = json_lines(done.stdout)
    wrong = next(line for line in lines if line.get("wrong"))
    assert wrong["stage"] == "S0"
    assert wrong["wrong"]["y"] == "K1"
    assert wrong["errors"]["y"] == pytest.approx(0.05, rel=0.01)
    assert not any("ms" in line or "tokens_per_second" in line for line in lines)
    left_out = [line for line in ends(lines).values() if line["status"] == "left out"]
    assert {line["stage"] for line in left_out} == {"S0", "S1", "S2", "S3", "S4", "S5"}
    assert all(line["error"] == "S0 layers float32: failed" for line in left_out)
    assert "WRONG" in done.stdout


OWN_ITEMS = """
import os, time

def fine(place):
    yield {"what": "fine", "value": 1}

def wrong(place):
    yield {"what": "wrong", "status": "failed"}

def fails(place):
    yield {"what": "before"}
    raise RuntimeError("a broken kernel")

def dies(place):
    os._exit(9)

def hangs(place):
    os.system("sleep 300 &")
    while True:
        time.sleep(1)
"""
OWN_RUN = """
import json, sys, time
sys.path[:0] = [{scripts!r}, {folder!r}]
from gpu_items import supervise
from gpu_items.plan import Item

if __name__ == "__main__":
    items = [Item(stage, name, seconds, "own_items", name) for stage, name, seconds in {items!r}]
    supervise.run_items(
        items, "cpu", is_tiny=True, deadline_seconds={deadline}, started=time.monotonic(),
        report=lambda line: print(json.dumps(line), flush=True),
    )
"""


def run_own(items: list[tuple[str, str, float]], deadline: float, folder: Path) -> list[dict]:
    (folder / "own_items.py").write_text(OWN_ITEMS)
    script = folder / "own_run.py"
    script.write_text(OWN_RUN.format(scripts=str(SCRIPTS), folder=str(folder), items=items, deadline=deadline))
    done = run([str(script)], folder)
    assert done.returncode == 0, done.stderr
    return json_lines(done.stdout)


def test_an_item_that_hangs_fails_or_dies_costs_only_itself(tmp_path):
    lines = run_own(
        [("S1", "hangs", 8), ("S1", "fine", 80), ("S1", "fails", 80), ("S2", "dies", 80), ("S3", "wrong", 80)],
        1000,
        tmp_path,
    )
    found = ends(lines)
    assert found["hangs"]["status"] == "cut off"
    assert 8 <= found["hangs"]["seconds"] < 15
    assert found["fine"]["status"] == "passed"
    assert found["fails"]["status"] == "failed"
    assert "a broken kernel" in found["fails"]["error"]
    assert "in fails" in found["fails"]["trace"]
    assert "exit status 9" in found["dies"]["error"]
    assert found["wrong"]["status"] == "failed"
    assert [line["what"] for line in lines if "what" in line] == ["fine", "before", "wrong"]


def test_an_early_item_that_fails_leaves_out_the_rest_and_the_deadline_holds(tmp_path):
    first = run_own([("S0", "wrong", 60), ("S1", "fine", 60)], 1000, tmp_path)
    assert ends(first)["fine"]["status"] == "left out"
    began = time.monotonic()
    last = run_own([("S1", "hangs", 60), ("S2", "fine", 60)], 25, tmp_path)
    assert time.monotonic() - began < 40
    assert [line["status"] for line in last] == ["cut off", "left out"]
    assert last[-1]["seconds_since_start"] < 25


@pytest.fixture
def correctness(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu_items import correctness

    return correctness


@pytest.mark.parametrize("wrong", ["d x", "d low_rank_down", "d gamma"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_wrong_gradient_is_found(correctness, monkeypatch, wrong, dtype):
    """Values are right, one gradient is 10 % of its size off."""
    from gpu_items.worker import Place

    place = Place(torch.device("cpu"), True, 0.0, None)
    given = correctness.group(63, 60, [(101, 16, 3), (37, 9, 5)], place, dtype, is_learned=True)
    right = correctness.compare("", given, "silu")
    assert right["status"] == "passed"
    lost_group = correctness.layers.lost_group

    def wrong_group(x, members, *args, **kwargs):
        def more(value):
            # The same number with 1.1 times its gradient.
            return value + 0.1 * (value - value.detach())

        x = more(x) if wrong == "d x" else x
        if wrong != "d x":
            name = wrong[2:]
            members = [member._replace(**{name: more(getattr(member, name))}) for member in members]
        return lost_group(x, members, *args, **kwargs)

    monkeypatch.setattr(correctness.layers, "lost_group", wrong_group)
    found = correctness.compare("", given, "silu")
    assert found["status"] == "failed"
    assert list(found["wrong"]) == [wrong]


def test_tiles_that_the_sweep_changes_are_there(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu_items.pointwise import tile_sizes
    from lost_kernels.lost_linear.triton_impl import TILES, Tile

    assert {"z_forward", "z_backward", "add_kept"} <= TILES.keys()
    assert all(Tile(rows, columns).num_warps > 0 for rows, columns in tile_sizes())


def test_budgets_fit_the_deadline(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_check
    from gpu_items import supervise
    from gpu_items.plan import plan

    items = plan(is_tiny=False)
    assert gpu_check.DEADLINE_SECONDS <= 540 - supervise.END_SECONDS
    # At least 20 s are left for the imports of a cold machine.
    assert 20 + sum(item.budget_seconds for item in items) <= gpu_check.DEADLINE_SECONDS - supervise.END_SECONDS
    assert len({item.name for item in items}) == len(items)
    assert [item.stage for item in items] == sorted(item.stage for item in items)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run(TINY[:1], tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert done.stdout == ""
