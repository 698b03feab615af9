"""The Triton kernels of RMSNorm, SwiGLU and rotary embedding, interpreted, against their definitions in float64."""

import pytest

from lost.testing.numerics import LIMITS
from lost.testing.processes import printed_by


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return printed_by("lost.testing.interpreted_pointwise", TRITON_INTERPRET="1")


def test_values_and_gradients_are_those_of_the_definitions(errors):
    right = {name: error for name, error in errors.items() if not name.startswith(("wrong", "bits"))}
    assert len(right) == 8 + 4 + 6
    assert {name: error for name, error in right.items() if not error <= LIMITS["float32"]} == {}


def test_roundings_are_those_of_transformers(errors):
    """Before the weight multiplies, and of silu(gate) before up does; sums in another order may change a bit or two."""
    assert errors["bits: rms_norm"] < 1e-3
    assert errors["bits: swiglu"] < 1e-3
    # Negative controls: as many differ where the rounding in between is left out.
    assert errors["bits: rms_norm without the rounding"] > 0.1
    assert errors["bits: swiglu without the rounding"] > 0.1


def test_negative_controls(errors):
    """Mistakes of values, of gradients, of an argument; and outputs that no kernel wrote, which are NaN."""
    wrong = {name: error for name, error in errors.items() if name.startswith("wrong")}
    assert len(wrong) == 7
    assert all(error > 1e-2 for error in wrong.values()), wrong
    assert wrong["wrong: rope, odd: keys never written"] == float("inf")
