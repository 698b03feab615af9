"""A LOST layer's start drawn directly, as if a Gaussian W0 had been drawn and factorised (init = draw).

Minutes instead of an hour for billions of parameters. Singular values and vectors have exactly the distribution of
those of a Gaussian matrix; the sparse block has not quite (see `draw_factors`).

Shapes: N out_features, K in_features, R lost_rank, S kept channels.
"""

import math

import numpy as np
import torch
from torch import Tensor

from lost.config.model import LostConfig
from lost.model.lost_init import Factors, FreshWeight, Triplets, highest, with_fixed_signs
from lost.utils.errors import ConfigError

# Width of the interval around each eigenvalue at the end, as a share of the largest eigenvalue.
EIGENVALUE_TOLERANCE = 1e-13
# Rows of pivots counted at once.
ROWS_AT_ONCE = 256


@torch.no_grad()
def draw_factors(
    weight: Tensor | FreshWeight,
    config: LostConfig,
    rank: int,
    num_kept: int,
    generator: torch.Generator | None = None,
) -> Factors:
    """What `factorise` gives for a Gaussian W0, drawn without W0.

    Args:
        weight: a W0 that is not drawn yet, [N, K]; only its shape and standard deviation are read.
        config: its other options are those that `LostConfig` allows with init = draw.
        rank: R, at most min(N, K).
        num_kept: S; 0: no sparse block.
        generator: a CPU generator; torch's global one by default.

    Raises:
        ConfigError: `weight` is there already, so that there is nothing to draw.

    Numerics: float64. Signs as in `factorise`.
    Source: singular values from the bidiagonal form of a Gaussian matrix (Dumitriu and Edelman, 2002), singular vectors
        Haar. The sparse block is (B A)_I + E, where E = (I - U U^T) G (I - V V^T) in the kept channels I: orthogonal
        to U as the true remainder is, and of its energy; but its channels' norms are drawn as if they were independent,
        and the smaller singular values are not those of a Gaussian matrix.
    """
    if not isinstance(weight, FreshWeight):
        raise ConfigError(
            "init = draw: this weight is given, and draw only stands for a Gaussian one that is not drawn yet;"
            " use init=auto, gram or svd to factorise it"
        )
    num_rows, num_columns = weight.shape
    std = weight.std if config.dense_init == "model" else math.sqrt(2 / (num_rows + num_columns))
    numbers = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    values, energy = singular_values_of_gaussian(num_rows, num_columns, rank, numbers)
    left, right = haar(num_rows, rank, generator), haar(num_columns, rank, generator)
    triplets = with_fixed_signs(Triplets(left, std * values, right.T))
    root = triplets.values.sqrt()
    down, up = root[:, None] * triplets.right, triplets.left * root
    if num_kept == 0:
        return Factors(down, up, None, None)
    is_whole = rank == min(weight.shape)
    rest = 0.0 if is_whole else std**2 * (energy - float(values.square().sum()))
    is_by_column = config.selection_axis == "columns"
    # The rows of W0 are the columns of its transpose.
    across, along = (triplets.left, triplets.right.T) if is_by_column else (triplets.right.T, triplets.left)
    index, remainder = _kept_remainder(across, along, rest, config, num_kept, numbers, generator)
    kept = (across * triplets.values) @ along[index].T
    sparse = {"original": kept + remainder, "complement": remainder, "zero": torch.zeros_like(kept)}[
        config.sparse_values
    ]
    return Factors(down, up, sparse if is_by_column else sparse.T, index)


def _kept_remainder(
    across: Tensor,
    along: Tensor,
    energy: float,
    config: LostConfig,
    num_kept: int,
    numbers: np.random.Generator,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Kept channels I, [S], and what a W0 has in them beside its first R triplets, [M, S].

    Args:
        across: singular vectors along a channel, [M, R].
        along: singular vectors over the channels, [C, R].
        energy: sum of the squares of all C channels of the remainder.
    """
    channel_size, num_channels, rank = across.shape[0], along.shape[0], along.shape[1]
    freedom = max(1, (channel_size - rank) * (num_channels - rank))
    # Expected square norm of a channel of I - V V^T; below zero by rounding only.
    share = (1 - along.square().sum(dim=1)).clamp_min(0)
    squares = share * torch.from_numpy(numbers.chisquare(max(1, channel_size - rank), num_channels)) * energy / freedom
    if config.score == "random":
        index = torch.from_numpy(np.sort(numbers.permutation(num_channels)[:num_kept]))
    else:
        index = highest(squares, num_kept)
    # Columns I of G (I - V V^T): independent rows, whose covariance is this block of the projection.
    covariance = torch.eye(num_kept, dtype=torch.float64) - along[index] @ along[index].T
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(channel_size, num_kept, dtype=torch.float64, generator=generator)
    remainder = (noise * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    remainder -= across @ (across.T @ remainder)
    norms = remainder.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return index, remainder * (squares[index].sqrt() / norms)


def haar(size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Orthonormal columns, [size, count], uniformly distributed; float64."""
    result = torch.linalg.qr(torch.randn(size, count, dtype=torch.float64, generator=generator))
    # LAPACK's signs depend on the matrix; with a positive diagonal of R the columns are uniform.
    return result.Q * torch.where(result.R.diagonal() < 0, -1.0, 1.0)


def singular_values_of_gaussian(
    num_rows: int, num_columns: int, count: int, numbers: np.random.Generator
) -> tuple[Tensor, float]:
    """The `count` largest singular values, falling, of a matrix of N(0, 1), and the sum of the squares of all."""
    longer, shorter = max(num_rows, num_columns), min(num_rows, num_columns)
    steps = np.arange(shorter)
    diagonal_squares = numbers.chisquare(longer - steps)
    above_squares = numbers.chisquare(shorter - 1 - steps[:-1])
    values = largest_singular_values(diagonal_squares, above_squares, count)
    return torch.from_numpy(values), float(diagonal_squares.sum() + above_squares.sum())


def largest_singular_values(diagonal_squares: np.ndarray, above_squares: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest singular values, falling, of an upper bidiagonal matrix B given by squares of its entries.

    Args:
        diagonal_squares: [n].
        above_squares: of the entries above the diagonal, [n - 1].

    Numerics: float64, bisection on the signs of the pivots of B^T B - x (Sturm); the error of a square is at most 1e-13
        of the largest square.
    """
    size = len(diagonal_squares)
    diagonal = diagonal_squares + np.concatenate([[0.0], above_squares])
    off_squares = np.concatenate([[0.0], diagonal_squares[:-1] * above_squares])
    off = np.sqrt(off_squares)
    # Gershgorin: no eigenvalue is above it.
    bound = float((diagonal + off + np.concatenate([off[1:], [0.0]])).max())
    low, high = np.zeros(count), np.full(count, bound)
    wanted = np.arange(count)
    for _ in range(math.ceil(-math.log2(EIGENVALUE_TOLERANCE))):
        middle = (low + high) / 2
        is_above = size - _num_eigenvalues_below(diagonal, off_squares, middle) > wanted
        low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
    return np.sqrt((low + high) / 2)


def _num_eigenvalues_below(diagonal: np.ndarray, off_squares: np.ndarray, points: np.ndarray) -> np.ndarray:
    """For each point how many eigenvalues a symmetric tridiagonal matrix has below it; off_squares[0] is unused."""
    num_below = np.zeros(len(points), dtype=np.int64)
    pivots = np.empty((ROWS_AT_ONCE, len(points)))
    previous = np.ones(len(points))
    entries = list(zip(diagonal.tolist(), off_squares.tolist(), strict=True))
    # A pivot of zero makes the next one infinite and negative: the count stays right.
    with np.errstate(divide="ignore"):
        for start in range(0, len(entries), ROWS_AT_ONCE):
            block = entries[start : start + ROWS_AT_ONCE]
            for pivot, (own, off_square) in zip(pivots, block, strict=False):
                np.divide(off_square, previous, out=pivot)
                np.add(pivot, points, out=pivot)
                np.subtract(own, pivot, out=pivot)
                previous = pivot
            num_below += (pivots[: len(block)] < 0).sum(axis=0)
    return num_below
