"""The Triton kernels inside the operators, interpreted in float32, against the definition in float64."""

import pytest

from lost.testing.numerics import LIMITS
from lost.testing.processes import printed_by


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return printed_by("lost.testing.interpreted", TRITON_INTERPRET="1")


def is_a_sum(name: str) -> bool:
    """Whether numbers of both signs were summed: in a gradient of gamma, and over the layers of a model."""
    return name.endswith("d_gamma") or name.startswith("model")


def test_values_and_gradients_are_those_of_the_definition(errors):
    right = {name: error for name, error in errors.items() if not name.startswith("wrong")}
    assert len(right) == 4 * (3 + 1) + 2 * 3 + 1 + 8
    limits = {name: LIMITS["float32 sums" if is_a_sum(name) else "float32"] for name in right}
    assert {name: error for name, error in right.items() if not error <= limits[name]} == {}


def test_negative_controls(errors):
    """A map that is off by one channel, gamma for 1 - gamma, and a member whose kernel never ran (NaN)."""
    assert errors["wrong: inverse_maps"] > 1e-2
    assert errors["wrong: _scales"] > 1e-2
    assert errors["wrong: _scales, d_gamma"] < 1e-2, "gamma's own gradient does not depend on gamma"
    assert errors["wrong: _runs"] == errors["wrong: _runs, d_gamma"] == float("inf")
