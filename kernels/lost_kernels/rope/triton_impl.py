"""The rotary position embedding by a Triton kernel: `rotate_into` of `reference`.

Shapes: B sequences, H heads, T seq_len, D head_dim.
"""

import torch
import triton
from torch import Tensor

from lost_kernels.lost_linear.triton_impl import Tile
from lost_kernels.rope.triton_kernels import rotate

# Heads that share what a program reads of cos and sin; no time on a GPU has been measured.
BLOCK_HEADS = 4


def tile_for(head_dim: int) -> Tile:
    """Tokens and halves of a head: 8 values of 2 bytes for every thread, one vector of 16 bytes."""
    columns = max(8, 1 << (head_dim // 2 - 1).bit_length())
    return Tile(max(1, 1024 // columns), columns)


def rotate_into(
    new_query: Tensor, new_key: Tensor, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, is_backward: bool
) -> None:
    """As `reference.rotate_into`; of new_query and new_key the neighbours in a head are neighbours in memory."""
    # Expanded, such as the gradient of a sum.
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    batch, num_query_heads, seq_len, head_dim = query.shape
    num_key_heads = key.shape[1]
    _check(query, key, cos, sin)
    _check(new_query, new_key, cos, sin)
    tile = tile_for(head_dim)
    num_blocks = triton.cdiv(num_query_heads, BLOCK_HEADS) + triton.cdiv(num_key_heads, BLOCK_HEADS)
    if batch and seq_len:
        with torch.cuda.device_of(query):
            rotate[(triton.cdiv(seq_len, tile.rows), batch, num_blocks)](
                query,
                key,
                cos,
                sin,
                new_query,
                new_key,
                seq_len,
                *query.stride()[:3],
                *key.stride()[:3],
                *_strides(cos),
                *_strides(sin),
                *new_query.stride()[:3],
                *new_key.stride()[:3],
                NUM_QUERY_HEADS=num_query_heads,
                NUM_KEY_HEADS=num_key_heads,
                HALF=head_dim // 2,
                IS_BACKWARD=is_backward,
                BLOCK_TOKENS=tile.rows,
                BLOCK_HALF=tile.columns,
                BLOCK_HEADS=BLOCK_HEADS,
                num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
            )


def _strides(table: Tensor) -> tuple[int, int]:
    """From sequence to sequence, 0 where all have one table, and from token to token."""
    return (0 if table.shape[0] == 1 else table.stride(0)), table.stride(1)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, _, seq_len, head_dim = query.shape
    assert head_dim % 2 == 0, head_dim
    assert (key.shape[0], *key.shape[2:]) == (batch, seq_len, head_dim), (query.shape, key.shape)
    for table in (cos, sin):
        assert table.shape[0] in (1, batch), (table.shape, query.shape)
        assert table.shape[1:] == (seq_len, head_dim), (table.shape, query.shape)
        assert table.stride(2) == 1, table.stride()
    assert query.stride(3) == key.stride(3) == 1, (query.stride(), key.stride())
    assert {tensor.device for tensor in (key, cos, sin)} == {query.device}
