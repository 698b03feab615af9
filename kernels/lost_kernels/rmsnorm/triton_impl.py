"""RMSNorm by Triton kernels: `rms_norm_forward` and `rms_norm_backward` of `reference`.

Shapes: M rows, D hidden_size.
"""

import torch
import triton
from torch import Tensor

from lost_kernels.lost_linear.triton_impl import Tile
from lost_kernels.rmsnorm import triton_kernels

# Programs of the backward pass, each with a row of partial sums for the weight: about what one H200 or A100 holds at
# once with the registers of ahead-of-time compiles; no time on a GPU has been measured. Not the device's number of
# multiprocessors, so that sums do not depend on it.
MAX_PROGRAMS = 512
# 16 values of every tensor for each of the 1,024 threads that a program can have.
MAX_WIDTH = 16384


def tile_for(width: int) -> Tile:
    """Whole rows, 8 values of 2 bytes for every thread, which is one vector of 16 bytes: 16 in the widest rows."""
    columns = max(16, 1 << (width - 1).bit_length())
    rows = max(1, 1024 // columns)
    return Tile(rows, columns, min(1024, rows * columns // 8))


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y [M, D], rstd float32 [M]) of x, [M, D] contiguous."""
    _check(x, weight)
    num_rows, width = x.shape
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    tile = tile_for(width)
    if num_rows:
        with torch.cuda.device_of(x):
            triton_kernels.rms_norm_forward[(triton.cdiv(num_rows, tile.rows),)](
                x,
                weight,
                y,
                rstd,
                num_rows,
                eps,
                WIDTH=width,
                BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=tile.columns,
                num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
            )
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx [M, D], d_weight float32 [D] if it is needed); deterministic."""
    _check(x, weight)
    _check(dy, weight)
    num_rows, width = x.shape
    tile = tile_for(width)
    num_programs = min(MAX_PROGRAMS, -(-num_rows // tile.rows))
    dx = x.new_empty(x.shape)
    d_weight = x.new_empty(num_programs, width, dtype=torch.float32) if needs_weight else None
    if num_rows:
        with torch.cuda.device_of(x):
            triton_kernels.rms_norm_backward[(num_programs,)](
                dy,
                x,
                weight,
                rstd,
                dx,
                d_weight,
                num_rows,
                WIDTH=width,
                NEEDS_WEIGHT=needs_weight,
                BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=tile.columns,
                num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
            )
    return dx, None if d_weight is None else d_weight.sum(0)


def _check(x: Tensor, weight: Tensor) -> None:
    assert x.dim() == 2, x.shape
    assert x.is_contiguous(), x.stride()
    assert weight.shape == x.shape[1:], (weight.shape, x.shape)
    assert weight.is_contiguous()
    assert weight.device == x.device
