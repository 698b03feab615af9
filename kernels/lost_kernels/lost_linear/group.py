"""What a group of LOST layers that read one x computes, forward and backward, around the matrix products.

h = x [A_1; A_2; ..]^T, kept = x[:, I_g] side by side, z_g = [gamma act(h_g) | (1 - gamma) kept_g | 0],
y_g = z_g [B_g | W_s,g | 0]^T. What lies between forward and backward is x, h and the kept columns.

Plain functions without a gradient: `op` makes operators of them, `direct` an autograd.Function.

Shapes: M rows, K in_features, N_g out_features, R_g low-rank and S_g kept channels of member g.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lost_kernels.choice import computes_in_triton
from lost_kernels.lost_linear import torch_impl
from lost_kernels.lost_linear.layout import Part, columns_of, known_parts_of


def down(
    x: Tensor,
    downs: list[Tensor],
    indices: list[Tensor],
    kernels: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """h, [M, sum R_g], and the kept columns of x, [M, sum S_g], unscaled; both in the dtype of x.

    Args:
        x: [M, K].
        downs: A_g, [R_g, K].
        indices: I_g, int64 [S_g], each channel once; of the members that have a sparse block.
        kernels: grouped (plain torch) or triton (CUDA), for what is no matrix product.
    """
    return x @ torch_impl.joined_downs(downs, x.dtype).T, torch_impl.kept_columns(x, indices)


def down_backward(
    dh: Tensor,
    dkept: Tensor,
    x: Tensor,
    downs: list[Tensor],
    indices: list[Tensor],
    kernels: str,
    needs_x: bool,
    needs_downs: bool,
) -> list[Tensor]:
    """The gradients of x, [M, K], and of [A_1; A_2; ..], [sum R_g, K], in the dtype of x; those that are needed."""
    found = []
    if needs_x:
        d_x = dh @ torch_impl.joined_downs(downs, x.dtype)
        if indices:
            _pointwise(kernels, x).add_kept_gradients(d_x, dkept, indices)
        found.append(d_x)
    if needs_downs:
        found.append(dh.T @ x)
    return found


def down_gradients(
    found: list[Tensor], downs: Sequence[Tensor], needs_x: bool, needs_downs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of every A_g, in its dtype, from what `down_backward` gave; None where not needed."""
    d_x = found[0] if needs_x else None
    if not any(needs_downs):
        return d_x, [None] * len(downs)
    blocks = found[-1].split_with_sizes([len(down) for down in downs])
    return d_x, [_to(block, down, needs) for block, down, needs in zip(blocks, downs, needs_downs, strict=True)]


def up(
    h: Tensor,
    kept: Tensor,
    ups: list[Tensor],
    sparse_weights: list[Tensor],
    learned_gammas: list[Tensor],
    biases: list[Tensor],
    num_kept: list[int],
    fixed_gammas: list[float],
    activation: str,
    kernels: str,
) -> list[Tensor]:
    """y_g, [M, N_g], of every member, in the dtype of h.

    Args:
        h: [M, sum R_g].
        kept: [M, sum S_g].
        ups: B_g, [N_g, R_g].
        sparse_weights: W_s,g, [N_g, S_g], of the members that have a sparse block.
        learned_gammas: one tensor [1] a member; or none.
        biases: [N_g] a member; or none.
        num_kept: S_g, 0 for a member without a sparse block.
        fixed_gammas: one number a member; or none. Without both kinds nothing is scaled (gamma is in the weights).
        activation: a key of `reference.ACTIVATIONS`.
        kernels: as in `group_down`.
    """
    parts = known_parts_of(ups, num_kept)
    z_gammas, weight_gammas = _places(learned_gammas, fixed_gammas, kernels, h)
    z = _pointwise(kernels, h).joined_activations(h, kept, parts, z_gammas, activation)
    weights = _joined_weights(ups, sparse_weights, parts, weight_gammas, h.dtype)
    blocks = _blocks(z, parts)
    if biases:
        return [
            torch.addmm(bias.to(h.dtype), block, weight.T)
            for bias, block, weight in zip(biases, blocks, weights, strict=True)
        ]
    return [block @ weight.T for block, weight in zip(blocks, weights, strict=True)]


def up_backward(
    dys: list[Tensor],
    h: Tensor,
    kept: Tensor,
    ups: list[Tensor],
    sparse_weights: list[Tensor],
    learned_gammas: list[Tensor],
    num_kept: list[int],
    fixed_gammas: list[float],
    activation: str,
    kernels: str,
    needs_h: bool,
    needs_gammas: bool,
    needs_weights: bool,
) -> list[Tensor]:
    """dh, dkept in the dtype of h; then the gammas' gradients, [G], float32 or better; then dy_g^T z_g of every member.

    Each is there only if it is needed.
    """
    parts, pointwise, found = known_parts_of(ups, num_kept), _pointwise(kernels, h), []
    gammas, weight_gammas = _places(learned_gammas, fixed_gammas, kernels, h)
    if needs_h or needs_gammas:
        dz = h.new_empty(h.shape[0], parts[-1].start + parts[-1].width)
        weights = _joined_weights(ups, sparse_weights, parts, weight_gammas, h.dtype)
        for dy, weight, block in zip(dys, weights, _blocks(dz, parts), strict=True):
            torch.mm(dy, weight, out=block)
        dh, dkept, d_gammas = pointwise.joined_activations_backward(
            dz, h, kept, parts, gammas, activation, needs_gamma=needs_gammas
        )
        found += [dh, dkept] if needs_h else []
        found += [d_gammas] if needs_gammas else []
        del dz
    if needs_weights:
        z = pointwise.joined_activations(h, kept, parts, gammas, activation)
        d_weights = [dy.T @ block for dy, block in zip(dys, _blocks(z, parts), strict=True)]
        for d_weight, part, gamma in zip(d_weights, parts, weight_gammas, strict=bool(weight_gammas)):
            low, sparse, _ = d_weight.split_with_sizes(part.sizes, 1)
            low.mul_(gamma)
            sparse.mul_(1 - gamma)
        found += d_weights
    return found


def up_gradients(
    found: list[Tensor],
    dys: Sequence[Tensor],
    parameters: Sequence[Sequence[Tensor]],
    parts: Sequence[Part],
    needs_h: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:
    """dh, dkept and the gradients of the parameters, in their dtypes, from what `up_backward` gave.

    Args:
        found: changed.
        dys: dy_g, [M, N_g].
        parameters: ups, sparse_weights, learned_gammas and biases as in `up`.
        parts: of the members.
        needs_h: whether h or kept has a gradient.
        needs: of every parameter, in the order of `parameters`.
    """
    ups, sparse_weights, learned_gammas, biases = parameters
    needs_ups, needs_sparse, needs_gammas, needs_biases = needs
    dh, dkept = (found.pop(0), found.pop(0)) if needs_h else (None, None)
    d_gammas: list[Tensor | None] = [None] * len(learned_gammas)
    if any(needs_gammas):
        values = found.pop(0)
        d_gammas = [_to(values[i].view_as(gamma), gamma, needs_gammas[i]) for i, gamma in enumerate(learned_gammas)]
    d_ups: list[Tensor | None] = [None] * len(ups)
    d_sparse: list[Tensor | None] = [None] * len(sparse_weights)
    if any(needs_ups) or any(needs_sparse):
        sparse_of = iter(range(len(sparse_weights)))
        for number, (d_weight, part) in enumerate(zip(found, parts, strict=True)):
            low, sparse, _ = d_weight.split_with_sizes(part.sizes, 1)
            d_ups[number] = _to(low, ups[number], needs_ups[number])
            if part.num_kept:
                own = next(sparse_of)
                d_sparse[own] = _to(sparse, sparse_weights[own], needs_sparse[own])
    d_biases = [
        dy.sum(0).to(bias.dtype) if needs else None
        for dy, bias, needs in zip(dys, biases, needs_biases, strict=bool(biases))
    ]
    return dh, dkept, [d_ups, d_sparse, d_gammas, d_biases]


def _pointwise(kernels: str, values: Tensor) -> Any:
    """What is no product."""
    if not computes_in_triton(kernels, values):
        return torch_impl
    from lost_kernels.lost_linear import triton_impl

    return triton_impl


def _places(
    learned_gammas: list[Tensor], fixed_gammas: list[float], kernels: str, h: Tensor
) -> tuple[list[Tensor] | list[float], list[float]]:
    """The gammas that multiply z, and those that multiply the joined weights.

    In half precision a weight times gamma would be rounded once more than z is. In float32 and better, where torch does
    the work, the weights are copied anyway, and z is not gone through once more.
    """
    is_wide = torch.promote_types(h.dtype, torch.float32) is h.dtype
    if fixed_gammas and is_wide and _pointwise(kernels, h) is torch_impl:
        return [], fixed_gammas
    return learned_gammas or fixed_gammas, []


def _joined_weights(
    ups: list[Tensor], sparse_weights: list[Tensor], parts: Sequence[Part], gammas: list[float], dtype: torch.dtype
) -> list[Tensor]:
    """[gamma B_g | (1 - gamma) W_s,g | 0] of every member, [N_g, W_g]; without gammas unscaled."""
    sparse = iter(sparse_weights)
    return [
        torch_impl.joined_ups(
            up, next(sparse) if part.num_kept else None, part.width, dtype, gammas[number] if gammas else None
        )
        for number, (up, part) in enumerate(zip(ups, parts, strict=True))
    ]


def _blocks(z: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    return [columns_of(z, part.start, part.width) for part in parts]


def split(tensors: Sequence, counts: Sequence[int]) -> list[list]:
    """The first counts[0], the next counts[1] and so on."""
    found, start = [], 0
    for count in counts:
        found.append(list(tensors[start : start + count]))
        start += count
    return found


def _to(gradient: Tensor, parameter: Tensor, is_needed: bool) -> Tensor | None:
    return gradient.to(parameter.dtype) if is_needed else None
