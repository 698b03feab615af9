"""A whole training step (forward, backward, AdamW) of one architecture on random tokens, every arm with one loss."""

from collections.abc import Callable

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from lost.bench.arms import REFERENCE, chosen, compile_blocks, flops_of, model_of, with_compiled
from lost.bench.fresh import random_ids
from lost.bench.peers import PEERS
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import NUM_WARMUP_ROUNDS, time_interleaved
from lost.config.schema import BenchConfig
from lost.config.training import AdamWConfig
from lost.train.loss import model_loss_sum
from lost.train.optim import build_optimizer
from lost.train.runtime import measure_matmul_tflops, pick_device, pick_precision, set_num_threads
from lost.utils.errors import ConfigError


def bench_step(config: BenchConfig) -> BenchResult:
    """Times of training steps on num_tokens // seq_len rows of random tokens, with `recompute` for dense and LOST.

    Raises:
        ConfigError: num_tokens is no multiple of seq_len, or a row is longer than the model takes.
    """
    if config.num_tokens % config.seq_len:
        raise ConfigError(
            f"num_tokens = {config.num_tokens} is no multiple of seq_len = {config.seq_len}: give whole rows"
        )
    if config.seq_len > config.model.max_position_embeddings:
        raise ConfigError(
            f"seq_len = {config.seq_len} is above model.max_position_embeddings"
            f" = {config.model.max_position_embeddings}: shorten the rows or raise it"
        )
    set_num_threads(config.runtime)
    device = pick_device(config.runtime.device)
    precision = pick_precision(config.runtime.precision, device)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    names = chosen(
        config, [f"dense {config.recompute}", *PEERS, REFERENCE, f"lost {config.recompute}"], has_levels=True
    )
    if not config.arms:
        names = [name for name in names if name not in PEERS]

    def make(name: str, is_compiled: bool) -> PreTrainedModel:
        net = model_of(config, name, config.model, device, dtype)
        if is_compiled:
            compile_blocks(net)
        return net

    models = with_compiled(config, make, names)
    ids = random_ids(config, device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def loss_of(model: PreTrainedModel) -> torch.Tensor:
        with autocast:
            return model_loss_sum(model, model, {"input_ids": ids}, ids) / ids.numel()

    def training_step(model: PreTrainedModel) -> Callable[[], None]:
        optimizer = build_optimizer(model, AdamWConfig(learning_rate=1e-4), device)

        def step() -> None:
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {name: training_step(model) for name, model in models.items()}
    with Progress(transient=True) as progress:
        task = progress.add_task(f"steps of {config.model.name}", total=NUM_WARMUP_ROUNDS + config.repeats)
        timings = time_interleaved(
            steps, config.repeats, device, lambda num_rounds: progress.update(task, completed=num_rounds)
        )
    arms = {}
    for name, model in models.items():
        num_parameters = sum(p.numel() for p in model.parameters())
        flops = flops_of(config, name.partition(",")[0], config.model, config.num_tokens)
        arms[name] = Arm(timings[name], num_parameters, 0, flops=flops)
    peak = measure_matmul_tflops(device, torch.float32 if precision == "fp32" else torch.bfloat16) * 1e12
    title = f"training step of {config.model.name}: {ids.shape[0]} rows of {ids.shape[1]} tokens"
    num_threads = torch.get_num_threads()
    return BenchResult(
        config, title, config.num_tokens, device, precision, num_threads, arms, base=names[0], peak_flops=peak
    )
