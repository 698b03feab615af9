"""S4: whole training steps in pure bfloat16: tokens/s, peak memory, fraction of the limit."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from lost_kernels.cross_entropy import linear_cross_entropy
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gpu_items.models import compile_blocks, lost_config, model_config, padded_config, random_model, with_arm
from gpu_items.timing import flushed, spread, times
from gpu_items.worker import Place
from lost.bench.limits import Machine, step_works
from lost.bench.timing import wait_for
from lost.config.model import DenseConfig
from lost.model.head import head_gives
from lost.utils.labels import next_token_labels

NUM_WARMUP_STEPS = 3
NUM_STEPS = 20
LEAST_STEPS = 5
# Kept for freeing the model.
RESERVE_SECONDS = 1.5


def step_time(place: Place, size: str, rows: int, seq_len: int, arm: str) -> Iterator[dict[str, Any]]:
    """Forward, chunked loss, backward and AdamW on the same random tokens.

    Args:
        arm: form, backend of LOST (or none: auto), level of recomputation, compiled or eager.
    """
    form, *kernels, level, mode = arm.split()
    # The buffer that timing flushes the cache with would count as the model's memory.
    flushed.cache_clear()
    plain = model_config(size)
    model = plain if form == "lost" else padded_config(plain)
    net = with_arm(random_model(form, model, place), kernels[0] if kernels else "auto", level)
    if mode == "compiled":
        compile_blocks(net, place)
    counters.clear()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.vocab_size, (rows, seq_len), device=place.device)
    losses = [train_step(net, optimizer, ids) for _ in range(NUM_WARMUP_STEPS)]
    wait_for(place.device)
    if place.is_cuda:
        torch.cuda.reset_peak_memory_stats(place.device)
    seconds: list[float] = []
    while len(seconds) < (5 if place.is_tiny else NUM_STEPS):
        if len(seconds) >= LEAST_STEPS and place.seconds_left() < RESERVE_SECONDS + 2 * seconds[-1]:
            break
        start = time.perf_counter()
        losses.append(train_step(net, optimizer, ids))
        wait_for(place.device)
        seconds.append(time.perf_counter() - start)
    values = [loss.item() for loss in losses]
    is_right = all(math.isfinite(value) for value in values) and values[-1] < values[0]
    median, low, high = spread(seconds)
    row: dict[str, Any] = {
        "what": f"{size} {rows}x{seq_len} {arm}",
        "status": "passed" if is_right else "failed",
        **times((median, low, high)),
        "num_steps": len(seconds),
        "tokens_per_second": round(rows * seq_len / median),
        "losses": [round(values[0], 4), round(values[-1], 4)],
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "compiled_graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    if place.is_cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated(place.device) / 2**30, 3)
    if place.machine:
        config = lost_config(model) if form == "lost" else DenseConfig()
        least = Machine(*place.machine).least_seconds(step_works(model, config, rows * seq_len, seq_len, 2, 2))
        row["of_limit"] = round(least / median, 3)
    yield row


def train_step(net: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """The mean loss of a step, without waiting for the device."""
    loss = loss_of(net, ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def loss_of(net: nn.Module, ids: Tensor) -> Tensor:
    targets = next_token_labels(ids).flatten()
    head: Any = net.lm_head
    with head_gives(head, lambda hidden, weight: linear_cross_entropy(hidden.flatten(0, 1), weight, targets)):
        return net(input_ids=ids, use_cache=False).logits / ids[:, 1:].numel()
