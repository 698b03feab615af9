"""`lost::swiglu`: opaque to compilers and to recomputation; between forward and backward lie gate and up."""

from typing import Any

import torch
from torch import Tensor

from lost_kernels.choice import computes_in_triton
from lost_kernels.swiglu import reference


@torch.library.custom_op("lost::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor, kernels: str) -> Tensor:
    """`reference.swiglu` of contiguous tensors of one shape; kernels: grouped (plain torch) or triton."""
    return _implementation(kernels, gate).swiglu(gate, up)


@swiglu_op.register_fake
def _(gate, up, kernels):  # noqa: ARG001
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@torch.library.custom_op("lost::swiglu_backward", mutates_args=())
def swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up in their dtypes."""
    return _implementation(kernels, gate).swiglu_backward(dy, gate, up)


@swiglu_backward_op.register_fake
def _(dy, gate, up, kernels):  # noqa: ARG001
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001
    gate, up, ctx.kernels = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    # The gradient of a sum is one number, expanded.
    d_gate, d_up = torch.ops.lost.swiglu_backward(dy.contiguous(), *ctx.saved_tensors, ctx.kernels)
    return d_gate, d_up, None


swiglu_op.register_autograd(_backward, setup_context=_keep)


def _implementation(kernels: str, gate: Tensor) -> Any:
    if not computes_in_triton(kernels, gate):
        return reference
    from lost_kernels.swiglu import triton_impl

    return triton_impl
