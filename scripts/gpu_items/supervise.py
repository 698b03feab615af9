"""Runs items in a process of its own and keeps the time: one that hangs or dies costs itself, not those after it.

Every row that an item yields, and the end of every item, is one JSON line on standard output and in the file of `--to`.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu_items.plan import DECISIVE_STAGE, Item
from gpu_items.worker import serve

# Kept for the last lines and the table.
END_SECONDS = 5.0
# With less left an item is not begun.
LEAST_SECONDS = 2.0

Report = Callable[[dict[str, Any]], None]


class NoDeviceError(Exception):
    """torch sees no such device."""


class Worker:
    """The process that runs items, in a process group of its own: compilers that it starts end with it."""

    def __init__(self, device: str, is_tiny: bool):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, device, is_tiny), daemon=False)
        self.process.start()
        theirs.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Until torch is imported and the device has its context; nothing is wrong yet if that takes too long."""
        try:
            is_there = not self.connection.poll(seconds) or self.connection.recv()[1]
        except (EOFError, ConnectionError):
            # It is gone: the next item will say so.
            return
        if not is_there:
            raise NoDeviceError

    def run(self, item: Item, seconds: float, machine: tuple | None, on_row: Report) -> dict[str, Any]:
        """The item's end: status passed, failed or cut off; rows are handed on as they come."""
        end = time.monotonic() + seconds
        try:
            self.connection.send((item, seconds, machine))
            while self.connection.poll(max(0.0, end - time.monotonic())):
                kind, value = self.connection.recv()
                if kind == "end":
                    return value
                if kind == "row":
                    on_row(value)
        except (EOFError, ConnectionError):
            self.process.join(5)
            return {"status": "failed", "error": f"its process ended with exit status {self.process.exitcode}"}
        return {"status": "cut off", "error": f"not done after {seconds:.0f} s"}

    def stop(self) -> None:
        # Its own group only once it has made one; before that it has started nothing.
        assert self.process.pid
        try:
            is_leader = os.getpgid(self.process.pid) == self.process.pid
            os.killpg(self.process.pid, signal.SIGKILL) if is_leader else self.process.kill()
        except ProcessLookupError:
            pass
        self.process.join(5)
        self.connection.close()


def run_items(
    items: Sequence[Item], device: str, *, is_tiny: bool, deadline_seconds: float, started: float, report: Report
) -> list[dict[str, Any]]:
    """All lines of the run, each reported when it is made.

    Args:
        items: their budgets count from the moment that the process is ready.
        started: time.monotonic() that the deadline counts from.

    Raises:
        NoDeviceError: there is no CUDA device where one is asked for.
    """
    lines: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        lines.append(line | {"seconds_since_start": round(time.monotonic() - started, 1)})
        report(lines[-1])

    worker, due, reason = None, 0.0, ""
    try:
        for item in items:
            due += item.budget_seconds
            elapsed = time.monotonic() - started
            if worker is None and not reason and deadline_seconds - END_SECONDS - elapsed > LEAST_SECONDS:
                worker = Worker(device, is_tiny)
                worker.wait_until_ready(deadline_seconds - END_SECONDS - elapsed)
                due += time.monotonic() - started - elapsed
                elapsed = time.monotonic() - started
            # Time that earlier items did not use is added.
            seconds = min(max(item.budget_seconds, due - elapsed), deadline_seconds - END_SECONDS - elapsed)
            named = {"stage": item.stage, "item": item.name}
            if reason or worker is None or seconds < LEAST_SECONDS:
                tell({**named, "status": "left out", "error": reason or "no time left"})
                continue
            machine = next((line["machine"] for line in lines if "machine" in line), None)
            end = worker.run(item, seconds, machine, lambda row, named=named: tell({**named, **row}))
            tell({**named, **end, "seconds": round(time.monotonic() - started - elapsed, 1)})
            if "error" in end:
                # A device is of no use after an illegal access, and one that hangs stays so.
                worker.stop()
                worker = None
            if item.stage == DECISIVE_STAGE and end["status"] != "passed":
                reason = f"{item.stage} {item.name}: {end['status']}"
    finally:
        if worker:
            worker.stop()
    return lines


def print_json(line: dict[str, Any], files: Sequence[Any]) -> None:
    for file in files:
        print(json.dumps(line), file=file, flush=True)
