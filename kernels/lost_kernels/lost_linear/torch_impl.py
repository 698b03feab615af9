"""What the group operators do besides matrix products, in plain torch: z, its backward, gradients of the kept columns.

Shapes: M rows, K in_features, N_g out_features, R_g low-rank and S_g kept channels of member g, W_g their padded sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lost_kernels.lost_linear.layout import Part, columns_of
from lost_kernels.lost_linear.reference import ACTIVATIONS

# ACTIVATIONS with the result written into `out`. Not gelu.out: in float32 on a CPU it leaves an `out` of strided rows
# as it was (torch 2.13).
ACTIVATED_INTO = {
    "silu": torch.ops.aten.silu.out,
    "identity": torch.ops.aten.clone.out,
    "gelu": lambda h, out: out.copy_(ACTIVATIONS["gelu"](h)),
    "relu": torch.ops.aten.relu.out,
}
# Of a gradient and the activation's input; into `out`.
DERIVED_INTO = {
    "silu": lambda gradient, h, out: torch.ops.aten.silu_backward.grad_input(gradient, h, grad_input=out),
    "identity": lambda gradient, h, out: out.copy_(gradient),  # noqa: ARG005
    "gelu": lambda gradient, h, out: out.copy_(torch.ops.aten.gelu_backward(gradient, h)),
    "relu": lambda gradient, h, out: torch.ops.aten.threshold_backward.grad_input(gradient, h, 0, grad_input=out),
}
# The same without `out`.
DERIVATIVES = {
    "silu": torch.ops.aten.silu_backward,
    "identity": lambda gradient, h: gradient,  # noqa: ARG005
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda gradient, h: torch.ops.aten.threshold_backward(gradient, h, 0),
}

Gammas = list[Tensor] | list[float]


def joined_activations(h: Tensor, kept: Tensor, parts: Sequence[Part], gammas: Gammas, activation: str) -> Tensor:
    """z = [gamma act(h_g) | (1 - gamma) kept_g | 0] of every member, [M, sum W_g], in the dtype of h."""
    z = h.new_empty(h.shape[0], parts[-1].start + parts[-1].width)
    for number, part in enumerate(parts):
        own_h, own_kept = columns_of(h, part.low, part.rank), columns_of(kept, part.sparse, part.num_kept)
        low, sparse, zeros = columns_of(z, part.start, part.width).split_with_sizes(part.sizes, 1)
        if _wide(h) is h.dtype:
            # Written where it belongs: 2 % of a layer's time on a CPU.
            ACTIVATED_INTO[activation](own_h, out=low)
            sparse.copy_(own_kept)
            if gammas:
                low.mul_(gammas[number])
                sparse.mul_(1 - gammas[number])
        else:
            low.copy_(_scaled(ACTIVATIONS[activation](own_h.to(_wide(h))), gammas, number))
            sparse.copy_(_sparse_scaled(own_kept.to(_wide(h)), gammas, number))
        zeros.zero_()
    return z


def joined_activations_backward(
    dz: Tensor, h: Tensor, kept: Tensor, parts: Sequence[Part], gammas: Gammas, activation: str, *, needs_gamma: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh, dkept in the dtype of h, and the gradients of the gammas, [G], float32 or better, if they are needed."""
    dh, dkept, d_gammas = torch.empty_like(h), torch.empty_like(kept), []
    for number, part in enumerate(parts):
        low, sparse = (part.low, part.rank), (part.sparse, part.num_kept)
        dz_low, dz_sparse, _ = columns_of(dz, part.start, part.width).to(_wide(h)).split_with_sizes(part.sizes, 1)
        own_h, own_dh, own_dkept = columns_of(h, *low).to(_wide(h)), columns_of(dh, *low), columns_of(dkept, *sparse)
        if _wide(h) is h.dtype:
            DERIVED_INTO[activation](dz_low, own_h, own_dh)
            own_dkept.copy_(dz_sparse)
            if gammas:
                own_dh.mul_(gammas[number])
                own_dkept.mul_(1 - gammas[number])
        else:
            own_dh.copy_(_scaled(DERIVATIVES[activation](dz_low, own_h), gammas, number))
            own_dkept.copy_(_sparse_scaled(dz_sparse, gammas, number))
        if needs_gamma:
            from_low = (ACTIVATIONS[activation](own_h) * dz_low).sum()
            d_gammas.append(from_low - (columns_of(kept, *sparse).to(_wide(h)) * dz_sparse).sum())
    return dh, dkept, torch.stack(d_gammas) if needs_gamma else None


def add_kept_gradients(d_x: Tensor, dkept: Tensor, indices: list[Tensor]) -> None:
    """d_x[:, I_g] += dkept_g for every member in turn, in place."""
    if d_x.device.type == "cpu":
        d_x.index_add_(1, _joined(indices), dkept)
        return
    # The channels of one member are distinct, so no sum has two writers: the same bits in every run.
    for index, own in zip(indices, dkept.split([len(index) for index in indices], 1), strict=True):
        d_x.index_copy_(1, index, d_x.index_select(1, index) + own)


def kept_columns(x: Tensor, indices: list[Tensor]) -> Tensor:
    """x[:, I_g] side by side, [M, sum S_g]."""
    return x.index_select(1, _joined(indices)) if indices else x.new_empty(x.shape[0], 0)


def joined_downs(downs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[A_1; A_2; ..], [sum R_g, K]."""
    return _joined([down.to(dtype) for down in downs])


def joined_ups(
    up: Tensor, sparse_weight: Tensor | None, width: int, dtype: torch.dtype, gamma: float | None = None
) -> Tensor:
    """[gamma B | (1 - gamma) W_s | 0], [N, width]; without gamma unscaled."""
    if sparse_weight is None and gamma is None and up.shape[1] == width:
        return up.to(dtype)
    joined = up.new_empty(up.shape[0], width, dtype=dtype)
    num_kept = 0 if sparse_weight is None else sparse_weight.shape[1]
    low, sparse, zeros = joined.split_with_sizes([up.shape[1], num_kept, width - up.shape[1] - num_kept], 1)
    if gamma is None:
        low.copy_(up)
    else:
        torch.mul(up.to(dtype), gamma, out=low)
    if sparse_weight is not None and gamma is None:
        sparse.copy_(sparse_weight)
    elif sparse_weight is not None and gamma is not None:
        torch.mul(sparse_weight.to(dtype), 1 - gamma, out=sparse)
    zeros.zero_()
    return joined


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _scaled(values: Tensor, gammas: Gammas, number: int) -> Tensor:
    return values * gammas[number] if gammas else values


def _sparse_scaled(values: Tensor, gammas: Gammas, number: int) -> Tensor:
    return values * (1 - gammas[number]) if gammas else values
