"""What the benchmarks of layer, block, step and memory share: their arms, a check before timing, FLOPs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from lost_kernels.lost_linear import reference_lost_linear
from torch import Tensor, nn
from transformers import PreTrainedModel

from lost.accounting import forward_flops
from lost.accounting.flops import FORWARD_AND_BACKWARD
from lost.accounting.shapes import block_linears
from lost.bench.peers import PEERS, padded, peer_flops, swap_linears
from lost.config.model import DenseConfig, ModelConfig
from lost.config.schema import BenchConfig
from lost.model import build_model
from lost.model.lost_linear import LostLinear
from lost.train.wrap import set_kernels, set_recompute
from lost.utils.errors import ConfigError, TrainingError

REFERENCE = "lost reference"
LEVELS = ("none", "p0", "p1", "p2", "p3", "block")
# Relative RMS error of operators against the definition; the tests are stricter (lost.testing.numerics).
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def chosen(config: BenchConfig, names: list[str], *, has_levels: bool = False) -> list[str]:
    """`names`, or those that `arms` asks for after the first, which the others are compared with.

    Args:
        has_levels: 'dense <level>' and 'lost <level>' are arms too.

    Raises:
        ConfigError: an arm that there is not.
    """
    levels = [f"{form} {level}" for form in ("dense", "lost") for level in LEVELS] if has_levels else []
    unknown = [arm for arm in config.arms if arm not in (*names, *levels)]
    if unknown:
        raise ConfigError(
            f"arms = {unknown}: what={config.what} has {', '.join(names)}" + has_levels * ", and dense or lost p0 to p3"
        )
    return [names[0], *[arm for arm in config.arms if arm != names[0]]] if config.arms else names


def check_operators(layer: LostLinear, x: Tensor) -> None:
    """Nothing wrong is timed.

    Raises:
        TrainingError: output or a gradient of the layer is not what the definition gives.
    """
    parameters = [x, *layer.parameters()]
    outputs = layer(x), reference_lost_linear(x, *layer.weights[:5], layer.activation, layer.bias)
    ours, exact = ([y, *torch.autograd.grad(y.float().square().sum(), parameters)] for y in outputs)
    for value, right in zip(ours, exact, strict=True):
        error = ((value - right).float().norm() / right.float().norm()).item()
        if not error <= LARGEST_ERROR[x.dtype]:
            raise TrainingError(
                f"the operators of a LOST layer are off by {error:.1e} of the definition's values (limit"
                f" {LARGEST_ERROR[x.dtype]:.0e}): nothing was timed; run the tests, tests/numerics"
            )


def model_of(config: BenchConfig, arm: str, model: ModelConfig, device: torch.device, dtype: torch.dtype):
    """A model in training in the form of the arm: dense, one of PEERS, 'lost reference' or 'lost'.

    Words after the first of dense and lost are a level of recomputation.
    """
    name, _, level = arm.partition(" ")
    if name == "lost":
        net = build_model(model, config.parameterization, seed=0, device=device, dtype=dtype)
        if arm == REFERENCE:
            set_kernels(net, "reference")
    else:
        net = build_model(dense_sizes(model), DenseConfig(), seed=0, device=device, dtype=dtype)
        if name in PEERS:
            swap_linears(net, name, model.lineage_rank)
    if level and arm != REFERENCE:
        set_recompute(net, level)
    return net.train()


def dense_sizes(model: ModelConfig) -> ModelConfig:
    """The sizes of the dense arm, padded where LOST pads inside."""
    return replace(model, intermediate_size=padded(model.intermediate_size))


def flops_of(config: BenchConfig, arm: str, model: ModelConfig, num_tokens: int) -> float:
    """FLOPs of forward and backward of the products of `num_tokens` tokens, without what is computed again."""
    name = arm.partition(" ")[0]
    form = config.parameterization if name == "lost" else DenseConfig()
    sizes = model if name == "lost" else dense_sizes(model)
    flops = forward_flops(sizes, form, config.seq_len)
    linears = FORWARD_AND_BACKWARD * flops.linears * num_tokens
    if name in PEERS:
        linears = model.num_hidden_layers * sum(
            peer_flops(name, linear.in_features, linear.out_features, model.lineage_rank, num_tokens)
            for linear in block_linears(sizes, 0)
        )
    return linears + FORWARD_AND_BACKWARD * (flops.attention + flops.head) * num_tokens


def compile_blocks(net: PreTrainedModel) -> None:
    for block in net.model.layers:
        block.compile()


def with_compiled(config: BenchConfig, make: Callable[[str, bool], nn.Module], names: list[str]) -> dict:
    """Every arm by name, and compiled if the config asks for that."""
    modules = {name: make(name, False) for name in names}
    if config.compiled:
        modules |= {f"{name}, compiled": make(name, True) for name in names}
    return modules
