"""The LOST linear map for a few rows without gradients: a token at a time, as in decoding.

There the time goes into reading weights. [B | W_s] as one matrix would be written and read once more for every token;
the two products read each weight once.
"""

import torch
from torch import Tensor

from lost_kernels.lost_linear.reference import ACTIVATIONS

# By arithmetic: with so many rows the product with the joined weights reads and writes about what joining them does.
MOST_ROWS = 16


def has_few_rows(x: Tensor) -> bool:
    """Whether x, [..., K], is for this way: few rows on a CPU (on a GPU not measured), and nobody wants gradients.

    Not under autocast, which leaves products in place as they are.
    """
    few = x.device.type == "cpu" and x.numel() <= MOST_ROWS * x.shape[-1]
    return few and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def few_rows_linear(
    x: Tensor,
    low_rank_down: Tensor,
    low_rank_up: Tensor,
    sparse_weight: Tensor | None,
    sparse_index: Tensor | None,
    gamma: float | Tensor | None,
    activation: str,
    bias: Tensor | None = None,
) -> Tensor:
    """`reference.lost_linear` for selection_axis = columns, as two products; same arguments, same values.

    Both parts are scaled as they are added, in the second product: a small operation takes as long as reading a
    hundred kilobytes of weights.

    Numerics: as the reference, but that the low-rank part is rounded before the sum.
    """
    # MKL takes a vector faster than a matrix of one row; other dtypes' matrices go to oneDNN.
    is_vector = x.numel() == x.shape[-1] and x.dtype == torch.float32
    rows = x.reshape(-1) if is_vector else x.reshape(-1, x.shape[-1])
    z = ACTIVATIONS[activation](product(rows, low_rank_down))
    y = product(z, low_rank_up)
    scale = 1.0 if gamma is None else float(gamma)
    if sparse_weight is None or sparse_index is None:
        y *= scale
    else:
        sparse_scale = 1.0 if gamma is None else 1 - scale
        kept = rows.index_select(-1, sparse_index)
        if is_vector:
            y.addmv_(sparse_weight, kept, beta=scale, alpha=sparse_scale)
        else:
            y.addmm_(kept, sparse_weight.t(), beta=scale, alpha=sparse_scale)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], low_rank_up.shape[0])


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """weight rows, [N] of [K], or rows weight^T, [M, N] of [M, K]; without F.linear's detours."""
    return torch.mv(weight, rows) if rows.dim() == 1 else torch.mm(rows, weight.t())
