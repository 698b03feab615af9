"""The two operators of a group of LOST layers that read one x: `lost::group_down` and `lost::group_up`.

Opaque to compilers and to recomputation: what lies between forward and backward is x, h and the kept columns.
h = x [A_1; A_2; ..]^T, kept = x[:, I_g] side by side, z_g = [gamma act(h_g) | (1 - gamma) kept_g | 0],
y_g = z_g [B_g | W_s,g | 0]^T.

Shapes: M rows, K in_features, N_g out_features, R_g low-rank and S_g kept channels of member g.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lost_kernels.lost_linear import torch_impl
from lost_kernels.lost_linear.layout import Part, parts_of

KERNELS = ("grouped", "triton")


@torch.library.custom_op("lost::group_down", mutates_args=())
def group_down(
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


@group_down.register_fake
def _(x, downs, indices, kernels):  # noqa: ARG001
    return x.new_empty(x.shape[0], _total_rank(downs)), x.new_empty(x.shape[0], _total_kept(indices))


@torch.library.custom_op("lost::group_down_backward", mutates_args=())
def group_down_backward(
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
            _pointwise(kernels, x.dtype).add_kept_gradients(d_x, dkept, indices)
        found.append(d_x)
    if needs_downs:
        found.append(dh.T @ x)
    return found


@group_down_backward.register_fake
def _(dh, dkept, x, downs, indices, kernels, needs_x, needs_downs):  # noqa: ARG001
    d_x = [x.new_empty(x.shape)] if needs_x else []
    return d_x + ([x.new_empty(_total_rank(downs), x.shape[1])] if needs_downs else [])


def _keep_down(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ARG001
    x, downs, indices, kernels = inputs
    ctx.save_for_backward(x, *downs, *indices)
    ctx.num_downs, ctx.kernels = len(downs), kernels


def _down_backward(ctx: Any, dh: Tensor, dkept: Tensor) -> tuple:
    x, *others = ctx.saved_tensors
    downs, indices = others[: ctx.num_downs], others[ctx.num_downs :]
    needs_x, needs_downs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    found = torch.ops.lost.group_down_backward(dh, dkept, x, downs, indices, ctx.kernels, needs_x, any(needs_downs))
    d_x = found.pop(0) if needs_x else None
    d_downs: list[Tensor | None] = [None] * len(downs)
    if any(needs_downs):
        blocks = found[0].split([len(down) for down in downs])
        d_downs = [_to(block, down, needs) for block, down, needs in zip(blocks, downs, needs_downs, strict=True)]
    return d_x, d_downs, [None] * len(indices), None


group_down.register_autograd(_down_backward, setup_context=_keep_down)


@torch.library.custom_op("lost::group_up", mutates_args=())
def group_up(
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
    parts = parts_of(ups, num_kept)
    z = _pointwise(kernels, h.dtype).joined_activations(h, kept, parts, learned_gammas or fixed_gammas, activation)
    weights = _joined_weights(ups, sparse_weights, parts, h.dtype)
    blocks = _blocks(z, parts)
    if biases:
        return [
            torch.addmm(bias.to(h.dtype), block, weight.T)
            for bias, block, weight in zip(biases, blocks, weights, strict=True)
        ]
    return [block @ weight.T for block, weight in zip(blocks, weights, strict=True)]


@group_up.register_fake
def _(h, kept, ups, sparse_weights, learned_gammas, biases, num_kept, fixed_gammas, activation, kernels):  # noqa: ARG001
    return [h.new_empty(h.shape[0], up.shape[0]) for up in ups]


@torch.library.custom_op("lost::group_up_backward", mutates_args=())
def group_up_backward(
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
    parts, gammas = parts_of(ups, num_kept), learned_gammas or fixed_gammas
    pointwise, found = _pointwise(kernels, h.dtype), []
    if needs_h or needs_gammas:
        dz = h.new_empty(h.shape[0], parts[-1].start + parts[-1].width)
        weights = _joined_weights(ups, sparse_weights, parts, h.dtype)
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
        found += [dy.T @ block for dy, block in zip(dys, _blocks(z, parts), strict=True)]
    return found


@group_up_backward.register_fake
def _(
    dys,
    h,
    kept,
    ups,
    sparse_weights,  # noqa: ARG001
    learned_gammas,
    num_kept,
    fixed_gammas,  # noqa: ARG001
    activation,  # noqa: ARG001
    kernels,  # noqa: ARG001
    needs_h,
    needs_gammas,
    needs_weights,
):
    found = [h.new_empty(h.shape), kept.new_empty(kept.shape)] if needs_h else []
    if needs_gammas:
        found.append(h.new_empty(len(learned_gammas), dtype=torch.promote_types(h.dtype, torch.float32)))
    if needs_weights:
        parts = parts_of(ups, num_kept)
        found += [h.new_empty(dy.shape[1], part.width) for dy, part in zip(dys, parts, strict=True)]
    return found


def _keep_up(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:  # noqa: ARG001
    h, kept, ups, sparse_weights, learned_gammas, biases, *ctx.settings = inputs
    ctx.counts = [len(ups), len(sparse_weights), len(learned_gammas), len(biases)]
    ctx.save_for_backward(h, kept, *ups, *sparse_weights, *learned_gammas, *biases)


def _up_backward(ctx: Any, dys: list[Tensor]) -> tuple:
    h, kept, *others = ctx.saved_tensors
    ups, sparse_weights, learned_gammas, biases = _split(others, ctx.counts)
    needs_h = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    needs_ups, needs_sparse, needs_gammas, needs_biases = ctx.needs_input_grad[2:6]
    needs_weights = any(needs_ups) or any(needs_sparse)
    found = torch.ops.lost.group_up_backward(
        dys, h, kept, ups, sparse_weights, learned_gammas, *ctx.settings, needs_h, any(needs_gammas), needs_weights
    )
    dh, dkept = (found.pop(0), found.pop(0)) if needs_h else (None, None)
    d_gammas: list[Tensor | None] = [None] * len(learned_gammas)
    if any(needs_gammas):
        values = found.pop(0)
        d_gammas = [_to(values[i : i + 1], gamma, needs_gammas[i]) for i, gamma in enumerate(learned_gammas)]
    d_ups: list[Tensor | None] = [None] * len(ups)
    d_sparse: list[Tensor | None] = [None] * len(sparse_weights)
    if needs_weights:
        parts = parts_of(ups, ctx.settings[0])
        sparse_of = iter(range(len(sparse_weights)))
        for number, (d_weight, part) in enumerate(zip(found, parts, strict=True)):
            d_ups[number] = _to(d_weight[:, : part.rank], ups[number], needs_ups[number])
            if part.num_kept:
                own = next(sparse_of)
                columns = d_weight[:, part.rank : part.rank + part.num_kept]
                d_sparse[own] = _to(columns, sparse_weights[own], needs_sparse[own])
    d_biases = (
        [dy.sum(0).to(bias.dtype) if needs else None for dy, bias, needs in zip(dys, biases, needs_biases, strict=True)]
        if biases
        else []
    )
    # Of num_kept and fixed_gammas, which are lists too: an empty one counts as a list of no tensors.
    num_kept, fixed_gammas = None, None if ctx.settings[1] else []
    return dh, dkept, d_ups, d_sparse, d_gammas, d_biases, num_kept, fixed_gammas, None, None


group_up.register_autograd(_up_backward, setup_context=_keep_up)


def _pointwise(kernels: str, dtype: torch.dtype) -> Any:
    """What is no product. The Triton kernels compute in float32, so float64 is left to torch."""
    assert kernels in KERNELS, kernels
    if kernels == "grouped" or dtype == torch.float64:
        return torch_impl
    from lost_kernels.lost_linear import triton_impl

    return triton_impl


def _joined_weights(ups: list[Tensor], sparse_weights: list[Tensor], parts: list[Part], dtype: torch.dtype):
    """[B_g | W_s,g | 0] of every member, [N_g, W_g]."""
    sparse = iter(sparse_weights)
    return [
        torch_impl.joined_ups(up, next(sparse) if part.num_kept else None, part.width, dtype)
        for up, part in zip(ups, parts, strict=True)
    ]


def _blocks(z: Tensor, parts: list[Part]) -> list[Tensor]:
    return [z[:, part.start : part.start + part.width] for part in parts]


def _split(tensors: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    found, start = [], 0
    for count in counts:
        found.append(tensors[start : start + count])
        start += count
    return found


def _to(gradient: Tensor, parameter: Tensor, is_needed: bool) -> Tensor | None:
    return gradient.to(parameter.dtype).view(parameter.shape) if is_needed else None


def _total_rank(downs: list[Tensor]) -> int:
    return sum(down.shape[0] for down in downs)


def _total_kept(indices: list[Tensor]) -> int:
    return sum(index.shape[0] for index in indices)


# ------------------------------------------------------------------------------------------------------- autocast


def _register_autocast(name: str, num_cast: int) -> None:
    """Under autocast the first `num_cast` inputs enter in autocast's dtype, as those of nn.Linear do.

    torch's own register_autocast would round gamma too, and keep a cast copy of every weight until the backward pass;
    weights are cast inside the operators.
    """
    op = getattr(torch.ops.lost, name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def cast_and_call(*inputs, device_type=device_type):
            dtype = torch.get_autocast_dtype(device_type)
            cast = [value if value.dtype == torch.float64 else value.to(dtype) for value in inputs[:num_cast]]
            with torch.autocast(device_type, enabled=False):
                return op(*cast, *inputs[num_cast:])

        _LIBRARY.impl(name, cast_and_call, key)


_LIBRARY = torch.library.Library("lost", "FRAGMENT")
_register_autocast("group_down", 1)
_register_autocast("group_up", 2)

# --------------------------------------------------------------------------------------- floating-point operations


@register_flop_formula(torch.ops.lost.group_down)
def _down_flops(x, downs, indices, kernels, **_: Any) -> int:  # noqa: ARG001
    return 2 * x[0] * x[1] * sum(down[0] for down in downs)


@register_flop_formula(torch.ops.lost.group_down_backward)
def _down_backward_flops(dh, dkept, x, downs, indices, kernels, needs_x, needs_downs, **_: Any) -> int:  # noqa: ARG001
    return (needs_x + needs_downs) * _down_flops(x, downs, indices, kernels)


@register_flop_formula(torch.ops.lost.group_up)
def _up_flops(h, kept, ups, sparse_weights, *_: Any, **__: Any) -> int:  # noqa: ARG001
    """The zeros that align the products are no work."""
    return 2 * h[0] * sum(weight[0] * weight[1] for weight in [*ups, *sparse_weights])


@register_flop_formula(torch.ops.lost.group_up_backward)
def _up_backward_flops(dys, h, kept, ups, sparse_weights, *others: Any, **_: Any) -> int:  # noqa: ARG001
    needs_h, needs_gammas, needs_weights = others[-3:]
    return ((needs_h or needs_gammas) + needs_weights) * _up_flops(h, kept, ups, sparse_weights)
