"""What `kernels` means for operators that are no matrix product: Triton kernels, or the plain expression."""

import torch
from torch import Tensor

from lost_kernels.lost_linear import kernels_for

# As runtime.kernels; grouped says nothing of these operators.
CHOICES = ("auto", "reference", "grouped", "triton")


def is_triton(kernels: str, values: Tensor) -> bool:
    """Whether `kernels` (one of CHOICES) asks for Triton kernels where `values` are."""
    if kernels not in CHOICES:
        raise ValueError(f"kernels = {kernels!r}: one of {', '.join(CHOICES)}")
    return (kernels_for(values.device.type) if kernels == "auto" else kernels) == "triton"


def computes_in_triton(kernels: str, values: Tensor) -> bool:
    """Whether an operator that was given grouped or triton runs Triton kernels: they compute in float32."""
    assert kernels in ("grouped", "triton"), kernels
    return kernels == "triton" and values.dtype != torch.float64
