"""LLaMA's RMSNorm: `rms_norm` is what modules call, `reference.rms_norm` defines it."""

from torch import Tensor

from lost_kernels.choice import is_triton
from lost_kernels.rmsnorm.op import rms_norm_op
from lost_kernels.rmsnorm.reference import rms_norm as reference_rms_norm

__all__ = ["reference_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: str = "auto") -> Tensor:
    """`reference.rms_norm`, on CUDA by one operator that keeps x, weight and a number a row for the backward pass.

    Args:
        x: [..., D]; copied where it is not contiguous.
        weight: [D].
        eps: added to the mean square.
        kernels: triton, auto (triton on CUDA), or reference and grouped: autograd of the definition.

    Returns:
        [..., D], in the dtype that those of x and weight have in common, also under autocast.

    Raises:
        RuntimeError: in a second derivative of the operator; the reference has one.

    Numerics: float32 or better inside, rounded to the dtype of x before the weight multiplies; deterministic.
    """
    if not is_triton(kernels, x):
        return reference_rms_norm(x, weight, eps)
    y, _ = rms_norm_op(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps, "triton")
    return y.view(x.shape)
