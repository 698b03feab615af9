"""From a dense weight W0 to the factors and the sparse block of LOST, in float64.

Shapes: N out_features, K in_features, R lost_rank, S kept channels.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lost.config.model import LostConfig
from lost.utils.errors import ConfigError

# Below this ratio of singular values the squares in the Gram matrix have lost too many digits (1e-6 of the largest
# square leaves ten of sixteen), and the SVD of W0 itself is used.
SMALLEST_GRAM_RATIO = 1e-3
# Scores and entries closer than this share of the largest are ties: rounding in either path differs by less.
SCORE_TIE = 1e-10
SIGN_TIE = 1e-9
# A complement below this share of W0's largest channel is rounding noise around zero.
NOISE_FLOOR = 1e-11


@dataclass(frozen=True)
class Factors:
    """What a LOST layer starts from, in float64; the sparse ones are None where no channel is kept."""

    low_rank_down: Tensor
    low_rank_up: Tensor
    sparse_weight: Tensor | None
    sparse_index: Tensor | None


@dataclass(frozen=True)
class FreshWeight:
    """A dense weight W0 that is not drawn yet.

    Attributes:
        shape: (N, K).
        std: of its entries, which are N(0, std^2).
        generator: a CPU generator; None: torch's global one.
    """

    shape: tuple[int, int]
    std: float
    generator: torch.Generator | None = None

    def draw(self) -> Tensor:
        """W0 in float32 on the CPU."""
        weight = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        return weight.normal_(0, self.std, generator=self.generator)


class Triplets(NamedTuple):
    """Singular triplets by falling value: W0 ~ left @ diag(values) @ right; left [N, n], values [n], right [n, K]."""

    left: Tensor
    values: Tensor
    right: Tensor

    def part(self, start: int, stop: int) -> "Triplets":
        return Triplets(self.left[:, start:stop], self.values[start:stop], self.right[start:stop])

    def product(self) -> Tensor:
        return (self.left * self.values) @ self.right


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one tensor, from (seed, fully qualified name): the same whichever process draws them."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def factorisation_cost(out_features: int, in_features: int) -> int:
    """Relative work of `factorise`: the entries of W0 times its shorter side."""
    return out_features * in_features * min(out_features, in_features)


@torch.no_grad()
def factorise(
    dense_weight: Tensor, config: LostConfig, rank: int, num_kept: int, generator: torch.Generator | None = None
) -> Factors:
    """Factors and sparse block of W0: B A is its best rank-R approximation, W_s its channels that B A misses most.

    Args:
        dense_weight: W0, [N, K], any floating dtype; not changed.
        config: the options of the initialisation.
        rank: R, at most min(N, K).
        num_kept: S; 0: no sparse block.
        generator: a CPU generator for the options that draw; torch's global one by default.

    Returns:
        Factors in float64 on the device of W0.

    Raises:
        ConfigError: init = gram on a spectrum where it is not exact.

    Numerics: float64. Signs: the largest |entry| of each row of V is positive. Ties: the lowest index.
    Source: arXiv 2508.02668, section on initialisation; complement_span = next is the authors' code.
    """
    weight = redrawn(dense_weight, config, generator).to(torch.float64)
    triplets = _needed_triplets(weight, config, rank, num_kept)
    if config.factor_init == "svd":
        assert triplets is not None
        root = triplets.values[:rank].sqrt()
        down, up = root[:, None] * triplets.right[:rank], triplets.left[:, :rank] * root
    else:
        down, up = _drawn_factors(weight, config.factor_init, rank, generator)
    if num_kept == 0:
        return Factors(down, up, None, None)
    complement = _complement(weight, triplets, config, rank)
    index = _kept_channels(weight, complement, config, num_kept, generator)
    return Factors(down, up, _sparse_values(weight, complement, index, config, generator), index)


def redrawn(dense_weight: Tensor, config: LostConfig, generator: torch.Generator | None) -> Tensor:
    """W0 as `config.dense_init` wants it: the given one (model), or a new draw of the same shape."""
    if config.dense_init == "model":
        return dense_weight
    weight = torch.empty(dense_weight.shape, dtype=torch.float64)
    if config.dense_init == "kaiming":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    elif config.dense_init == "xavier":
        nn.init.xavier_normal_(weight, generator=generator)
    else:
        nn.init.orthogonal_(weight, generator=generator)
    return weight.to(dense_weight.device)


# ------------------------------------------------------------------------------------------ singular triplets


def _needed_triplets(weight: Tensor, config: LostConfig, rank: int, num_kept: int) -> Triplets | None:
    """The triplets that the factors and the scores read: the first R, those of the span too, or none."""
    total = min(weight.shape)
    reads_complement = num_kept > 0 and (config.score != "random" or config.sparse_values == "complement")
    if reads_complement and config.complement_span == "next":
        return singular_triplets(weight, min(total, rank + config.span_triplets), config.init)
    if reads_complement and config.complement_span == "smallest":
        return singular_triplets(weight, total, config.init)
    if config.factor_init == "svd" or (reads_complement and config.complement_span == "all"):
        return singular_triplets(weight, rank, config.init)
    return None


def singular_triplets(weight: Tensor, count: int, init: str) -> Triplets:
    """The `count` largest singular triplets of `weight`, [N, K] float64, with fixed signs.

    Raises:
        ConfigError: init = gram, and the smallest of them is below 1e-3 of the largest.
    """
    if init != "svd":
        triplets = _gram_triplets(weight, count)
        ratio = float(triplets.values[-1] / triplets.values[0]) if triplets.values[0] > 0 else 0.0
        if ratio >= SMALLEST_GRAM_RATIO:
            return with_fixed_signs(triplets)
        if init == "gram":
            raise ConfigError(
                f"init = gram: singular value {count} of this weight is {ratio:.1e} of the largest, and the Gram"
                f" matrix is exact only from {SMALLEST_GRAM_RATIO:g}; use init=auto or init=svd, or a smaller rank"
            )
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return with_fixed_signs(Triplets(left, values, right).part(0, count))


def _gram_triplets(weight: Tensor, count: int) -> Triplets:
    """Triplets from the eigenvectors of the smaller of W^T W and W W^T, with S_i = ||W v_i||."""
    if weight.shape[0] < weight.shape[1]:
        right, values, left = _gram_triplets(weight.T, count)
        return Triplets(left.T, values, right.T)
    right = torch.linalg.eigh(weight.T @ weight).eigenvectors.flip(1)[:, :count]
    image = weight @ right
    values = image.norm(dim=0)
    # Rounding can swap neighbours that are equal to the last digits.
    values, order = values.sort(descending=True, stable=True)
    left = image[:, order] / values.clamp_min(torch.finfo(values.dtype).tiny)
    return Triplets(left, values, right[:, order].T)


def with_fixed_signs(triplets: Triplets) -> Triplets:
    """Each triplet with the largest |entry| of its row of V positive; of equal ones (to 1e-9) the first decides."""
    size = triplets.right.abs()
    is_largest = size >= size.amax(dim=1, keepdim=True) * (1 - SIGN_TIE)
    first = is_largest.to(torch.uint8).argmax(dim=1, keepdim=True)
    sign = torch.where(triplets.right.gather(1, first) < 0, -1.0, 1.0).to(triplets.right.dtype)
    return Triplets(triplets.left * sign[:, 0], triplets.values, triplets.right * sign)


# ------------------------------------------------------------------------------------------------ sparse block


def _complement(weight: Tensor, triplets: Triplets | None, config: LostConfig, rank: int) -> Tensor | None:
    """The part of W0 that scores the channels; None where nothing reads it."""
    if config.complement_span == "whole":
        return weight
    if triplets is None:
        return None
    if config.complement_span == "all":
        return weight - triplets.part(0, rank).product()
    total = len(triplets.values)
    start = rank if config.complement_span == "next" else max(rank, total - config.span_triplets)
    return triplets.part(start, total).product()


def _kept_channels(
    weight: Tensor, complement: Tensor | None, config: LostConfig, num_kept: int, generator: torch.Generator | None
) -> Tensor:
    """The sorted indices, [S], of the channels with the highest scores, or of a random choice."""
    channel_axis, summed_axis = (1, 0) if config.selection_axis == "columns" else (0, 1)
    if config.score == "random":
        order = torch.randperm(weight.shape[channel_axis], generator=generator).to(weight.device)
        return order[:num_kept].sort().values
    assert complement is not None
    order_of_norm = 1 if config.score == "l1" else 2
    scores = torch.linalg.vector_norm(complement, order_of_norm, dim=summed_axis)
    largest = torch.linalg.vector_norm(weight, order_of_norm, dim=summed_axis).amax()
    return highest(torch.where(scores > NOISE_FLOOR * largest, scores, 0.0), num_kept)


def highest(scores: Tensor, count: int) -> Tensor:
    """Sorted indices of the `count` highest scores; of equal ones (neighbours within 1e-10) the lowest indices."""
    falling, order = scores.sort(descending=True, stable=True)
    is_lower = falling[:-1] - falling[1:] > SCORE_TIE * falling[0]
    place_of_sorted = torch.cat([is_lower.new_zeros(1, dtype=torch.int64), is_lower.cumsum(0)])
    place = torch.empty_like(place_of_sorted).scatter_(0, order, place_of_sorted)
    return place.argsort(stable=True)[:count].sort().values


def _sparse_values(
    weight: Tensor, complement: Tensor | None, index: Tensor, config: LostConfig, generator: torch.Generator | None
) -> Tensor:
    """W_s, [N, S] (rows: [S, K])."""
    axis = 1 if config.selection_axis == "columns" else 0
    original = weight.index_select(axis, index)
    if config.sparse_values == "original":
        return original
    if config.sparse_values == "complement":
        assert complement is not None
        return complement.index_select(axis, index)
    if config.sparse_values == "zero":
        return torch.zeros_like(original)
    # As nn.Linear draws a weight of the replaced layer's fan-in: U(-1, 1) / sqrt(K).
    drawn = torch.empty(original.shape, dtype=torch.float64)
    bound = weight.shape[1] ** -0.5
    return drawn.uniform_(-bound, bound, generator=generator).to(weight.device)


# ----------------------------------------------------------------------------------------------- drawn factors


def _drawn_factors(
    weight: Tensor, factor_init: str, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Factors that do not come from W0 but from its shape.

    cola: N(0, s^2) with s = (R (N + K))^(-1/4), so that entries of B A have variance 1 / (N + K) (arXiv 2502.10940).
    xavier: N(0, 2 / (fan_in + fan_out)) for each factor. kaiming_a_zero_b: A ~ U(-1, 1) / sqrt(K), B = 0 (as LoRA).
    """
    out_features, in_features = weight.shape
    down = torch.empty(rank, in_features, dtype=torch.float64)
    up = torch.empty(out_features, rank, dtype=torch.float64)
    if factor_init == "cola":
        std = (rank * (out_features + in_features)) ** -0.25
        down.normal_(0, std, generator=generator)
        up.normal_(0, std, generator=generator)
    elif factor_init == "xavier":
        nn.init.xavier_normal_(down, generator=generator)
        nn.init.xavier_normal_(up, generator=generator)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(up)
    return down.to(weight.device), up.to(weight.device)
