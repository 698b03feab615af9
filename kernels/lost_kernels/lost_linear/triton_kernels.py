"""Triton kernels of the group operators, each bound by memory: z (K1), its backward (K2), gradients of x (K3).

Shapes: M rows, K in_features, R low-rank and S kept channels of a member, W columns of its z, R + S padded with zeros.
Members of one launch have equal R and S and lie side by side; the last grid axis counts them. Arithmetic is float32.
"""

import triton
import triton.language as tl


@triton.jit
def activation_and_slope(h, ACTIVATION: tl.constexpr):
    """act(h) and act'(h)."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(h)
        value = h * gate
        slope = gate * (1.0 + h * (1.0 - gate))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        value = h * below
        slope = below + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "relu":
        value = tl.maximum(h, 0.0)
        slope = tl.where(h > 0.0, 1.0, 0.0)
    else:
        value = h
        slope = tl.full(h.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def z_forward(
    h_ptr,
    kept_ptr,
    gamma_ptr,
    z_ptr,
    num_rows,
    h_stride,
    kept_stride,
    z_stride,
    RANK: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """z = [gamma act(h) | (1 - gamma) kept | 0]. Pointers are the first member's; grid (M / BLOCK_ROWS, members)."""
    member = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    has_row = rows < num_rows
    low_scale, sparse_scale = 1.0, 1.0
    if HAS_GAMMA:
        low_scale = tl.load(gamma_ptr + member).to(tl.float32)
        sparse_scale = 1.0 - low_scale
    for start in tl.static_range(0, WIDTH, BLOCK_COLUMNS):  # pyright: ignore[reportGeneralTypeIssues]
        columns = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        if start < RANK:
            is_low = has_row & (columns < RANK)
            h = tl.load(h_ptr + rows * h_stride + member * RANK + columns, mask=is_low, other=0.0).to(tl.float32)
            act, _ = activation_and_slope(h, ACTIVATION)
            value = low_scale * act
        if (start + BLOCK_COLUMNS > RANK) and (NUM_KEPT > 0):
            is_sparse = has_row & (columns >= RANK) & (columns < RANK + NUM_KEPT)
            source = kept_ptr + rows * kept_stride + member * NUM_KEPT + columns - RANK
            kept = tl.load(source, mask=is_sparse, other=0.0).to(tl.float32)
            value = tl.where(columns < RANK, value, sparse_scale * kept)
        target = z_ptr + rows * z_stride + member * WIDTH + columns
        tl.store(target, value.to(z_ptr.dtype.element_ty), mask=has_row & (columns < WIDTH))


@triton.jit
def z_backward(
    dz_ptr,
    h_ptr,
    kept_ptr,
    gamma_ptr,
    dh_ptr,
    dkept_ptr,
    d_gamma_ptr,
    num_rows,
    dz_stride,
    h_stride,
    kept_stride,
    d_gamma_stride,
    RANK: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    NEEDS_GAMMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dh = gamma act'(h) dz, dkept = (1 - gamma) dz; a program's part of dgamma in its own place, so no atomics.

    dh and dkept have the strides of h and kept. Grid (M / BLOCK_ROWS, members).
    """
    member = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    has_row = rows < num_rows
    low_scale, sparse_scale = 1.0, 1.0
    if HAS_GAMMA:
        low_scale = tl.load(gamma_ptr + member).to(tl.float32)
        sparse_scale = 1.0 - low_scale
    d_gamma = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in tl.static_range(0, RANK + NUM_KEPT, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        # Up to the padded width: a mask that ends within 16 columns would make every load one of 2 bytes.
        source = dz_ptr + rows * dz_stride + member * WIDTH + columns
        dz = tl.load(source, mask=has_row & (columns < WIDTH), other=0.0).to(tl.float32)
        if start < RANK:
            is_low = has_row & (columns < RANK)
            place = rows * h_stride + member * RANK + columns
            h = tl.load(h_ptr + place, mask=is_low, other=0.0).to(tl.float32)
            act, slope = activation_and_slope(h, ACTIVATION)
            tl.store(dh_ptr + place, (low_scale * slope * dz).to(dh_ptr.dtype.element_ty), mask=is_low)
            if NEEDS_GAMMA:
                d_gamma += tl.sum(tl.where(is_low, dz * act, 0.0), 1)
        if (start + BLOCK_COLUMNS > RANK) and (NUM_KEPT > 0):
            is_sparse = has_row & (columns >= RANK) & (columns < RANK + NUM_KEPT)
            place = rows * kept_stride + member * NUM_KEPT + columns - RANK
            tl.store(dkept_ptr + place, (sparse_scale * dz).to(dkept_ptr.dtype.element_ty), mask=is_sparse)
            if NEEDS_GAMMA:
                kept = tl.load(kept_ptr + place, mask=is_sparse, other=0.0).to(tl.float32)
                d_gamma -= tl.sum(tl.where(is_sparse, dz * kept, 0.0), 1)
    if NEEDS_GAMMA:
        tl.store(d_gamma_ptr + tl.program_id(0) * d_gamma_stride + member, tl.sum(d_gamma, 0))


@triton.jit
def inverse_map(
    index_ptr,
    inverse_ptr,
    first_column,
    in_features,
    NUM_KEPT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    """inverse[channel] = the column of dkept that belongs to it, or -1: int32 [members, K], from indices int64 [S].

    By comparing: the writers of a scatter would have to wait for those of the -1. Grid (K / BLOCK_CHANNELS, members).
    """
    member = tl.program_id(1)
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    found = tl.full((BLOCK_CHANNELS,), -1, tl.int32)
    for start in range(0, NUM_KEPT, BLOCK_KEPT):
        kept = start + tl.arange(0, BLOCK_KEPT)
        index = tl.load(index_ptr + member * NUM_KEPT + kept, mask=kept < NUM_KEPT, other=-1)
        column = (first_column + member * NUM_KEPT + kept).to(tl.int32)
        is_same = channels[:, None] == index[None, :]
        found = tl.maximum(found, tl.max(tl.where(is_same, column[None, :], -1), 1))
    tl.store(inverse_ptr + member.to(tl.int64) * in_features + channels, found, mask=channels < in_features)


@triton.jit
def add_kept(
    dx_ptr,
    dkept_ptr,
    inverse_ptr,
    num_rows,
    in_features,
    dx_stride,
    dkept_stride,
    NUM_MEMBERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dx[:, c] += dkept[:, inverse[g, c]] of every member, in place. Grid (M / BLOCK_ROWS, K / BLOCK_COLUMNS)."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    has_column = columns < in_features
    is_there = (rows < num_rows) & has_column
    place = dx_ptr + rows * dx_stride + columns
    total = tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    for member in tl.static_range(NUM_MEMBERS):  # pyright: ignore[reportGeneralTypeIssues]
        source = tl.load(inverse_ptr + member * in_features + columns, mask=has_column, other=-1)
        is_kept = is_there & (source >= 0)
        total += tl.load(dkept_ptr + rows * dkept_stride + source, mask=is_kept, other=0.0).to(tl.float32)
    tl.store(place, total.to(dx_ptr.dtype.element_ty), mask=is_there)
