"""What the linear layers cost in each parameterization: the one place where accounting knows their forms.

A new parameterization adds one function to COSTS, by its config class.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from lost.accounting.shapes import LinearShape, head_linear, linear_shapes
from lost.accounting.targets import LostShape, lost_shapes
from lost.config.model import DenseConfig, LostConfig, ModelConfig, ParameterizationConfig
from lost.utils.errors import ConfigError

# Projections that read one input, with the first of them (`lost.model.blocks`).
FIRST_READER = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_proj"),
}


@dataclass(frozen=True)
class LinearCost:
    """Parameters and products of one linear layer, and what its forward pass keeps for its backward pass.

    Args:
        num_parameters: trained numbers.
        num_index: entries of int64 buffers.
        forward_macs: multiply-adds of the matrix products, per token.
        saved_values: numbers kept per token in the compute dtype, the layer's input left out.
        num_cast_weights: weights of which autocast keeps a copy in its own dtype.
        saved_float32: numbers kept per token in float32 where that is not the compute dtype, else in it.
        num_input_casts: copies of the layer's input that autocast makes.
        low_rank_values: of saved_values, those that runtime.recompute=p0 to p3 keep.
    """

    linear: LinearShape
    num_parameters: int
    num_index: int
    forward_macs: int
    saved_values: int
    num_cast_weights: int
    saved_float32: int = 0
    num_input_casts: int = 1
    low_rank_values: int = 0


def dense_cost(linear: LinearShape) -> LinearCost:
    weights = linear.num_weights
    return LinearCost(linear, weights, num_index=0, forward_macs=weights, saved_values=0, num_cast_weights=weights)


def lost_cost(shape: LostShape, config: LostConfig) -> LinearCost:
    """R (in + out) for the factors, S out (rows: S in) for the kept channels; every weight is used once per token.

    With selection_axis = columns the layer keeps h = x A^T and the S kept channels, and casts its weights
    again in the backward pass; with rows it is plain autograd, which keeps act(h) too, h in float32, and an input for
    each of the two products.
    """
    linear = shape.linear
    is_plain = config.selection_axis == "rows"
    has_activation = config.activation != "identity"
    sparse_width = linear.in_features if is_plain else linear.out_features
    weights = shape.lost_rank * (linear.in_features + linear.out_features) + shape.num_kept * sparse_width
    return LinearCost(
        linear,
        num_parameters=weights + (config.gamma_mode == "learnable"),
        num_index=shape.num_kept,
        forward_macs=weights,
        saved_values=shape.lost_rank + (0 if is_plain else shape.num_kept),
        num_cast_weights=weights if is_plain else 0,
        saved_float32=shape.lost_rank if is_plain and has_activation else 0,
        num_input_casts=2 if is_plain and shape.num_kept else 1,
        low_rank_values=shape.lost_rank + shape.num_kept,
    )


def _dense_costs(config: DenseConfig, linears: list[LinearShape]) -> list[LinearCost]:  # noqa: ARG001
    return [dense_cost(linear) for linear in linears]


def _lost_costs(config: LostConfig, linears: list[LinearShape]) -> list[LinearCost]:
    replaced = {shape.linear.name: lost_cost(shape, config) for shape in lost_shapes(config, linears)}
    for name, cost in replaced.items():
        block, _, own = name.rpartition(".")
        first = FIRST_READER.get(own)
        # Layers that share one group of operators share their input's copy; it is counted with the first of them.
        group = [f"{block}.{member}" for member in FIRST_READER if first and FIRST_READER[member] == first]
        if config.selection_axis == "columns" and first not in (None, own) and replaced.keys() >= set(group):
            replaced[name] = replace(cost, num_input_casts=0)
    return [replaced.get(linear.name, dense_cost(linear)) for linear in linears]


COSTS: dict[type[ParameterizationConfig], Callable[[Any, list[LinearShape]], list[LinearCost]]] = {
    DenseConfig: _dense_costs,
    LostConfig: _lost_costs,
}


def linear_costs(model: ModelConfig, parameterization: ParameterizationConfig) -> list[LinearCost]:
    """Costs of every linear layer of the model, lm_head last.

    Raises:
        ConfigError: the parameterization does not fit the model.
    """
    costs = COSTS[type(parameterization)](parameterization, linear_shapes(model))
    head = costs[-1]
    if model.tie_word_embeddings and head != dense_cost(head_linear(model)):
        raise ConfigError(
            "model.tie_word_embeddings = true shares lm_head's weight with the embedding, but target_modules replaces"
            " lm_head: leave lm_head out of parameterization.target_modules or untie"
        )
    return costs


def sum_of(costs: Iterable[LinearCost], key: str) -> int:
    return sum(getattr(cost, key) for cost in costs)
