"""The LOST linear map for a few rows without gradients: a token at a time, as in decoding.

There the time goes into reading weights. [B | W_s] as one matrix would be written and read once more for every token;
the two products read each weight once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lost_kernels.lost_linear.reference import ACTIVATIONS, scaled

# By arithmetic: with so many rows the product with the joined weights reads and writes about what joining them does.
MOST_ROWS = 16


def has_few_rows(x: Tensor) -> bool:
    """Whether x, [..., K], is for this way: few rows on a CPU (on a GPU not measured), and nobody wants gradients."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= MOST_ROWS * x.shape[-1]


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

    Numerics: as the reference, but that the two products are rounded before their sum.
    """
    z = scaled(ACTIVATIONS[activation], F.linear(x, low_rank_down), gamma)
    y = F.linear(z, low_rank_up, bias)
    if sparse_weight is None or sparse_index is None:
        return y
    kept = x.index_select(-1, sparse_index)
    kept = kept if gamma is None else scaled(ACTIVATIONS["identity"], kept, 1 - gamma)
    return y + F.linear(kept, sparse_weight)
