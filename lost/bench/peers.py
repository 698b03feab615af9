"""Layers of the methods that LOST is compared with, as plain as their papers write them: for timing only.

Shapes: M rows, K in_features, N out_features, R rank.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Share of the entries of W that SLTrain trains besides its factors; its paper's value.
SLTRAIN_DENSITY = 0.03
WIDTH_MULTIPLE = 16


def padded(width: int) -> int:
    """The width that a dense layer gets where LOST pads inside."""
    return width + -width % WIDTH_MULTIPLE


class LowRank(nn.Module):
    """y = act(x A^T) B^T: CoLA with SiLU, a plain low-rank layer without."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, has_activation: bool, **factory: Any):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, in_features, **factory) / math.sqrt(in_features))
        self.up = nn.Parameter(torch.randn(out_features, rank, **factory) / math.sqrt(rank))
        self.has_activation = has_activation

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.down)
        return F.linear(F.silu(h) if self.has_activation else h, self.up)


class SLTrain(nn.Module):
    """y = x (B A + S)^T with the entries of S at random fixed places: W is made whole in forward and backward."""

    def __init__(self, in_features: int, out_features: int, rank: int, **factory: Any):
        super().__init__()
        num_entries = int(SLTRAIN_DENSITY * in_features * out_features)
        places = torch.randperm(in_features * out_features)[:num_entries].sort().values
        self.down = nn.Parameter(torch.randn(rank, in_features, **factory) / math.sqrt(in_features))
        self.up = nn.Parameter(torch.randn(out_features, rank, **factory) / math.sqrt(rank))
        self.values = nn.Parameter(torch.zeros(num_entries, **factory))
        self.register_buffer("places", places.to(factory.get("device")))

    def forward(self, x: Tensor) -> Tensor:
        return SLTrainFunction.apply(x, self.down, self.up, self.values, self.places)


class SLTrainFunction(torch.autograd.Function):
    """Keeps x and the parameters; makes W again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(x, down, up, values, places)
        return x @ whole_weight(down, up, values, places).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, down, up, values, places = ctx.saved_tensors
        dy = dy.to(x.dtype)
        d_x = dy @ whole_weight(down, up, values, places).to(x.dtype)
        d_weight = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(down.dtype)
        return d_x, up.T @ d_weight, d_weight @ down.T, d_weight.view(-1)[places], None


def whole_weight(down: Tensor, up: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """B A + S, [N, K]."""
    weight = up @ down
    weight.view(-1).index_add_(0, places, values.to(weight.dtype))
    return weight


PEERS = ("cola", "sltrain", "low_rank")


def peer_layer(name: str, in_features: int, out_features: int, rank: int, **factory: Any) -> nn.Module:
    """The layer of one of PEERS with random weights."""
    if name == "sltrain":
        return SLTrain(in_features, out_features, rank, **factory)
    return LowRank(in_features, out_features, rank, has_activation=name == "cola", **factory)


def swap_linears(module: nn.Module, name: str, rank: int) -> None:
    """Puts the peer's layer in the place of every nn.Linear of `module` but lm_head."""
    for path, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and not path.endswith("lm_head"):
            parent, _, own = path.rpartition(".")
            factory = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            layer = peer_layer(name, linear.in_features, linear.out_features, rank, **factory)
            setattr(module.get_submodule(parent), own, layer)
