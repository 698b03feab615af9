"""The LOST linear map in plain PyTorch: the definition that every faster implementation must agree with.

Shapes: M rows, K in_features, N out_features, R lost_rank, S kept channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "identity": lambda h: h,
    "gelu": F.gelu,
    "relu": F.relu,
}


def lost_linear(
    x: Tensor,
    low_rank_down: Tensor,
    low_rank_up: Tensor,
    sparse_weight: Tensor | None,
    sparse_index: Tensor | None,
    gamma: float | Tensor | None,
    activation: str,
    bias: Tensor | None = None,
    *,
    selection_axis: str = "columns",
) -> Tensor:
    """y = gamma * act(x A^T) B^T + (1 - gamma) * x[..., I] W_s^T + bias, as one product: [z_R | z_S] [B | W_s]^T.

    With selection_axis = rows the sparse block reads every input channel and adds to the output channels I:
    y[..., I] += (1 - gamma) * x W_s^T.

    Args:
        x: input, [..., K].
        low_rank_down: A, [R, K].
        low_rank_up: B, [N, R].
        sparse_weight: W_s, [N, S] (rows: [S, K]); None: no sparse block.
        sparse_index: I, the kept channels, int64 [S], each once; None: no sparse block.
        gamma: number, or tensor of one element; None: both parts are unscaled (gamma folded into the weights).
        activation: a key of ACTIVATIONS.
        bias: [N] or None.
        selection_axis: columns or rows.

    Returns:
        y, [..., N].

    Numerics: gamma multiplies the activations, not the weights; nothing is rounded between act and gamma.
    """
    sparse_scale = None if gamma is None else 1 - gamma
    z = scaled(ACTIVATIONS[activation], F.linear(x, low_rank_down), gamma)
    if sparse_weight is None or sparse_index is None:
        return F.linear(z, low_rank_up, bias)
    if selection_axis == "rows":
        sparse_y = scaled(ACTIVATIONS["identity"], F.linear(x, sparse_weight), sparse_scale)
        return F.linear(z, low_rank_up, bias).index_add(-1, sparse_index, sparse_y)
    kept = scaled(ACTIVATIONS["identity"], x.index_select(-1, sparse_index), sparse_scale).to(z.dtype)
    return F.linear(torch.cat([z, kept], dim=-1), torch.cat([low_rank_up, sparse_weight], dim=1), bias)


def scaled(function: Callable[[Tensor], Tensor], h: Tensor, scale: float | Tensor | None) -> Tensor:
    """scale * function(h), computed in float32 or better and rounded once to the dtype of h."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    value = function(wide)
    if scale is not None:
        value = value * scale
    return value.to(h.dtype)
