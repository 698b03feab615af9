"""The product inside LLaMA's MLP in plain PyTorch: the definition, and its backward pass written out."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, as transformers' LlamaMLP has it with hidden_act = silu; gate and up of one shape."""
    return F.silu(gate) * up


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up in their dtypes, computed in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)
    wide_dy, wide_gate = dy.to(dtype), gate.to(dtype)
    d_gate = torch.ops.aten.silu_backward(wide_dy * up, wide_gate)
    return d_gate.to(gate.dtype), (wide_dy * F.silu(wide_gate)).to(up.dtype)
