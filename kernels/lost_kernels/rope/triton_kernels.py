"""Triton kernel of the rotary position embedding, bound by memory; queries and keys in one launch.

Shapes: B sequences, H heads, T seq_len, D head_dim. Arithmetic is float32. A program reads cos and sin of its tokens
once for several heads.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_heads(
    source,
    target,
    source_stride,
    target_stride,
    cos_first,
    cos_second,
    sin_first,
    sin_second,
    first_head,
    is_there,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
):
    """Rotates BLOCK_HEADS heads of some tokens; strides are those from head to head."""
    for number in tl.static_range(BLOCK_HEADS):  # pyright: ignore[reportGeneralTypeIssues]
        head = (first_head + number).to(tl.int64)
        mask = is_there & (head < NUM_HEADS)
        first = tl.load(source + head * source_stride, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + head * source_stride + HALF, mask=mask, other=0.0).to(tl.float32)
        if IS_BACKWARD:
            new_first = first * cos_first + second * sin_second
            new_second = second * cos_second - first * sin_first
        else:
            new_first = first * cos_first - second * sin_first
            new_second = second * cos_second + first * sin_second
        place = target + head * target_stride
        tl.store(place, new_first.to(target.dtype.element_ty), mask=mask)
        tl.store(place + HALF, new_second.to(target.dtype.element_ty), mask=mask)


@triton.jit
def rotate(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    new_query_ptr,
    new_key_ptr,
    seq_len,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    cos_stride_b,
    cos_stride_t,
    sin_stride_b,
    sin_stride_t,
    new_query_stride_b,
    new_query_stride_h,
    new_query_stride_t,
    new_key_stride_b,
    new_key_stride_h,
    new_key_stride_t,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Grid (T / BLOCK_TOKENS, B, blocks of heads: those of the queries, then those of the keys)."""
    tokens = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    sequence = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    is_there = (tokens < seq_len) & (columns < HALF)
    cos_place = cos_ptr + sequence * cos_stride_b + tokens * cos_stride_t + columns
    sin_place = sin_ptr + sequence * sin_stride_b + tokens * sin_stride_t + columns
    cos_first = tl.load(cos_place, mask=is_there, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_place + HALF, mask=is_there, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_place, mask=is_there, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_place + HALF, mask=is_there, other=0.0).to(tl.float32)
    num_query_blocks = (NUM_QUERY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    block = tl.program_id(2)
    if block < num_query_blocks:
        rotate_heads(
            query_ptr + sequence * query_stride_b + tokens * query_stride_t + columns,
            new_query_ptr + sequence * new_query_stride_b + tokens * new_query_stride_t + columns,
            query_stride_h,
            new_query_stride_h,
            cos_first,
            cos_second,
            sin_first,
            sin_second,
            block * BLOCK_HEADS,
            is_there,
            NUM_QUERY_HEADS,
            HALF,
            BLOCK_HEADS,
            IS_BACKWARD,
        )
    else:
        rotate_heads(
            key_ptr + sequence * key_stride_b + tokens * key_stride_t + columns,
            new_key_ptr + sequence * new_key_stride_b + tokens * new_key_stride_t + columns,
            key_stride_h,
            new_key_stride_h,
            cos_first,
            cos_second,
            sin_first,
            sin_second,
            (block - num_query_blocks) * BLOCK_HEADS,
            is_there,
            NUM_KEY_HEADS,
            HALF,
            BLOCK_HEADS,
            IS_BACKWARD,
        )
