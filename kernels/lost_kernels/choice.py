"""What `kernels` means: on which devices, and for what is no matrix product: Triton kernels, or plain torch."""

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None

# As runtime.kernels; grouped says nothing of these operators.
CHOICES = ("auto", "reference", "grouped", "triton")


def kernels_for(device_type: str) -> str:
    """What `auto` means for tensors on a device of that type: triton on CUDA (ROCm too) where it is installed."""
    return "triton" if device_type == "cuda" and HAS_TRITON else "grouped"


def is_triton(kernels: str, values: Tensor) -> bool:
    """Whether `kernels` (one of CHOICES) asks for Triton kernels where `values` are."""
    if kernels not in CHOICES:
        raise ValueError(f"kernels = {kernels!r}: one of {', '.join(CHOICES)}")
    return (kernels_for(values.device.type) if kernels == "auto" else kernels) == "triton"


def computes_in_triton(kernels: str, values: Tensor) -> bool:
    """Whether an operator that was given grouped or triton runs Triton kernels: they compute in float32."""
    assert kernels in ("grouped", "triton"), kernels
    return kernels == "triton" and values.dtype != torch.float64
