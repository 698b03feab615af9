"""The way of few rows without gradients against the definition in float64, and when it is taken."""

import pytest
import torch
from lost_kernels.lost_linear import lost_linear, reference_lost_linear
from lost_kernels.lost_linear.few_rows import MOST_ROWS, few_rows_linear, has_few_rows


def arguments(dtype, activation, gamma, has_bias, num_kept=5, rank=7, shape=(3, 4, 33), out_features=21):
    generator = torch.Generator().manual_seed(1)

    def random(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    index = torch.randperm(shape[-1], generator=generator)[:num_kept].sort().values if num_kept else None
    sparse = random(out_features, num_kept) if num_kept else None
    gamma = torch.tensor([0.3]) if gamma == "tensor" else gamma
    bias = random(out_features) if has_bias else None
    return [random(*shape), random(rank, shape[-1]), random(out_features, rank), sparse, index, gamma, activation, bias]


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def in_float64(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("activation", ["silu", "identity", "gelu", "relu"])
@pytest.mark.parametrize(("gamma", "has_bias", "num_kept"), [(0.7, False, 5), (None, True, 5), ("tensor", False, 0)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 4, 33), (1, 1, 33), (33,)])
def test_few_rows_are_the_definition(activation, gamma, has_bias, num_kept, dtype, limit, shape):
    values = arguments(dtype, activation, gamma, has_bias, num_kept, shape=shape)
    expected = reference_lost_linear(*in_float64(values))
    found = few_rows_linear(*values)
    assert (found.dtype, found.shape) == (dtype, (*shape[:-1], 21))
    assert relative_error(found, expected) < limit
    # Negative control: a kept channel too far.
    if num_kept:
        values[4] = (values[4] + 1) % 33
        assert relative_error(few_rows_linear(*values), expected) > 5 * limit


def test_it_is_taken_for_few_rows_without_gradients_only(monkeypatch):
    taken = []
    monkeypatch.setattr("lost_kernels.lost_linear.few_rows_linear", lambda *values: taken.append(1) or values[0])
    values = arguments(torch.float32, "silu", 0.7, False, shape=(MOST_ROWS, 33))
    lost_linear(*values)
    assert not taken
    with torch.no_grad():
        lost_linear(*values)
        assert taken == [1]
        lost_linear(*arguments(torch.float32, "silu", 0.7, False, shape=(MOST_ROWS + 1, 33)))
        assert taken == [1]
        rows = arguments(torch.float32, "silu", 0.7, False, shape=(2, 33))
        rows[3], rows[4] = torch.randn(5, 33), torch.arange(5)
        lost_linear(*rows, selection_axis="rows")
        assert taken == [1]
        assert has_few_rows(torch.zeros(0, 33))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not has_few_rows(torch.zeros(1, 33))
