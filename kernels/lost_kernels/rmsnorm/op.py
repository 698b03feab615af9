"""`lost::rms_norm`: opaque to compilers and to recomputation; between forward and backward lie x, weight and rstd.

Shapes: M rows, D hidden_size.
"""

from typing import Any

import torch
from torch import Tensor

from lost_kernels.choice import computes_in_triton
from lost_kernels.rmsnorm import reference


@torch.library.custom_op("lost::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float, kernels: str) -> tuple[Tensor, Tensor]:
    """(`reference.rms_norm` [M, D], rstd [M] in float32 or better).

    Args:
        x: [M, D], contiguous.
        weight: [D].
        eps: added to the mean square.
        kernels: grouped (plain torch) or triton.
    """
    return _implementation(kernels, x).rms_norm_forward(x, weight, eps)


@rms_norm_op.register_fake
def _(x, weight, eps, kernels):  # noqa: ARG001
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("lost::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, kernels: str, needs_weight: bool
) -> list[Tensor]:
    """The gradient of x and, if it is needed, that of weight, in their dtypes."""
    dx, d_weight = _implementation(kernels, x).rms_norm_backward(dy, x, weight, rstd, needs_weight=needs_weight)
    return [dx] if d_weight is None else [dx, d_weight.to(weight.dtype)]


@rms_norm_backward_op.register_fake
def _(dy, x, weight, rstd, kernels, needs_weight):  # noqa: ARG001
    return [x.new_empty(x.shape)] + ([weight.new_empty(weight.shape)] if needs_weight else [])


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, ctx.kernels = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple:
    if dy is None:
        return None, None, None, None
    # The gradient of a sum is one number, expanded.
    dy = dy.contiguous()
    found = torch.ops.lost.rms_norm_backward(dy, *ctx.saved_tensors, ctx.kernels, ctx.needs_input_grad[1])
    return found[0], found[1] if ctx.needs_input_grad[1] else None, None, None


rms_norm_op.register_autograd(_backward, setup_context=_keep)


def _implementation(kernels: str, x: Tensor) -> Any:
    if not computes_in_triton(kernels, x):
        return reference
    from lost_kernels.rmsnorm import triton_impl

    return triton_impl if x.shape[1] <= triton_impl.MAX_WIDTH else reference
