"""What this machine reaches at its best: one large product of random numbers, one large copy."""

import time
from collections.abc import Callable

import torch

from lost.bench.limits import Machine
from lost.bench.timing import wait_for

# Rows of the square product and bytes of the copy: large beside launches and caches, short on a CPU.
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
SECONDS = 0.3


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """FLOP/s of a product in `dtype`, and bytes per second of a copy, read and written ones; the best of several."""
    size = PRODUCT_SIZE.get(device.type, PRODUCT_SIZE["cpu"])
    # Zeros would draw less power, and so run faster than any weight does.
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    product_seconds = best_seconds(lambda: torch.mm(left, right, out=product), device)
    source = torch.randn(COPY_BYTES.get(device.type, COPY_BYTES["cpu"]) // 4, device=device)
    copy = torch.empty_like(source)
    copy_seconds = best_seconds(lambda: copy.copy_(source), device)
    return Machine(2 * size**3 / product_seconds, 2 * source.nbytes / copy_seconds)


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of the calls that SECONDS hold, at least five, after one untimed."""
    best, num_calls, end = float("inf"), 0, time.perf_counter() + SECONDS
    call()
    while num_calls < 5 or time.perf_counter() < end:
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
        num_calls += 1
    return best
