"""LLaMA's RMSNorm in plain PyTorch: the definition, and its forward and backward pass written out.

Shapes: M rows, D hidden_size.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), [..., D].

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        In the dtype that those of x and weight have in common.

    Numerics: float32 or better inside; rounded to the dtype of x before the weight multiplies it.
    Source: transformers' LlamaRMSNorm; differs in float64, which that one computes in float32.
    """
    return rms_norm_forward(x, weight, eps)[0]


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm`, rstd = 1 / sqrt(mean(x^2) + eps), [...], in float32 or better)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * rstd[..., None]).to(x.dtype), rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, [M, D], and of weight, [D], in float32 or better, if it is needed."""
    wide_dy, wide_x = dy.to(rstd.dtype), x.to(rstd.dtype)
    normed = wide_x * rstd[:, None]
    scaled = wide_dy * weight
    dx = rstd[:, None] * (scaled - normed * (scaled * normed).mean(1, keepdim=True))
    # The weight multiplies the rounded values.
    d_weight = (wide_dy * normed.to(x.dtype)).sum(0) if needs_weight else None
    return dx.to(x.dtype), d_weight
