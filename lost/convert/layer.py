"""One trained weight in LOST form, and how near it comes.

Shapes: N out_features, K in_features, R lost_rank, S kept channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lost.config.model import LostConfig
from lost.model.lost_init import factorise
from lost.utils.errors import LostError


@dataclass(frozen=True)
class LayerError:
    """What a converted layer kept of its weight W.

    Attributes:
        energy_kept: share of the squared singular values (of W, or of W scaled by the calibration) in the factors.
        relative_error: |W - W'| / |W| for the W' that the stored tensors make, Frobenius norms.
        calibrated_error: the same with every input channel counted by its RMS on the calibration text; None without.
    """

    energy_kept: float
    relative_error: float
    calibrated_error: float | None


@torch.no_grad()
def squared_singular_values(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Falling squares of the singular values of W diag(scale), float64 [min(N, K)].

    Numerics: eigenvalues of the smaller Gram matrix in float64: off by 1e-16 of the largest.
    """
    scaled = _scaled(weight.to(torch.float64), scale)
    gram = scaled.T @ scaled if scaled.shape[0] >= scaled.shape[1] else scaled @ scaled.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).cpu()


@torch.no_grad()
def approximate(
    weight: Tensor, config: LostConfig, rank: int, num_kept: int, scale: Tensor | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], LayerError]:
    """The tensors of the LOST layer with identity activation that is nearest to W, and how near it is.

    B A is the best rank-R approximation of W diag(scale) times diag(1 / scale); the kept channels are those that it
    misses most; the sparse block makes them exact: it holds (W - gamma B A)_I / (1 - gamma) for the factors as stored.

    Args:
        weight: W, [N, K], any floating dtype.
        config: gamma and gamma_mode; the factors absorb 1 / gamma.
        scale: of each input channel, positive, float64 [K]; None: all count alike.
        dtype: of the tensors, on the device of W.
    Raises:
        LostError: a weight that is not finite, or one that `dtype` cannot hold.
    Numerics: float64, each tensor rounded once.
    """
    exact = weight.to(torch.float64)
    if not torch.isfinite(exact).all():
        raise LostError("it holds values that are not finite: the checkpoint is damaged")
    factors = factorise(_scaled(exact, scale), config, rank, num_kept)
    low_rank_scale, sparse_scale = (1.0, 1.0) if config.gamma_mode == "folded" else (config.gamma, 1 - config.gamma)
    root = math.sqrt(low_rank_scale)
    down = factors.low_rank_down if scale is None else factors.low_rank_down / scale
    tensors = {"low_rank_down": (down / root).to(dtype), "low_rank_up": (factors.low_rank_up / root).to(dtype)}
    left = exact - low_rank_scale * (tensors["low_rank_up"].double() @ tensors["low_rank_down"].double())
    if factors.sparse_index is not None:
        index = factors.sparse_index
        tensors["sparse_weight"] = (left[:, index] / sparse_scale).to(dtype)
        tensors["sparse_index"] = index
        left[:, index] -= sparse_scale * tensors["sparse_weight"].double()
    if config.gamma_mode == "learnable":
        tensors["gamma"] = torch.full((1,), config.gamma, dtype=torch.float32, device=weight.device)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise LostError(
            f"its factors are beyond what {str(dtype).removeprefix('torch.')} holds: use dtype=fp32 or bf16"
        )
    # Rows of the scaled factor are sqrt(S_i) v_i.
    energy = float(factors.low_rank_down.square().sum(dim=1).square().sum())
    total = float(_scaled(exact, scale).square().sum())
    calibrated = None if scale is None else _ratio(_scaled(left, scale), _scaled(exact, scale))
    return tensors, LayerError(min(1.0, energy / total) if total > 0 else 1.0, _ratio(left, exact), calibrated)


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale


def _ratio(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size > 0 else 0.0
