"""The LOST linear map: `lost_linear` and `lost_group` are what modules call; `reference.lost_linear` defines them.

`lost_group` computes several LOST layers that read one x: they share the product with their down factors, and its
backward. `kernels` chooses how: reference (autograd of the definition), grouped (operators with a hand-written
backward), triton (the same with Triton kernels between the products, on CUDA), auto (`kernels_for` the device).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lost_kernels.choice import kernels_for
from lost_kernels.lost_linear.direct import call_directly, operators_are_seen
from lost_kernels.lost_linear.few_rows import few_rows_linear, has_few_rows
from lost_kernels.lost_linear.op import group_down, group_up
from lost_kernels.lost_linear.reference import ACTIVATIONS
from lost_kernels.lost_linear.reference import lost_linear as reference_lost_linear

__all__ = ["ACTIVATIONS", "LostWeights", "kernels_for", "lost_group", "lost_linear", "reference_lost_linear"]


class LostWeights(NamedTuple):
    """What one LOST layer multiplies with: the arguments of `reference.lost_linear` of these names."""

    low_rank_down: Tensor
    low_rank_up: Tensor
    sparse_weight: Tensor | None = None
    sparse_index: Tensor | None = None
    gamma: float | Tensor | None = None
    bias: Tensor | None = None


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
    kernels: str = "auto",
) -> Tensor:
    """`reference.lost_linear`, by the way that `kernels` names; selection_axis = rows has only the reference."""
    if kernels == "reference" or selection_axis == "rows":
        return reference_lost_linear(
            x,
            low_rank_down,
            low_rank_up,
            sparse_weight,
            sparse_index,
            gamma,
            activation,
            bias,
            selection_axis=selection_axis,
        )
    weights = LostWeights(low_rank_down, low_rank_up, sparse_weight, sparse_index, gamma, bias)
    return lost_group(x, [weights], activation, kernels=kernels)[0]


def lost_group(x: Tensor, members: Sequence[LostWeights], activation: str, *, kernels: str = "auto") -> list[Tensor]:
    """`reference.lost_linear` (selection_axis = columns) of every member for one x.

    Args:
        x: [..., K].
        members: of any ranks, numbers of kept channels and output widths; all or none with a bias, and all with the
            same kind of gamma (number, tensor or None).
        activation: a key of ACTIVATIONS.
        kernels: grouped, triton (x is on a CUDA device) or auto.

    Returns:
        y_g, [..., N_g].

    Raises:
        RuntimeError: in a second derivative; `reference.lost_linear` has one.

    Numerics: z in float32 or better, rounded once to the dtype of x, or of autocast; deterministic.
    """
    if has_few_rows(x) and not operators_are_seen():
        return [few_rows_linear(x, *member[:5], activation, member.bias) for member in members]
    kernels = kernels_for(x.device.type) if kernels == "auto" else kernels
    gammas = [member.gamma for member in members]
    sparse = [(m.sparse_weight, m.sparse_index) for m in members]
    present = [(weight, index) for weight, index in sparse if weight is not None and index is not None]
    rows = x.reshape(-1, x.shape[-1])
    downs, indices = [m.low_rank_down for m in members], [index for _, index in present]
    rest = (
        [m.low_rank_up for m in members],
        [weight for weight, _ in present],
        [gamma for gamma in gammas if isinstance(gamma, Tensor)],
        [m.bias for m in members if m.bias is not None],
        [0 if weight is None or index is None else weight.shape[1] for weight, index in sparse],
        [float(gamma) for gamma in gammas if isinstance(gamma, float | int)],
        activation,
        kernels,
    )
    if operators_are_seen():
        ys = group_up(*group_down(rows, downs, indices, kernels), *rest)
    else:
        ys = call_directly(rows, downs, indices, *rest)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
