"""Several real processes with a gloo group, for tests: they start in a fraction of a second after the first."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# To end what hangs, and nothing else: on a busy machine a run of seconds takes minutes.
LIMIT_SECONDS = 300

# A clean process imports these once, and every worker is a fork of it. What a command loads late is here too.
_PRELOADED = [
    "lost.model",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "lost.assemble.pretrain",
    "lost.cli.main",
    "lost.cli.pretrain",
    "lost.cli.run_defaults",
    "lost.config.compose",
    "lost.utils.plots",
    "hydra",
    "lost.testing.forked",
]
# Loaded by accelerate as soon as a run ends. It asks for a GPU, after which no fork can use one.
_PRELOADED_WITHOUT_GPU = ["deepspeed", "lost.train.zero"]


def fork_context() -> Any:
    """Starts processes as forks of a clean one, which is the same for all tests of a session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED + ([] if torch.cuda.is_available() else _PRELOADED_WITHOUT_GPU))
    return context


def run_processes(work: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """What `work(process index, *arguments)` returns in each of `count` processes of one gloo group.

    Args:
        work: importable by its name, so in a module of this package; its result is written by torch.save.
        folder: an empty or new folder for the meeting point and the results.
        arguments: anything that can be pickled.
        count: number of processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = fork_context()
    started = [
        context.Process(target=_worker, args=(work, index, count, folder, arguments), daemon=True)
        for index in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(LIMIT_SECONDS)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * count, f"exit codes {codes}; None means still running after {LIMIT_SECONDS} s"
    return [torch.load(folder / f"result_{index}.pt", weights_only=True) for index in range(count)]


def _worker(work: Callable[..., Any], index: int, count: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=index, world_size=count)
    torch.save(work(index, *arguments), folder / f"result_{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def printed_by(module: str, **environment: str) -> Any:
    """`python -m module` in a process of its own on one thread: the last line it prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
