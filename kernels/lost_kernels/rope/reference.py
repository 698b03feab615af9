"""LLaMA's rotary position embedding in plain PyTorch: the definition, and its backward pass written out.

Shapes: B sequences, H heads (of queries or of keys), T seq_len, D head_dim.
"""

import torch
from torch import Tensor


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + half-turned(x) sin of queries and keys, where half-turned([a | b]) = [-b | a].

    Args:
        query: [B, H, T, D], D even.
        key: [B, H of keys, T, D].
        cos: [B or 1, T, D], the same for all heads.
        sin: likewise.

    Returns:
        Rotated query and key, in their dtypes.

    Source: transformers' apply_rotary_pos_emb; differs where cos is of a wider dtype than query (autocast), whose
    result stays wide there.
    """
    cos, sin = cos[:, None], sin[:, None]
    return _rotated(query, cos, sin).to(query.dtype), _rotated(key, cos, sin).to(key.dtype)


def rotate_into(
    new_query: Tensor, new_key: Tensor, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, is_backward: bool
) -> None:
    """Writes `rope` of query and key; backward, their gradients after it become those before it.

    Of a gradient g that is g cos - half-turned(g sin): the rotation by the negative angle where both halves of cos and
    of sin are equal, as LLaMA's are.
    """
    cos, sin = cos[:, None], sin[:, None]
    for target, x in ((new_query, query), (new_key, key)):
        target.copy_(x * cos - half_turned(x * sin) if is_backward else _rotated(x, cos, sin))


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + half_turned(x) * sin
