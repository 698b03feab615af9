"""A whole training step (forward, backward, AdamW) of one architecture: dense against LOST, on random tokens."""

from collections.abc import Callable

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from lost.bench.fresh import random_ids
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import NUM_WARMUP_ROUNDS, SavedBytes, time_interleaved
from lost.config.model import DenseConfig
from lost.config.runtime import RuntimeConfig
from lost.config.schema import BenchConfig
from lost.config.training import AdamWConfig
from lost.model import build_model
from lost.train.optim import build_optimizer
from lost.train.runtime import pick_device, pick_precision, set_num_threads
from lost.train.wrap import set_recompute
from lost.utils.errors import ConfigError


def bench_step(config: BenchConfig) -> BenchResult:
    """Times of training steps on num_tokens // seq_len rows of random tokens, with the default recomputation.

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
    forms = {"dense": DenseConfig(), "lost": config.parameterization}
    models = {
        name: build_model(config.model, form, seed=0, device=device, dtype=dtype).train()
        for name, form in forms.items()
    }
    for model in models.values():
        set_recompute(model, RuntimeConfig().recompute)
    ids = random_ids(config, device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def loss_of(model: PreTrainedModel) -> torch.Tensor:
        with autocast:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

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
        with SavedBytes([*model.parameters(), *model.buffers(), ids]).counting() as saved:
            loss_of(model)
        arms[name] = Arm(timings[name], sum(p.numel() for p in model.parameters()), saved.num_bytes)
    title = f"training step of {config.model.name}: {ids.shape[0]} rows of {ids.shape[1]} tokens"
    return BenchResult(config, title, config.num_tokens, device, precision, torch.get_num_threads(), arms)
