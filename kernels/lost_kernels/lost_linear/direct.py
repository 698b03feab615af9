"""A group of LOST layers as one autograd.Function: what `op` computes, without the cost of calling an operator.

An operator that takes lists of tensors costs Python 1 to 2 ms, forward and backward (torch 2.13), twice this.
Compilers, recomputation and whoever counts operators need the operators all the same.
"""

from typing import Any

import torch
from torch import Tensor

from lost_kernels.lost_linear import group
from lost_kernels.lost_linear.layout import known_parts_of


def call_directly(
    x: Tensor,
    downs: list[Tensor],
    indices: list[Tensor],
    ups: list[Tensor],
    sparse_weights: list[Tensor],
    learned_gammas: list[Tensor],
    biases: list[Tensor],
    num_kept: list[int],
    fixed_gammas: list[float],
    activation: str,
    kernels: str,
) -> tuple[Tensor, ...]:
    """y_g, [M, N_g], of every member: `group.down` and `group.up`, whose arguments these are, with gradients.

    Under autocast x enters in autocast's dtype, as for the operators.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    lists = [downs, indices, ups, sparse_weights, learned_gammas, biases]
    counts = [len(tensors) for tensors in lists]
    settings = num_kept, fixed_gammas, activation, kernels
    return _Group.apply(counts, settings, x, *[tensor for tensors in lists for tensor in tensors])  # pyright: ignore


def operators_are_seen() -> bool:
    """Whether someone looks at the operators that are called, or changes what they do: then they must be called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: list[int], settings: tuple, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        downs, indices, *parameters = group.split(tensors, counts)
        h, kept = group.down(x, downs, indices, settings[-1])
        ctx.save_for_backward(x, h, kept, *tensors)
        ctx.counts, ctx.settings = counts, settings
        arguments: list[Any] = [*parameters, *settings]
        return tuple(group.up(h, kept, *arguments))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h, kept, *tensors = ctx.saved_tensors
        downs, indices, *parameters = group.split(tensors, ctx.counts)
        needs_x = ctx.needs_input_grad[2]
        needs_downs, _, *needs = group.split(ctx.needs_input_grad[3:], ctx.counts)
        parts, kernels = known_parts_of(parameters[0], ctx.settings[0]), ctx.settings[-1]
        needs_h = needs_x or any(needs_downs)
        arguments: list[Any] = [*parameters[:3], *ctx.settings]
        wanted = needs_h, any(needs[2]), any(needs[0]) or any(needs[1])
        found = group.up_backward(list(dys), h, kept, *arguments, *wanted)  # pyright: ignore[reportCallIssue]
        dh, dkept, gradients = group.up_gradients(found, dys, parameters, parts, needs_h, needs)
        d_x, d_downs = None, [None] * len(downs)
        if dh is not None and dkept is not None:
            found = group.down_backward(dh, dkept, x, downs, indices, kernels, needs_x, any(needs_downs))
            d_x, d_downs = group.down_gradients(found, downs, needs_x, needs_downs)
        lists = [d_downs, [None] * len(indices), *gradients]
        return None, None, d_x, *[gradient for own in lists for gradient in own]
