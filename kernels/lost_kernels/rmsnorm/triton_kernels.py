"""Triton kernels of RMSNorm, bound by memory; a program has whole rows. Shapes: M rows, D hidden_size.

Everything is contiguous. Arithmetic is float32; the normed values are rounded to the dtype of x before the weight
multiplies them.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_forward(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """y, [M, D], and rstd, [M]. Grid (M / BLOCK_ROWS)."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    has_column = columns < WIDTH
    is_there = (rows < num_rows)[:, None] & has_column
    places = rows[:, None] * WIDTH + columns
    x = tl.load(x_ptr + places, mask=is_there, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    normed = (x * rstd[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=has_column, other=0.0).to(tl.float32)
    y = (weight * normed).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + places, y, mask=is_there)


@triton.jit
def rms_norm_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    d_weight_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dx, [M, D], and a program's part of d_weight in its own row, [programs, D], so no atomics.

    Any number of programs: each takes every so manieth block of rows.
    """
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    has_column = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=has_column, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_ROWS, num_rows, tl.num_programs(0) * BLOCK_ROWS):
        rows = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        has_row = rows < num_rows
        is_there = has_row[:, None] & has_column
        places = rows[:, None] * WIDTH + columns
        x = tl.load(x_ptr + places, mask=is_there, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + places, mask=is_there, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=has_row, other=0.0)[:, None]
        normed = x * rstd
        if NEEDS_WEIGHT:
            d_weight += dy * normed.to(x_ptr.dtype.element_ty).to(tl.float32)
        scaled = dy * weight
        along = tl.sum(scaled * normed, 1) / WIDTH
        dx = rstd * (scaled - normed * along[:, None])
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=is_there)
    if NEEDS_WEIGHT:
        place = d_weight_ptr + tl.program_id(0) * WIDTH + tl.arange(0, BLOCK_COLUMNS)
        tl.store(place, tl.sum(d_weight, 0), mask=tl.arange(0, BLOCK_COLUMNS) < WIDTH)
