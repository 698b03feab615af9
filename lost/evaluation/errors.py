"""Standard errors of a mean token loss, and of the difference between two models on the same tokens."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lost.evaluation.perplexity import RowSums


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, nan where there is too little to say."""

    value: float
    standard_error: float


def mean_loss(sums: RowSums, rows_per_block: int = 1) -> Estimate:
    """Nats a token, with the standard error over rows.

    Args:
        rows_per_block: rows that count as one draw: tokens close to each other are alike.
    """
    return ratio(in_blocks(sums.loss, rows_per_block), in_blocks(sums.predicted, rows_per_block))


def loss_difference(sums: RowSums, base: RowSums, rows_per_block: int = 1) -> Estimate:
    """Mean loss less that of `base` on the same tokens, paired row by row."""
    assert sums.predicted.equal(base.predicted), "the two models read different rows"
    return ratio(in_blocks(sums.loss - base.loss, rows_per_block), in_blocks(base.predicted, rows_per_block))


def ratio(amounts: Tensor, sizes: Tensor) -> Estimate:
    """sum(amounts) / sum(sizes) over independent draws [n], with the standard error of a ratio of sums.

    Source: the linearised variance, n / (n - 1) * sum((a_i - r s_i)^2) / sum(s)^2 (Cochran, Sampling Techniques, 6.4).
    """
    value = float(amounts.sum() / sizes.sum())
    num_draws = int((sizes > 0).sum())
    if num_draws < 2:
        return Estimate(value, math.nan)
    squares = float(((amounts - value * sizes) ** 2).sum())
    return Estimate(value, math.sqrt(num_draws / (num_draws - 1) * squares) / float(sizes.sum()))


def in_blocks(values: Tensor, size: int) -> Tensor:
    """Sums of every `size` neighbours of [n], [ceil(n / size)]."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size).sum(1)
