"""silu(gate) * up by Triton kernels: `swiglu` and `swiglu_backward` of `reference`."""

import torch
import triton
from torch import Tensor

from lost_kernels.lost_linear.triton_impl import Tile
from lost_kernels.swiglu import triton_kernels

# 8 values of 2 bytes for every thread: one vector of 16 bytes. No time on a GPU has been measured.
TILE = Tile(rows=1, columns=1024)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both contiguous and of one shape."""
    _check(gate, up)
    y = gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))
    if y.numel():
        with torch.cuda.device_of(gate):
            triton_kernels.swiglu_forward[(triton.cdiv(y.numel(), TILE.columns),)](
                gate,
                up,
                y,
                y.numel(),
                BLOCK=TILE.columns,
                num_warps=TILE.num_warps,  # pyright: ignore[reportCallIssue]
            )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; all contiguous."""
    _check(dy, gate, up)
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if dy.numel():
        with torch.cuda.device_of(dy):
            triton_kernels.swiglu_backward[(triton.cdiv(dy.numel(), TILE.columns),)](
                dy,
                gate,
                up,
                d_gate,
                d_up,
                dy.numel(),
                BLOCK=TILE.columns,
                num_warps=TILE.num_warps,  # pyright: ignore[reportCallIssue]
            )
    return d_gate, d_up


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.shape == tensors[0].shape, [each.shape for each in tensors]
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.device == tensors[0].device
