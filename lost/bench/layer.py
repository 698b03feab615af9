"""One linear layer, forward and backward: dense, the peers, LOST as its definition, as three products, as operators."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import cast

import torch
from lost_kernels.lost_linear import ACTIVATIONS
from torch import Tensor, nn

from lost.bench.arms import bytes_of, chosen, lost_names, parsed, with_compiled
from lost.bench.limits import Widths, layer_works, lost_widths
from lost.bench.machine import measure_machine
from lost.bench.peers import PEERS, padded, peer_layer
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import SavedBytes, time_interleaved
from lost.bench.verify import autocast_of, verify_layers
from lost.config.schema import BenchConfig
from lost.model.lost_linear import LostLinear
from lost.train.runtime import pick_device, pick_precision, set_up_process
from lost.utils.errors import ConfigError

THREE_PRODUCTS = "three products"


class ThreeProducts(nn.Module):
    """A LostLinear as the paper writes it, one product for each of A, B and W_s: what joining them is compared with."""

    def __init__(self, layer: LostLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        y = ACTIVATIONS[layer.activation](x @ layer.low_rank_down.T) @ layer.low_rank_up.T
        gamma = layer.gamma
        y = y if gamma is None else gamma * y
        if layer.sparse_weight is None or layer.sparse_index is None:
            return y
        sparse_y = x[:, layer.sparse_index] @ layer.sparse_weight.T
        return y + (sparse_y if gamma is None else (1 - gamma) * sparse_y)


def with_kernels(layer: LostLinear, kernels: str) -> LostLinear:
    """The same layer and weights, computed by another backend."""
    layer = copy(layer)
    layer.kernels = kernels
    return layer


def bench_layer(config: BenchConfig) -> BenchResult:
    """Times of forward and backward of one layer on `num_tokens` rows; the gradient of the input is computed too.

    Raises:
        ConfigError: settings that need module names, or selection_axis = rows.
        ShapeError: the rank is above min(in_features, out_features).
        TrainingError: the operators of a LOST layer are wrong here.
    """
    if config.parameterization.selection_axis == "rows":
        raise ConfigError("selection_axis = rows: the three products of this benchmark read columns; use what=step")
    set_up_process(config.runtime)
    device = pick_device(config.runtime.device)
    precision = pick_precision(config.runtime.precision, device)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    torch.manual_seed(0)
    sizes = padded(config.in_features), padded(config.out_features)
    dense = nn.Linear(*sizes, bias=False, device=device, dtype=dtype)
    linear = nn.Linear(config.in_features, config.out_features, bias=False, device=device, dtype=dtype)
    lost = LostLinear.from_linear(linear, replace(config.parameterization, lost_rank=config.lost_rank))
    shape = config.in_features, config.out_features, lost.lost_rank
    names = chosen(config, ["dense", *PEERS, THREE_PRODUCTS, *lost_names(device)], device)

    def make(name: str, is_compiled: bool) -> nn.Module:
        if name in PEERS:
            module = peer_layer(name, *shape, device=device, dtype=dtype)
        elif name == THREE_PRODUCTS:
            module = ThreeProducts(lost)
        else:
            module = dense if name == "dense" else with_kernels(lost, parsed(name).kernels or "auto")
        return cast(nn.Module, torch.compile(module)) if is_compiled else module

    modules = with_compiled(config, make, names)
    for kernels in {parsed(name).kernels or "auto" for name in names if parsed(name).form == "lost"}:
        verify_layers([with_kernels(lost, kernels)], precision)
    x_dense = torch.randn(config.num_tokens, sizes[0], device=device, dtype=dtype, requires_grad=True)
    x = x_dense.detach()[:, : config.in_features].contiguous().requires_grad_()
    d_y_dense = torch.randn(config.num_tokens, sizes[1], device=device)
    d_y = d_y_dense[:, : config.out_features].contiguous()
    autocast = autocast_of(precision, device)

    def input_of(name: str) -> tuple[Tensor, Tensor]:
        return (x_dense, d_y_dense) if name.startswith("dense") else (x, d_y)

    def forward(name: str) -> Tensor:
        with autocast:
            return modules[name](input_of(name)[0])

    def call(name: str) -> Callable[[], None]:
        given, gradient = input_of(name)
        inputs = [given, *modules[name].parameters()]

        def forward_and_backward() -> None:
            y = forward(name)
            torch.autograd.grad(y, inputs, gradient.to(y.dtype))

        return forward_and_backward

    timings = time_interleaved({name: call(name) for name in modules}, config.repeats, device)
    arms = {}
    for name, module in modules.items():
        with SavedBytes([input_of(name)[0], *module.parameters(), *module.buffers()]).counting() as saved:
            forward(name)
        kind = name.partition(",")[0]
        num_weights = sum(p.numel() for p in module.parameters())
        widths = Widths(*sizes)
        if kind in ("cola", "low_rank"):
            widths = Widths(*shape, lost.lost_rank)
        elif kind not in ("dense", "sltrain"):
            widths = lost_widths(*shape, lost.num_kept, lost.selection_axis)
        works = tuple(layer_works(widths, config.num_tokens, bytes_of(precision)[0]))
        arms[name] = Arm(timings[name], num_weights, saved.num_bytes, works=works)
    machine = measure_machine(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    title = (
        f"layer {config.in_features} -> {config.out_features}, rank {lost.lost_rank}, {lost.num_kept} kept,"
        f" {config.num_tokens} tokens, forward + backward"
    )
    num_threads = torch.get_num_threads()
    return BenchResult(config, title, config.num_tokens, device, precision, num_threads, arms, machine=machine)
