"""How far two tensors are apart, and how far they may be: one table of limits for every numerics test.

Each limit is three to ten times the largest error measured over the tests that use it (torch 2.13, CPU, the shapes in
tests/numerics), and each test has a negative control that exceeds it by a factor of at least a thousand.
"""

import torch
from torch import Tensor

# The largest relative RMS errors measured: 6e-16 forward and gradients in float64 (all activations and options);
# 3e-15 for factors by SVD, 2e-13 by the Gram matrix (48 x 100 and smaller, condition below 1e3);
# 2.4e-7 in float32; 3.0e-3 in bfloat16, whose rounding step is 2^-8 = 3.9e-3.
LIMITS = {
    "float64": 1e-14,
    "initialisation": 1e-12,
    "float32": 1e-6,
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
