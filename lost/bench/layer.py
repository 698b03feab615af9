"""One linear layer, forward and backward: dense, LOST, LOST as three products."""

from collections.abc import Callable
from dataclasses import replace

import torch
from lost_kernels.lost_linear import ACTIVATIONS
from torch import Tensor, nn

from lost.bench.result import Arm, BenchResult
from lost.bench.timing import SavedBytes, time_interleaved
from lost.config.schema import BenchConfig
from lost.model.lost_linear import LostLinear
from lost.train.runtime import pick_device, pick_precision, set_num_threads
from lost.utils.errors import ConfigError


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


def bench_layer(config: BenchConfig) -> BenchResult:
    """Times of forward and backward of one layer on `num_tokens` rows; the gradient of the input is computed too.

    Raises:
        ConfigError: settings that need module names, or selection_axis = rows.
        ShapeError: the rank is above min(in_features, out_features).
    """
    if config.parameterization.selection_axis == "rows":
        raise ConfigError("selection_axis = rows: the three products of this benchmark read columns; use what=step")
    set_num_threads(config.runtime)
    device = pick_device(config.runtime.device)
    precision = pick_precision(config.runtime.precision, device)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    torch.manual_seed(0)
    dense = nn.Linear(config.in_features, config.out_features, bias=False, device=device, dtype=dtype)
    lost = LostLinear.from_linear(dense, replace(config.parameterization, lost_rank=config.lost_rank))
    modules = {"dense": dense, "lost": lost, "three products": ThreeProducts(lost)}
    x = torch.randn(config.num_tokens, config.in_features, device=device, dtype=dtype, requires_grad=True)
    d_y = torch.randn(config.num_tokens, config.out_features, device=device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def forward(module: nn.Module) -> Tensor:
        with autocast:
            return module(x)

    def call(module: nn.Module) -> Callable[[], None]:
        inputs = [x, *module.parameters()]

        def forward_and_backward() -> None:
            y = forward(module)
            torch.autograd.grad(y, inputs, d_y.to(y.dtype))

        return forward_and_backward

    timings = time_interleaved({name: call(module) for name, module in modules.items()}, config.repeats, device)
    arms = {}
    for name, module in modules.items():
        with SavedBytes([x, *module.parameters(), *module.buffers()]).counting() as saved:
            forward(module)
        arms[name] = Arm(timings[name], sum(p.numel() for p in module.parameters()), saved.num_bytes)
    title = (
        f"layer {config.in_features} -> {config.out_features}, rank {lost.lost_rank}, {lost.num_kept} kept,"
        f" {config.num_tokens} tokens, forward + backward"
    )
    return BenchResult(config, title, config.num_tokens, device, precision, torch.get_num_threads(), arms)
