"""Decoding: one token after the other with a KV cache, dense against LOST, as `lost generate` does it."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lost.bench.result import Arm, BenchResult
from lost.bench.timing import time_interleaved
from lost.config.model import DenseConfig, ParameterizationConfig
from lost.config.schema import BenchConfig
from lost.model import empty_model
from lost.model.cache import roomy_cache
from lost.train.runtime import pick_device, pick_precision, set_up_process
from lost.utils.errors import ConfigError


def bench_generate(config: BenchConfig) -> BenchResult:
    """Times of `new_tokens` tokens for `num_prompts` prompts of seq_len tokens, whose cache is filled before.

    Raises:
        ConfigError: prompt and new tokens are longer than the model takes.
    """
    longest = config.model.max_position_embeddings
    if config.seq_len + config.new_tokens > longest:
        raise ConfigError(
            f"seq_len = {config.seq_len} + new_tokens = {config.new_tokens} are above model.max_position_embeddings"
            f" = {longest}: shorten them or raise it"
        )
    set_up_process(config.runtime)
    device = pick_device(config.runtime.device)
    precision = pick_precision(config.runtime.precision, device)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    forms = {"dense": DenseConfig(), "lost": config.parameterization}
    models = {name: random_model(config, form, device, dtype) for name, form in forms.items()}
    shape = (config.num_prompts, config.seq_len)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), autocast:
        calls = {name: decode(model, ids, config.new_tokens) for name, model in models.items()}
        timings = time_interleaved(calls, config.repeats, device)
    arms = {
        name: Arm(timings[name], sum(parameter.numel() for parameter in model.parameters()), 0)
        for name, model in models.items()
    }
    title = (
        f"decoding with {config.model.name}: {config.new_tokens} tokens after {config.seq_len}, batch"
        f" {config.num_prompts}"
    )
    num_tokens = config.num_prompts * config.new_tokens
    return BenchResult(config, title, num_tokens, device, precision, torch.get_num_threads(), arms)


@torch.no_grad()
def random_model(
    config: BenchConfig, form: ParameterizationConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A model with weights that only its speed depends on: nothing is factorised."""
    model = empty_model(config.model, form, device=device, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for name, buffer in model.named_buffers():
        if name.endswith("sparse_index"):
            # Kept channels lie anywhere in the input.
            width = buffer.numel()
            buffer.copy_(torch.linspace(0, config.model.hidden_size - 1, width, device=device).long())
    return model


def decode(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Callable[[], None]:
    """A function that goes on from the same filled cache each time, always with the likeliest token."""
    cache = roomy_cache(model)
    assert cache is not None
    first = likeliest(model(ids, past_key_values=cache, use_cache=True).logits)
    prompt_length = ids.shape[1]

    def call() -> None:
        grown = cache.get_seq_length() - prompt_length
        if grown:
            cache.crop(-grown)
        token = first
        for _ in range(new_tokens):
            token = likeliest(model(token, past_key_values=cache, use_cache=True).logits)

    return call


def likeliest(logits: Tensor) -> Tensor:
    """[n, T, V] to the next token of each row, [n, 1]."""
    return logits[:, -1].argmax(-1, keepdim=True)
