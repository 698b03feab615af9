"""The process that holds the device: takes items one by one and sends back their rows."""

import importlib
import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Where an item runs, and until when.

    machine: FLOP/s of a large product and bytes/s of a large copy, once they are known.
    """

    device: "torch.device"
    is_tiny: bool
    end: float
    machine: tuple[float, float] | None

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def serve(connection: Connection, device: str, is_tiny: bool) -> None:
    """Runs items until the other side is gone."""
    os.setpgid(0, 0)
    # Libraries print; standard output is for JSON lines.
    os.dup2(2, 1)
    import torch

    is_there = not device.startswith("cuda") or torch.cuda.is_available()
    if is_there:
        # The device's context, before an item's seconds count.
        torch.zeros(1, device=device)
    connection.send(("ready", is_there))
    while True:
        try:
            item, seconds, machine = connection.recv()
        except (EOFError, ConnectionError):
            return
        place = Place(torch.device(device), is_tiny, time.monotonic() + seconds, machine)
        connection.send(("end", run(item, place, connection)))
        release(place)


def run(item: Any, place: Place, connection: Connection) -> dict[str, Any]:
    """Sends the item's rows; its end says failed if one of them is, or if it raises."""
    status = "passed"
    try:
        function = getattr(importlib.import_module(item.module), item.function)
        for row in function(place, **item.arguments):
            if row.get("status") == "failed":
                status = "failed"
            connection.send(("row", row))
    except Exception as error:
        # One broken item must not hide the others: its line has the whole traceback.
        return {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return {"status": status}


def release(place: Place) -> None:
    """Frees what an item left, so that the next one's peak is its own."""
    import gc

    import torch

    torch.compiler.reset()
    gc.collect()
    if place.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
