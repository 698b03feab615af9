"""LLaMA's rotary position embedding: `rope` is what modules call, `reference.rope` defines it.

Shapes: B sequences, H heads (of queries or of keys), T seq_len, D head_dim.
"""

from torch import Tensor

from lost_kernels.choice import is_triton
from lost_kernels.rope.op import rope_op
from lost_kernels.rope.reference import rope as reference_rope

__all__ = ["reference_rope", "rope"]


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """`reference.rope`, on CUDA by one operator that keeps nothing but cos and sin for the backward pass.

    Args:
        query: [B, H, T, D] in any layout with whole heads, such as [B, T, H, D] transposed.
        key: [B, H of keys, T, D]; likewise.
        cos: [B or 1, T, D], rows of D neighbours.
        sin: likewise.
        kernels: triton, auto (triton on CUDA), or reference and grouped: autograd of the definition. Where cos or sin
            has a gradient, always the definition.

    Returns:
        Rotated query and key in their dtypes, also under autocast; the operator keeps their layouts.

    Raises:
        RuntimeError: in a second derivative of the operator; the reference has one.

    Numerics: the operator computes in float32 or better and rounds once; deterministic.
    """
    if not is_triton(kernels, query) or cos.requires_grad or sin.requires_grad:
        return reference_rope(query, key, cos, sin)
    return rope_op(query, key, cos, sin, "triton")
