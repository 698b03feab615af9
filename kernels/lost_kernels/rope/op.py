"""`lost::rope`: opaque to compilers and to recomputation; between forward and backward lie cos and sin alone.

Not in place, as others have it: a policy of recomputation may keep the query that goes in, and rotating what it kept
would rotate it twice in the repetition. Shapes: B sequences, H heads, T seq_len, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor

from lost_kernels.choice import computes_in_triton
from lost_kernels.rope import reference


@torch.library.custom_op("lost::rope", mutates_args=())
def rope_op(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """`reference.rope`, laid out as query and key; kernels: grouped (plain torch) or triton."""
    found = _empty_like(query), _empty_like(key)
    _implementation(kernels, query).rotate_into(*found, query, key, cos, sin, is_backward=False)
    return found


@rope_op.register_fake
def _(query, key, cos, sin, kernels):  # noqa: ARG001
    return _empty_like(query), _empty_like(key)


@torch.library.custom_op("lost::rope_backward", mutates_args=())
def rope_backward_op(d_query: Tensor, d_key: Tensor, cos: Tensor, sin: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """The gradients before the rotation, laid out as d_query and d_key."""
    found = _empty_like(d_query), _empty_like(d_key)
    _implementation(kernels, d_query).rotate_into(*found, d_query, d_key, cos, sin, is_backward=True)
    return found


@rope_backward_op.register_fake
def _(d_query, d_key, cos, sin, kernels):  # noqa: ARG001
    return _empty_like(d_query), _empty_like(d_key)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ARG001
    _, _, cos, sin, ctx.kernels = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple:
    d_query, d_key = torch.ops.lost.rope_backward(d_query, d_key, *ctx.saved_tensors, ctx.kernels)
    return d_query, d_key, None, None, None


rope_op.register_autograd(_backward, setup_context=_keep)


def _empty_like(x: Tensor) -> Tensor:
    """Laid out as x, or [B, H, T, D] if its heads lie in pieces: a product with a transposed key has such gradients."""
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


def _implementation(kernels: str, query: Tensor) -> Any:
    if not computes_in_triton(kernels, query):
        return reference
    from lost_kernels.rope import triton_impl

    return triton_impl
