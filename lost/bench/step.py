"""A whole training step (forward, backward, AdamW) of one architecture on random tokens, every arm with one loss."""

from collections.abc import Callable

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from lost.bench.arms import REFERENCE, bytes_of, chosen, compile_blocks, model_of, with_compiled, works_of_step
from lost.bench.fresh import random_ids
from lost.bench.machine import measure_machine
from lost.bench.peers import PEERS
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import NUM_WARMUP_ROUNDS, time_interleaved
from lost.bench.verify import autocast_of, verify_blocks, verify_loss
from lost.config.schema import BenchConfig
from lost.config.training import AdamWConfig
from lost.train.loss import model_loss_sum
from lost.train.optim import build_optimizer
from lost.train.runtime import pick_device, pick_precision, set_up_process
from lost.utils.errors import ConfigError


def bench_step(config: BenchConfig) -> BenchResult:
    """Times of training steps on num_tokens // seq_len rows of random tokens, with `recompute` for dense and LOST.

    Raises:
        ConfigError: num_tokens is no multiple of seq_len, or a row is longer than the model takes.
        TrainingError: the operators of a LOST layer or of the loss are wrong here.
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
    set_up_process(config.runtime)
    device = pick_device(config.runtime.device)
    precision = pick_precision(config.runtime.precision, device)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    usual = [f"dense {config.recompute}", REFERENCE, f"lost {config.recompute}"]
    names = chosen(config, usual, device, more=PEERS, has_levels=True)

    def make(name: str, is_compiled: bool) -> PreTrainedModel:
        net = model_of(config, name, config.model, device, dtype, is_compiled=is_compiled)
        if is_compiled:
            compile_blocks(net)
        return net

    models = with_compiled(config, make, names)
    ids = random_ids(config, device)
    verify_blocks([model.model.layers[0] for model in models.values()], precision)
    verify_loss(models[names[0]].lm_head, precision)
    autocast = autocast_of(precision, device)

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
        works = works_of_step(config, name, config.model, config.num_tokens, *bytes_of(precision))
        arms[name] = Arm(timings[name], num_parameters, 0, works=works)
    machine = measure_machine(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    title = f"training step of {config.model.name}: {ids.shape[0]} rows of {ids.shape[1]} tokens"
    num_threads = torch.get_num_threads()
    return BenchResult(
        config, title, config.num_tokens, device, precision, num_threads, arms, base=names[0], machine=machine
    )
