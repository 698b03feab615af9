"""The product inside LLaMA's MLP: `swiglu` is what modules call, `reference.swiglu` defines it."""

from torch import Tensor

from lost_kernels.choice import is_triton
from lost_kernels.swiglu.op import swiglu_op
from lost_kernels.swiglu.reference import swiglu as reference_swiglu

__all__ = ["reference_swiglu", "swiglu"]


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """silu(gate) * up, on CUDA by one operator that keeps gate and up for the backward pass and no silu(gate).

    Args:
        gate: any shape; copied where it is not contiguous.
        up: of that shape; likewise.
        kernels: triton, auto (triton on CUDA), or reference and grouped: autograd of the definition.

    Returns:
        The same shape, in the dtype that those of gate and up have in common, also under autocast.

    Raises:
        RuntimeError: in a second derivative of the operator; the reference has one.

    Numerics: forward as transformers, silu(gate) rounded before it multiplies; backward in float32, rounded once.
    """
    if not is_triton(kernels, gate):
        return reference_swiglu(gate, up)
    return swiglu_op(gate.contiguous(), up.contiguous(), "triton")
