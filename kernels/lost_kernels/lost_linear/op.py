"""The two operators of a group of LOST layers that read one x: `lost::group_down` and `lost::group_up`.

Opaque to compilers and to recomputation: what lies between forward and backward is x, h and the kept columns
(`lost_kernels.lost_linear.group`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lost_kernels.lost_linear import group
from lost_kernels.lost_linear.layout import parts_of

group_down = torch.library.custom_op("lost::group_down", group.down, mutates_args=())
group_down_backward = torch.library.custom_op("lost::group_down_backward", group.down_backward, mutates_args=())
group_up = torch.library.custom_op("lost::group_up", group.up, mutates_args=())
group_up_backward = torch.library.custom_op("lost::group_up_backward", group.up_backward, mutates_args=())


@group_down.register_fake
def _(x, downs, indices, kernels):  # noqa: ARG001
    return x.new_empty(x.shape[0], _total_rank(downs)), x.new_empty(x.shape[0], _total_kept(indices))


@group_down_backward.register_fake
def _(dh, dkept, x, downs, indices, kernels, needs_x, needs_downs):  # noqa: ARG001
    d_x = [x.new_empty(x.shape)] if needs_x else []
    return d_x + ([x.new_empty(_total_rank(downs), x.shape[1])] if needs_downs else [])


def _keep_down(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ARG001
    x, downs, indices, kernels = inputs
    ctx.save_for_backward(x, *downs, *indices)
    ctx.num_downs, ctx.kernels = len(downs), kernels


def _down_backward(ctx: Any, dh: Tensor, dkept: Tensor) -> tuple:
    x, *others = ctx.saved_tensors
    downs, indices = others[: ctx.num_downs], others[ctx.num_downs :]
    needs_x, needs_downs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    found = torch.ops.lost.group_down_backward(dh, dkept, x, downs, indices, ctx.kernels, needs_x, any(needs_downs))
    return *group.down_gradients(found, downs, needs_x, needs_downs), [None] * len(indices), None


group_down.register_autograd(_down_backward, setup_context=_keep_down)


@group_up.register_fake
def _(h, kept, ups, sparse_weights, learned_gammas, biases, num_kept, fixed_gammas, activation, kernels):  # noqa: ARG001
    return [h.new_empty(h.shape[0], up.shape[0]) for up in ups]


@group_up_backward.register_fake
def _(
    dys,
    h,
    kept,
    ups,
    sparse_weights,  # noqa: ARG001
    learned_gammas,
    num_kept,
    fixed_gammas,  # noqa: ARG001
    activation,  # noqa: ARG001
    kernels,  # noqa: ARG001
    needs_h,
    needs_gammas,
    needs_weights,
):
    found = [h.new_empty(h.shape), kept.new_empty(kept.shape)] if needs_h else []
    if needs_gammas:
        found.append(h.new_empty(len(learned_gammas), dtype=torch.promote_types(h.dtype, torch.float32)))
    if needs_weights:
        parts = parts_of(ups, num_kept)
        found += [h.new_empty(dy.shape[1], part.width) for dy, part in zip(dys, parts, strict=True)]
    return found


def _keep_up(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:  # noqa: ARG001
    h, kept, ups, sparse_weights, learned_gammas, biases, *ctx.settings = inputs
    ctx.counts = [len(ups), len(sparse_weights), len(learned_gammas), len(biases)]
    ctx.save_for_backward(h, kept, *ups, *sparse_weights, *learned_gammas, *biases)


def _up_backward(ctx: Any, dys: list[Tensor]) -> tuple:
    h, kept, *others = ctx.saved_tensors
    parameters = group.split(others, ctx.counts)
    needs_h, needs = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2:6]
    needs_gammas, needs_weights = any(needs[2]), any(needs[0]) or any(needs[1])
    found = torch.ops.lost.group_up_backward(
        dys, h, kept, *parameters[:3], *ctx.settings, needs_h, needs_gammas, needs_weights
    )
    num_kept, fixed_gammas = ctx.settings[:2]
    parts = parts_of(parameters[0], num_kept)
    dh, dkept, gradients = group.up_gradients(found, dys, parameters, parts, needs_h, needs)
    # Of num_kept and fixed_gammas, which are lists too: an empty one counts as a list of no tensors.
    return dh, dkept, *gradients, None, None if fixed_gammas else [], None, None


group_up.register_autograd(_up_backward, setup_context=_keep_up)


def _total_rank(downs: list[Tensor]) -> int:
    return sum(down.shape[0] for down in downs)


def _total_kept(indices: list[Tensor]) -> int:
    return sum(index.shape[0] for index in indices)


# ------------------------------------------------------------------------------------------------------- autocast


def _register_autocast(name: str, num_cast: int) -> None:
    """Under autocast the first `num_cast` inputs enter in autocast's dtype, as those of nn.Linear do.

    torch's own register_autocast would round gamma too, and keep a cast copy of every weight until the backward pass;
    weights are cast inside the operators.
    """
    op = getattr(torch.ops.lost, name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def cast_and_call(*inputs, device_type=device_type):
            dtype = torch.get_autocast_dtype(device_type)
            cast = [value if value.dtype == torch.float64 else value.to(dtype) for value in inputs[:num_cast]]
            with torch.autocast(device_type, enabled=False):
                return op(*cast, *inputs[num_cast:])

        _LIBRARY.impl(name, cast_and_call, key)


_LIBRARY = torch.library.Library("lost", "FRAGMENT")
_register_autocast("group_down", 1)
_register_autocast("group_up", 2)

# --------------------------------------------------------------------------------------- floating-point operations


@register_flop_formula(torch.ops.lost.group_down)
def _down_flops(x, downs, indices, kernels, **_: Any) -> int:  # noqa: ARG001
    return 2 * x[0] * x[1] * sum(down[0] for down in downs)


@register_flop_formula(torch.ops.lost.group_down_backward)
def _down_backward_flops(dh, dkept, x, downs, indices, kernels, needs_x, needs_downs, **_: Any) -> int:  # noqa: ARG001
    return (needs_x + needs_downs) * _down_flops(x, downs, indices, kernels)


@register_flop_formula(torch.ops.lost.group_up)
def _up_flops(h, kept, ups, sparse_weights, *_: Any, **__: Any) -> int:  # noqa: ARG001
    """The zeros that align the products are no work."""
    return 2 * h[0] * sum(weight[0] * weight[1] for weight in [*ups, *sparse_weights])


@register_flop_formula(torch.ops.lost.group_up_backward)
def _up_backward_flops(dys, h, kept, ups, sparse_weights, *others: Any, **_: Any) -> int:  # noqa: ARG001
    needs_h, needs_gammas, needs_weights = others[-3:]
    return ((needs_h or needs_gammas) + needs_weights) * _up_flops(h, kept, ups, sparse_weights)
