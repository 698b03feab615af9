"""Several real processes with a gloo group, for tests: they start in a fraction of a second after the first."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A clean process imports these once, and every worker is a fork of it.
PRELOADED = ["lost.model", "torch.distributed.fsdp", "torch.distributed.tensor"]


def run_processes(work: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """What `work(process index, *arguments)` returns in each of `count` processes of one gloo group.

    Args:
        work: importable by its name, so in a module of this package; its result is written by torch.save.
        folder: an empty or new folder for the meeting point and the results.
        arguments: anything that can be pickled.
        count: number of processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = [
        context.Process(target=_worker, args=(work, index, count, folder, arguments), daemon=True)
        for index in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * count, f"exit codes {codes}; None means still running after 120 s"
    return [torch.load(folder / f"result_{index}.pt", weights_only=True) for index in range(count)]


def _worker(work: Callable[..., Any], index: int, count: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=index, world_size=count)
    torch.save(work(index, *arguments), folder / f"result_{index}.pt")
    dist.barrier()
    dist.destroy_process_group()
