"""What the benchmarks of layer, block, step and memory share: the names of their arms, their models, their limits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from lost.bench.limits import Work, block_works, step_works
from lost.bench.peers import PEERS, padded, swap_linears
from lost.config.model import DenseConfig, ModelConfig, ParameterizationConfig
from lost.config.schema import BenchConfig
from lost.model import build_model
from lost.train.runtime import pick_kernels
from lost.train.wrap import set_kernels, set_recompute
from lost.utils.errors import ConfigError

REFERENCE = "lost reference"
LEVELS = ("none", "p0", "p1", "p2", "p3", "block")
# Values of runtime.kernels; without one of them an arm is computed as auto chooses for the device.
BACKENDS = ("reference", "grouped", "triton")


class Words(NamedTuple):
    """What the words of an arm's name say; empty: as by default."""

    form: str
    kernels: str
    level: str


def parsed(name: str) -> Words:
    """`lost [backend] [level]`, `dense [level]` or another name, without ', compiled'."""
    form, *words = name.partition(",")[0].split(" ")
    kernels = next((word for word in words if word in BACKENDS), "")
    level = next((word for word in words if word in LEVELS), "")
    return Words(form, kernels, level)


def lost_names(device: torch.device) -> list[str]:
    """One arm for the definition and one for each backend that this device has besides that of auto; last auto's."""
    auto, _ = pick_kernels("auto", device)
    others = ["lost grouped"] if auto != "grouped" else []
    return [REFERENCE, *others, "lost"]


def chosen(
    config: BenchConfig,
    names: list[str],
    device: torch.device,
    *,
    more: Sequence[str] = (),
    has_levels: bool = False,
) -> list[str]:
    """`names`, or those that `arms` asks for after the first, which the others are compared with.

    Args:
        more: names that can be asked for and are not usual.
        has_levels: 'dense <level>', 'lost <level>' and 'lost <backend> <level>' are arms too.

    Raises:
        ConfigError: an arm that there is not, or a backend that the device has not.
    """
    known = {*names, *more, "lost", *[f"lost {backend}" for backend in BACKENDS]}
    if has_levels:
        forms = ["dense", "lost", *[f"lost {backend}" for backend in BACKENDS]]
        known |= {*forms, *[f"{form} {level}" for form in forms for level in LEVELS]}
    unknown = [arm for arm in config.arms if arm not in known]
    if unknown:
        backends = ", ".join(BACKENDS)
        raise ConfigError(
            f"arms = {unknown}: what={config.what} has {', '.join([*names, *more])}, lost with one of {backends}"
            + has_levels * ", and after dense or lost a level: none, p0 to p3, block"
        )
    for arm in config.arms:
        pick_kernels(parsed(arm).kernels or "auto", device)
    return [names[0], *[arm for arm in config.arms if arm != names[0]]] if config.arms else names


def model_of(
    config: BenchConfig,
    name: str,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_compiled: bool = False,
):
    """A model in training in the form of the arm: dense, one of PEERS or LOST, with its backend and its level.

    Args:
        is_compiled: its blocks will be compiled by the caller.
    """
    arm = parsed(name)
    if arm.form == "lost":
        net = build_model(model, config.parameterization, seed=0, device=device, dtype=dtype)
        set_kernels(net, arm.kernels or "auto")
    else:
        net = build_model(dense_sizes(model), DenseConfig(), seed=0, device=device, dtype=dtype)
        if arm.form in PEERS:
            swap_linears(net, arm.form, model.lineage_rank)
    if arm.level:
        set_recompute(net, arm.level, is_traced=is_compiled)
    return net.train()


def dense_sizes(model: ModelConfig) -> ModelConfig:
    """The sizes of the dense arm, padded where LOST pads inside."""
    return replace(model, intermediate_size=padded(model.intermediate_size))


def works_of_block(config: BenchConfig, name: str, model: ModelConfig, num_tokens: int, value_bytes: int):
    """Kernels of one block of the arm, forward and backward; SLTrain's are those of a dense block."""
    sizes, form, rank = _form_of(config, name, model)
    return tuple(block_works(sizes, form, num_tokens, config.seq_len, value_bytes, rank))


def works_of_step(
    config: BenchConfig, name: str, model: ModelConfig, num_tokens: int, value_bytes: int, state_bytes: int
) -> tuple[Work, ...]:
    """Kernels of a training step of the arm."""
    sizes, form, rank = _form_of(config, name, model)
    return tuple(step_works(sizes, form, num_tokens, config.seq_len, value_bytes, state_bytes, rank))


def _form_of(config: BenchConfig, name: str, model: ModelConfig) -> tuple[ModelConfig, ParameterizationConfig, int]:
    form = parsed(name).form
    if form == "lost":
        return model, config.parameterization, 0
    return dense_sizes(model), DenseConfig(), model.lineage_rank if form in ("cola", "low_rank") else 0


def bytes_of(precision: str) -> tuple[int, int]:
    """Of an activation, and of a weight, its gradient and a moment."""
    return 4 if precision == "fp32" else 2, 2 if precision == "pure_bf16" else 4


def compile_blocks(net: PreTrainedModel) -> None:
    for block in net.model.layers:
        block.compile()


def with_compiled(config: BenchConfig, make: Callable[[str, bool], nn.Module], names: list[str]) -> dict:
    """Every arm by name, and compiled if the config asks for that."""
    modules = {name: make(name, False) for name in names}
    if config.compiled:
        modules |= {f"{name}, compiled": make(name, True) for name in names}
    return modules
