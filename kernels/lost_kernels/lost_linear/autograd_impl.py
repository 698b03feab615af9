"""The LOST linear map with a hand-written backward: it keeps x, h = x A^T and z, or makes z again from h.

Autograd of `reference.lost_linear` keeps the joined weights too, and adds to the gradient of x over a copy of it.

Shapes: M rows, K in_features, N out_features, R lost_rank, S kept channels.
"""

import torch
from torch import Tensor

from lost_kernels.lost_linear.reference import ACTIVATIONS, scaled

# The products over R + S = 266 columns took 11.4 and 12.8 ms, over 272 (with zeros) 9.9 and 11.3 ms: 2048 x 1024,
# float32, one core of a Xeon with AVX-512, torch 2.13. On GPUs rows of 16 values keep 16-byte loads aligned.
WIDTH_MULTIPLE = 16
# ACTIVATIONS with the result written into `out`. Not gelu.out: in float32 on a CPU it leaves an `out` of strided rows
# as it was (torch 2.13).
ACTIVATED_INTO = {
    "silu": torch.ops.aten.silu.out,
    "identity": torch.ops.aten.clone.out,
    "gelu": lambda h, out: out.copy_(ACTIVATIONS["gelu"](h)),
    "relu": torch.ops.aten.relu.out,
}


def lost_linear_autograd(
    x: Tensor,
    low_rank_down: Tensor,
    low_rank_up: Tensor,
    sparse_weight: Tensor | None,
    sparse_index: Tensor | None,
    gamma: float | Tensor | None,
    activation: str,
    bias: Tensor | None = None,
    *,
    recompute_z: bool = False,
) -> Tensor:
    """`reference.lost_linear` for selection_axis = columns; same arguments, same values.

    What is kept for the backward, per row: x, h and z, or with recompute_z x, h and the S kept columns of z.

    Under autocast x and the weights enter the products in autocast's dtype, as for nn.Linear; the weights themselves
    are what is kept for the backward, so that no cast copy of them lives between the two.

    Raises:
        RuntimeError: in a second derivative; `reference.lost_linear` has one.
    """
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    with torch.autocast(device_type, enabled=False):
        y = LostLinearFunction.apply(
            rows, low_rank_down, low_rank_up, sparse_weight, sparse_index, gamma, activation, bias, recompute_z
        )
    return y.view(*x.shape[:-1], y.shape[-1])


class LostLinearFunction(torch.autograd.Function):
    """y = z W^T + bias with z = [gamma act(x A^T) | (1 - gamma) x_I] and W = [B | W_s], in the dtype of x, [M, K]."""

    @staticmethod
    def forward(ctx, x, low_rank_down, low_rank_up, sparse_weight, sparse_index, gamma, activation, bias, recompute_z):
        h = x @ low_rank_down.to(x.dtype).T
        kept = None if sparse_index is None else _times(x.index_select(1, sparse_index), _sparse_scale(gamma))
        z = _joined_activations(h, kept, gamma, activation)
        weight = _joined_weights(low_rank_up, sparse_weight, x.dtype)
        is_tensor = isinstance(gamma, Tensor)
        ctx.save_for_backward(
            x,
            h,
            kept if recompute_z else z,
            low_rank_down,
            low_rank_up,
            sparse_weight,
            sparse_index,
            gamma if is_tensor else None,
            bias,
        )
        ctx.gamma = None if is_tensor else gamma
        ctx.activation = activation
        ctx.recompute_z = recompute_z
        return z @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), z, weight.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h, z, low_rank_down, low_rank_up, sparse_weight, sparse_index, gamma, bias = ctx.saved_tensors
        gamma = ctx.gamma if gamma is None else gamma
        needs_x, needs_down, needs_up, needs_sparse, _, needs_gamma, _, needs_bias, _ = ctx.needs_input_grad
        rank = h.shape[1]
        width = rank if sparse_index is None else rank + len(sparse_index)
        d_down = d_up = d_sparse = d_gamma = d_bias = d_x = None
        if needs_up or needs_sparse:
            if ctx.recompute_z:
                # What was kept are the columns of z that do not come from h.
                z = _joined_activations(h, z, gamma, ctx.activation)
            d_weight = dy.T @ z
            d_up = d_weight[:, :rank].to(low_rank_up.dtype)
            if sparse_weight is not None:
                d_sparse = d_weight[:, rank:width].to(sparse_weight.dtype)
        if needs_bias:
            d_bias = dy.sum(0).to(bias.dtype)
        if needs_x or needs_down or needs_gamma:
            dz = dy @ _joined_weights(low_rank_up, sparse_weight, dy.dtype)
            dz_low, dz_sparse = dz[:, :rank], dz[:, rank:width]
            if needs_gamma:
                d_gamma = _gamma_backward(dz_low, dz_sparse, x, h, sparse_index, gamma, ctx.activation)
            dh = _activation_backward(dz_low, h, gamma, ctx.activation)
            if needs_down:
                d_down = (dh.T @ x).to(low_rank_down.dtype)
            if needs_x:
                d_x = dh @ low_rank_down.to(dh.dtype)
                if sparse_index is not None:
                    # The indices are distinct: on a GPU too, every sum has two terms and one possible result.
                    d_x.index_add_(1, sparse_index, _times(dz_sparse, _sparse_scale(gamma)))
        return d_x, d_down, d_up, d_sparse, None, d_gamma, None, d_bias, None


def _joined_activations(h: Tensor, kept: Tensor | None, gamma, activation: str) -> Tensor:
    """z = [gamma act(h) | kept | 0], [M, W]; kept holds (1 - gamma) x_I."""
    if kept is None:
        return scaled(ACTIVATIONS[activation], h, gamma)
    rank, width = h.shape[1], h.shape[1] + kept.shape[1]
    z = h.new_empty(h.shape[0], _padded(width))
    low = z[:, :rank]
    if _may_write_into(h):
        ACTIVATED_INTO[activation](h, out=low)
        if gamma is not None:
            low.mul_(gamma)
    else:
        low.copy_(_gamma_times(ACTIVATIONS[activation](h.to(_wide(h))), gamma, activation))
    z[:, rank:width].copy_(kept)
    z[:, width:].zero_()
    return z


def _joined_weights(low_rank_up: Tensor, sparse_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B | W_s | 0], [N, W]."""
    if sparse_weight is None:
        return low_rank_up.to(dtype)
    width = low_rank_up.shape[1] + sparse_weight.shape[1]
    zeros = low_rank_up.new_zeros(low_rank_up.shape[0], _padded(width) - width, dtype=dtype)
    return torch.cat([low_rank_up.to(dtype), sparse_weight.to(dtype), zeros], dim=1)


def _may_write_into(h: Tensor) -> bool:
    """Whether a function of h is written where it belongs, which saves 2 % of a layer's time each time.

    Not where it is computed in a wider dtype and rounded once; a compiler saves the memory by itself.
    """
    return _wide(h) is h.dtype and not torch.compiler.is_compiling()


def _padded(width: int) -> int:
    return width + -width % WIDTH_MULTIPLE


def _activation_backward(dz: Tensor, h: Tensor, gamma, activation: str) -> Tensor:
    """gamma * act'(h) * dz, in float32 or better and rounded once; perhaps in the memory of dz."""
    wide_dz, wide_h = dz.to(_wide(h)), h.to(_wide(h))
    if activation == "silu" and _may_write_into(h):
        dh = torch.ops.aten.silu_backward.grad_input(dz, h, grad_input=dz)
    elif activation == "silu":
        dh = torch.ops.aten.silu_backward(wide_dz, wide_h)
    elif activation == "gelu":
        dh = torch.ops.aten.gelu_backward(wide_dz, wide_h)
    elif activation == "relu":
        dh = torch.ops.aten.threshold_backward(wide_dz, wide_h, 0)
    else:
        dh = wide_dz
    return _gamma_times(dh, gamma, activation).to(h.dtype)


def _gamma_times(values: Tensor, gamma, activation: str) -> Tensor:
    """gamma * values, in place where an activation has made `values` (identity hands its input on)."""
    if gamma is None:
        return values
    return values * gamma if activation == "identity" else values.mul_(gamma)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _gamma_backward(dz_low, dz_sparse, x, h, sparse_index, gamma: Tensor, activation: str) -> Tensor:
    """sum act(h) dz_low - sum x_I dz_sparse, in the dtype and shape of gamma (at least float32)."""
    total = (ACTIVATIONS[activation](h.to(_wide(h))) * dz_low).sum()
    if sparse_index is not None:
        total = total - (x.index_select(1, sparse_index).to(_wide(x)) * dz_sparse).sum()
    return total.to(gamma.dtype).view(gamma.shape)


def _sparse_scale(gamma):
    return None if gamma is None else 1 - gamma


def _times(values: Tensor, scale) -> Tensor:
    return scaled(ACTIVATIONS["identity"], values, scale)
