"""`lost` commands as real processes that start in a fraction of a second, for tests that stop, freeze and kill them.

Each is a fork of a clean process that has imported everything once. What torchrun does is done here by environment
variables; nobody ends the other processes when one dies, so a test sees what each does by itself.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lost.testing.processes import LIMIT_SECONDS, fork_context


class Forked:
    """`lost <arguments>` in `count` processes of one group; used as a context, at whose end all are gone.

    Args:
        folder: where output goes, as output_<process index>.txt; made here.
    """

    def __init__(self, folder: Path, arguments: list[str], count: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        context = fork_context()
        self._outputs = [folder / f"output_{index}.txt" for index in range(count)]
        # As under torchrun the meeting point outlives every process of the group.
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if count > 1 else None
        port = self._store.port if self._store else 0
        self.processes: list[Any] = [
            context.Process(target=_run, args=(arguments, index, count, port, output))
            for index, output in enumerate(self._outputs)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()

    def output(self, index: int = 0) -> str:
        """All that a process has printed, on one line."""
        return " ".join(self._outputs[index].read_text().split()) if self._outputs[index].exists() else ""

    def send(self, index: int, number: signal.Signals) -> None:
        if self.processes[index].exitcode is None:
            os.kill(self.processes[index].pid, number)

    def is_running(self) -> bool:
        """Whether every process still is."""
        return all(process.exitcode is None for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
        """Returns as soon as the condition holds; fails if a process ends before."""
        end = time.monotonic() + seconds
        while not condition():
            codes = [process.exitcode for process in self.processes]
            assert codes == [None] * len(codes), (codes, [self.output(index) for index in range(len(codes))])
            assert time.monotonic() < end, f"the moment did not come within {seconds:g} s"
            time.sleep(0.002)

    def exit_code(self, index: int = 0, seconds: float = LIMIT_SECONDS) -> int | None:
        """Waits for the end of a process; negative: killed by that signal."""
        self.processes[index].join(seconds)
        assert self.processes[index].exitcode is not None, f"process {index} still runs after {seconds:g} s"
        return self.processes[index].exitcode

    def exit_codes(self) -> list[int | None]:
        return [self.exit_code(index) for index in range(len(self.processes))]


def carry_out(folder: Path, arguments: list[str], count: int = 1) -> list[str]:
    """Runs the command to its end, which must be exit status 0; the output of each process."""
    with Forked(folder, arguments, count) as forked:
        codes = forked.exit_codes()
        outputs = [forked.output(index) for index in range(count)]
    assert codes == [0] * count, (codes, outputs)
    return outputs


def _run(arguments: list[str], index: int, count: int, port: int, output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    # The session's leader, as a command of a shell is: signals to the test do not reach it.
    os.setsid()
    # Processes of its own it starts as a command does, not by way of another fork server, which signals would end.
    multiprocessing.set_start_method(None, force=True)  # pyright: ignore[reportArgumentType]
    if count > 1:
        names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    from lost.cli.main import main

    torch.set_num_threads(1)
    raise SystemExit(main(arguments))
