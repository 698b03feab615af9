"""How many triplets each layer gets: pure arithmetic on shapes and squared singular values.

Shapes: N out_features, K in_features, R lost_rank, S kept channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lost.utils.errors import ConfigError

# Sums of squares come to a share of 1 only to rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class LayerSize:
    """A layer to convert and what it costs, in parameters.

    Attributes:
        num_kept: S.
        num_more: parameters beside factors and sparse block that LOST form adds (a learnable gamma).
    """

    name: str
    out_features: int
    in_features: int
    num_kept: int
    num_more: int = 0

    @property
    def num_dense(self) -> int:
        return self.out_features * self.in_features

    @property
    def cost_of_triplet(self) -> int:
        return self.out_features + self.in_features

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)

    def num_parameters(self, rank: int) -> int:
        return rank * self.cost_of_triplet + self.num_kept * self.out_features + self.num_more

    @property
    def largest_saving_rank(self) -> int:
        """The highest rank at which the layer is smaller than dense; below 1 where none is."""
        return (self.num_dense - 1 - self.num_parameters(0)) // self.cost_of_triplet


def saving_problems(layers: Sequence[LayerSize], ranks: Mapping[str, int]) -> list[str]:
    """One problem that names the first layers which get no smaller, or none."""
    wasteful = [layer for layer in layers if layer.num_parameters(ranks[layer.name]) >= layer.num_dense]
    if not wasteful:
        return []
    first = wasteful[0]
    highest = first.largest_saving_rank
    fix = (
        f"its rank must be at most {highest}" if highest > 0 else f"its {first.num_kept} kept channels alone cost that"
    )
    more = f", as do {len(wasteful) - 1} more layers" if len(wasteful) > 1 else ""
    return [
        f"{first.name} at rank {ranks[first.name]} with {first.num_kept} kept channels has"
        f" {first.num_parameters(ranks[first.name]):,} parameters, dense {first.num_dense:,}: it saves nothing{more};"
        f" {fix}. Lower lost_rank or density, leave it out of target_modules, or set require_saving=false"
    ]


def ranks_by_energy(
    layers: Sequence[LayerSize], squares: Mapping[str, Tensor], energy: float, *, require_saving: bool
) -> dict[str, int]:
    """The smallest rank of each layer whose triplets hold the share `energy` of its squared singular values.

    Args:
        squares: of each layer, falling, float64 [min(N, K)].
        require_saving: leave out layers that would get no smaller: they stay dense, which keeps all.
    """
    found = {}
    for layer in layers:
        kept = squares[layer.name].cumsum(0)
        total = float(kept[-1])
        rank = 1 + int((kept < (energy - ROUNDING) * total).sum()) if total > 0 else 1
        rank = min(rank, layer.full_rank)
        if not require_saving or rank <= layer.largest_saving_rank:
            found[layer.name] = rank
    return found


def ranks_by_budget(
    layers: Sequence[LayerSize],
    squares: Mapping[str, Tensor],
    budget: int,
    *,
    num_other: int = 0,
    require_saving: bool,
) -> dict[str, int]:
    """Ranks of at least 1 with which the model has at most `budget` parameters, and the most energy for them.

    A triplet is worth its share of its layer's energy times the layer's weights, so that the size of a layer counts and
    the scale of its weights, which the norm before it can undo, does not. Those worth most per parameter come first;
    within a layer worth falls, so that what is taken is the best choice for the parameters spent. (At half the
    parameters of a llama_tiny trained for 200 steps perplexity 111.0 became 117.9 so, and 121.2 where every layer's
    share counts alike.)

    Args:
        squares: as in `ranks_by_energy`.
        budget: parameters of `layers` and all that is beside them.
        num_other: parameters beside `layers`, which stay.
        require_saving: no rank at which a layer gets no smaller.
    Raises:
        ConfigError: even rank 1 everywhere costs more, or a layer's kept channels alone cost more than it does dense.
    """
    tops = {layer.name: layer.largest_saving_rank if require_saving else layer.full_rank for layer in layers}
    ranks = {layer.name: 1 for layer in layers}
    if problems := saving_problems(layers, ranks) if require_saving else []:
        raise ConfigError(problems)
    left = budget - num_other - sum(layer.num_parameters(1) for layer in layers)
    if left < 0:
        raise ConfigError(
            f"parameters: at most {budget:,} are asked for, and rank 1 everywhere has {budget - left:,}, of which"
            f" {num_other:,} are not converted (embeddings, norms, head): raise parameters to at least"
            f" {budget - left}, or lower density"
        )
    value, place, order = [], [], []
    for number, layer in enumerate(layers):
        share = squares[layer.name][1 : tops[layer.name]] / squares[layer.name].sum().clamp_min(1e-300)
        value.append(share * layer.num_dense / layer.cost_of_triplet)
        place.append(torch.full((len(share),), number))
        order.append(torch.arange(len(share)))
    values, places = torch.cat(value), torch.cat(place)
    # Falling by value; among equals the layer's earlier triplets first.
    by_order = torch.cat(order).argsort(stable=True)
    falling = by_order[values[by_order].argsort(descending=True, stable=True)]
    for number in places[falling].tolist():
        layer = layers[number]
        if layer.cost_of_triplet <= left:
            left -= layer.cost_of_triplet
            ranks[layer.name] += 1
    return ranks
