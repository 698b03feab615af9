"""How far two tensors are apart, and how far they may be: one table of limits for every numerics test."""

import torch
from torch import Tensor

# Each limit stands above the largest relative RMS error measured over all tests that use it (torch 2.13, CPU):
# float64 1.6e-15 (values and gradients of the layer, every activation and option); initialisation 6.3e-14 (factors by
# SVD and by the Gram matrix against numpy's SVD); float32 2.7e-7; bfloat16 5.2e-3, whose rounding step is 3.9e-3.
# "float32 sums": 1.3e-6, gradients of gamma, sums over all rows and columns that nearly cancel.
# Every test has negative controls: deliberate mistakes that exceed the limit.
LIMITS = {
    "float64": 1e-14,
    "initialisation": 1e-12,
    "float32": 1e-6,
    "float32 sums": 1e-5,
    "bfloat16": 1e-2,
}


def relative_rms_error(ours: Tensor, reference: Tensor) -> float:
    """RMS(ours - reference) / RMS(reference), in float64; inf where the shapes differ or a value is not finite."""
    if ours.shape != reference.shape:
        return float("inf")
    ours, reference = ours.detach().double(), reference.detach().double()
    error = (ours - reference).square().mean().sqrt()
    scale = reference.square().mean().sqrt()
    if not torch.isfinite(ours).all():
        return float("inf")
    return float(error / scale) if scale > 0 else float(error)


def assert_close(ours: Tensor, reference: Tensor, limit: str, what: str = "") -> None:
    """Raises AssertionError where the relative RMS error exceeds LIMITS[limit]."""
    error = relative_rms_error(ours, reference)
    assert error <= LIMITS[limit], f"{what}: relative RMS error {error:.2e} above {LIMITS[limit]:.0e} ({limit})"
