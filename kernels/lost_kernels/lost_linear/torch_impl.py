"""What the group operators do besides matrix products, in plain torch: z, its backward, gradients of the kept columns.

Shapes: M rows, K in_features, N_g out_features, R_g low-rank and S_g kept channels of member g, W_g their padded sum.
"""

import torch
from torch import Tensor

from lost_kernels.lost_linear.layout import Part
from lost_kernels.lost_linear.reference import ACTIVATIONS

# ACTIVATIONS with the result written into `out`. Not gelu.out: in float32 on a CPU it leaves an `out` of strided rows
# as it was (torch 2.13).
ACTIVATED_INTO = {
    "silu": torch.ops.aten.silu.out,
    "identity": torch.ops.aten.clone.out,
    "gelu": lambda h, out: out.copy_(ACTIVATIONS["gelu"](h)),
    "relu": torch.ops.aten.relu.out,
}
# Of a gradient and the activation's input.
DERIVATIVES = {
    "silu": torch.ops.aten.silu_backward,
    "identity": lambda gradient, h: gradient,  # noqa: ARG005
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda gradient, h: torch.ops.aten.threshold_backward(gradient, h, 0),
}

Gammas = list[Tensor] | list[float]


def joined_activations(
    h: Tensor, kept: Tensor, parts: list[Part], gammas: Gammas, activation: str, out: Tensor | None = None
) -> Tensor:
    """z = [gamma act(h_g) | (1 - gamma) kept_g | 0] of every member, [M, sum W_g], in the dtype of h."""
    z = h.new_empty(h.shape[0], parts[-1].start + parts[-1].width) if out is None else out
    for number, part in enumerate(parts):
        own_h, own_kept = h[:, part.low_columns], kept[:, part.kept_columns]
        low, sparse, zeros = z[:, part.z_columns].split(_sizes(part), 1)
        if not gammas and _wide(h) is h.dtype:
            # Written where it belongs: 2 % of a layer's time on a CPU.
            ACTIVATED_INTO[activation](own_h, out=low)
            sparse.copy_(own_kept)
        else:
            low.copy_(_scaled(ACTIVATIONS[activation](own_h.to(_wide(h))), gammas, number))
            sparse.copy_(_sparse_scaled(own_kept.to(_wide(h)), gammas, number))
        zeros.zero_()
    return z


def joined_activations_backward(
    dz: Tensor, h: Tensor, kept: Tensor, parts: list[Part], gammas: Gammas, activation: str, *, needs_gamma: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh, dkept in the dtype of h, and the gradients of the gammas, [G], float32 or better, if they are needed."""
    dh, dkept, d_gammas = torch.empty_like(h), torch.empty_like(kept), []
    for number, part in enumerate(parts):
        dz_low, dz_sparse, _ = dz[:, part.z_columns].to(_wide(h)).split(_sizes(part), 1)
        own_h = h[:, part.low_columns].to(_wide(h))
        if activation == "silu" and not gammas and _wide(h) is h.dtype:
            torch.ops.aten.silu_backward.grad_input(dz_low, own_h, grad_input=dh[:, part.low_columns])
        else:
            dh[:, part.low_columns] = _scaled(DERIVATIVES[activation](dz_low, own_h), gammas, number)
        dkept[:, part.kept_columns] = _sparse_scaled(dz_sparse, gammas, number)
        if needs_gamma:
            from_low = (ACTIVATIONS[activation](own_h) * dz_low).sum()
            d_gammas.append(from_low - (kept[:, part.kept_columns].to(_wide(h)) * dz_sparse).sum())
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


def joined_weights(
    ups: list[Tensor], sparse_weights: list[Tensor], parts: list[Part], gammas: Gammas, dtype: torch.dtype
) -> list[Tensor]:
    """[gamma B_g | (1 - gamma) W_s,g | 0] of every member, [N_g, W_g]; without gammas [B_g | W_s,g | 0]."""
    found, sparse = [], iter(sparse_weights)
    for number, (up, part) in enumerate(zip(ups, parts, strict=True)):
        if part.rank == part.width and not gammas:
            found.append(up.to(dtype))
            continue
        joined = up.new_empty(up.shape[0], part.width, dtype=dtype)
        low, columns, zeros = joined.split(_sizes(part), 1)
        _write(low, up, gammas[number] if gammas else None)
        if part.num_kept:
            _write(columns, next(sparse), 1 - gammas[number] if gammas else None)
        zeros.zero_()
        found.append(joined)
    return found


def gammas_backward(
    d_weights: list[Tensor], ups: list[Tensor], sparse_weights: list[Tensor], parts: list[Part]
) -> Tensor:
    """The gradients of the gammas, [G], from dy_g^T [act(h_g) | kept_g | 0]."""
    found, sparse = [], iter(sparse_weights)
    for d_weight, up, part in zip(d_weights, ups, parts, strict=True):
        low, columns, _ = d_weight.split(_sizes(part), 1)
        d_gamma = (low * up).sum()
        found.append(d_gamma - (columns * next(sparse)).sum() if part.num_kept else d_gamma)
    return torch.stack(found).to(d_weights[0].dtype)


def scale_weight_gradients(d_weights: list[Tensor], parts: list[Part], gammas: Gammas) -> None:
    """From those of the joined weights to those of B_g and W_s,g, in place."""
    for d_weight, part, gamma in zip(d_weights, parts, gammas, strict=bool(gammas)):
        low, columns, _ = d_weight.split(_sizes(part), 1)
        low.mul_(gamma)
        columns.mul_(1 - gamma)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _sizes(part: Part) -> list[int]:
    return [part.rank, part.num_kept, part.width - part.rank - part.num_kept]


def _write(place: Tensor, weight: Tensor, scale: Tensor | float | None) -> None:
    if scale is None:
        place.copy_(weight)
    else:
        torch.mul(weight, scale, out=place)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _scaled(values: Tensor, gammas: Gammas, number: int) -> Tensor:
    return values * gammas[number] if gammas else values


def _sparse_scaled(values: Tensor, gammas: Gammas, number: int) -> Tensor:
    return values * (1 - gammas[number]) if gammas else values
