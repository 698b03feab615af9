"""The LOST linear map: `lost_linear` is what modules call; `reference.lost_linear` defines what it computes."""

from torch import Tensor

from lost_kernels.lost_linear.autograd_impl import lost_linear_autograd
from lost_kernels.lost_linear.few_rows import few_rows_linear, has_few_rows
from lost_kernels.lost_linear.reference import ACTIVATIONS
from lost_kernels.lost_linear.reference import lost_linear as reference_lost_linear

__all__ = ["ACTIVATIONS", "lost_linear", "reference_lost_linear"]


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
    recompute_z: bool = False,
) -> Tensor:
    """`reference.lost_linear`, by the hand-written backward where there is one: selection_axis = columns.

    With recompute_z the backward pass makes z = [gamma act(h) | (1 - gamma) x_I] again instead of keeping it.
    """
    arguments = (x, low_rank_down, low_rank_up, sparse_weight, sparse_index, gamma, activation, bias)
    if selection_axis == "columns" and has_few_rows(x):
        return few_rows_linear(*arguments)
    if selection_axis == "columns":
        return lost_linear_autograd(*arguments, recompute_z=recompute_z)
    return reference_lost_linear(*arguments, selection_axis=selection_axis)
