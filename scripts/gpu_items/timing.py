"""Seconds of one call, as the device sees them."""

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from gpu_items.worker import Place

NUM_CALLS = 15
# Larger than the second-level cache, which an earlier call leaves warm.
FLUSHED_BYTES = 2**28
# About a fifth of a millisecond: the device waits while the host queues what is timed.
WAIT_CYCLES = 400_000


def device_seconds(call: Callable[[], Any], place: Place, num_calls: int = NUM_CALLS) -> tuple[float, float, float]:
    """Median and 20 and 80 % quantiles of calls with a cold cache; on CUDA without what the host needs to launch."""
    call()
    call()
    if place.is_tiny:
        num_calls = 3
    if not place.is_cuda:
        return spread([host_seconds(call) for _ in range(num_calls)])
    pairs = []
    for _ in range(num_calls):
        flushed(place.device).zero_()
        torch.cuda._sleep(WAIT_CYCLES)
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize(place.device)
    return spread([start.elapsed_time(end) / 1e3 for start, end in pairs])


def host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@cache
def flushed(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)


def spread(seconds: list[float]) -> tuple[float, float, float]:
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return statistics.median(seconds), low, high


def times(seconds: tuple[float, float, float]) -> dict[str, Any]:
    """As a row has them."""
    median, low, high = (float(f"{1e3 * value:.4g}") for value in seconds)
    return {"ms": median, "spread_ms": [low, high]}
