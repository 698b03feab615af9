"""The peak of a training step, counted tensor by tensor: dense and LOST at every level of recomputation."""

import time

import torch

from lost.bench.arms import chosen, model_of
from lost.bench.fresh import num_rows_of, random_ids
from lost.bench.live_memory import LiveBytes
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import Timing
from lost.config.schema import BenchConfig
from lost.config.training import AdamWConfig
from lost.train.loss import model_loss_sum
from lost.train.optim import build_optimizer
from lost.train.runtime import pick_device, pick_precision, set_up_process

NAMES = ["dense none", "dense p1", "lost none", "lost p0", "lost p1", "lost p2", "lost p3", "lost block"]


def bench_memory(config: BenchConfig) -> BenchResult:
    """Weights, optimizer state, and what lives together at the worst moment of the second step of each arm.

    Times are of that one counted step, whose counting slows it: they compare nothing.
    """
    set_up_process(config.runtime)
    device = pick_device(config.runtime.device)
    precision = pick_precision(config.runtime.precision, device)
    arms = {name: measured(config, name, device, precision) for name in chosen(config, NAMES, device, has_levels=True)}
    num_rows = num_rows_of(config)
    title = f"memory of a training step of {config.model.name}: {num_rows} rows of {config.seq_len} tokens"
    num_threads = torch.get_num_threads()
    num_tokens = num_rows * config.seq_len
    return BenchResult(config, title, num_tokens, device, precision, num_threads, arms, base="dense none")


def measured(config: BenchConfig, name: str, device: torch.device, precision: str) -> Arm:
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    net = model_of(config, name, config.model, device, dtype)
    optimizer = build_optimizer(net, AdamWConfig(learning_rate=1e-4), device)
    ids = random_ids(config, device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    started = time.perf_counter()
    with LiveBytes() as live:
        with autocast:
            loss = model_loss_sum(net, net, {"input_ids": ids}, ids)
        kept = live.live_bytes
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    moments = [value for state in optimizer.state.values() for value in state.values()]
    outliving = [*net.parameters(), *net.buffers(), *moments]
    peak = live.peak_bytes + sum(tensor.nbytes for tensor in outliving if isinstance(tensor, torch.Tensor))
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    return Arm(Timing((seconds,) * 3), num_parameters, kept, peak)
