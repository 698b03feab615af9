"""One converted weight against definitions of its own in numpy's float64."""

import numpy as np
import pytest
import torch

from lost.config.model import LostConfig
from lost.convert.layer import approximate, squared_singular_values
from lost.convert.measure import SMALLEST_SCALE, scale_of
from lost.testing.numerics import LIMITS, assert_close, relative_rms_error
from lost.utils.errors import LostError

CONFIG = LostConfig(gamma=0.7, activation="identity", sparse_values="complement")
SHAPES = [(37, 63), (63, 37), (50, 50)]


def trained_weight(shape, seed=0):
    """A matrix with a falling spectrum and a few loud input channels, as trained weights have."""
    generator = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(generator.normal(size=shape), full_matrices=False)
    weight = (left * np.exp(-np.arange(min(shape)) / 9)) @ right
    weight[:, generator.integers(0, shape[1], 4)] *= 3
    return torch.from_numpy(weight)


def reference(weight, rank, num_kept, scale=None):
    """W' = gamma B A + (1 - gamma) W_s in the kept channels, by the definition: SVD, complement, largest columns."""
    scale = np.ones(weight.shape[1]) if scale is None else scale.numpy()
    left, values, right = np.linalg.svd(weight.numpy() * scale, full_matrices=False)
    low_rank = (left[:, :rank] * values[:rank]) @ right[:rank] / scale
    complement = weight.numpy() - low_rank
    index = np.sort(np.argsort(-np.linalg.norm(complement * scale, axis=0), kind="stable")[:num_kept])
    result = low_rank.copy()
    result[:, index] += complement[:, index]
    energy = (values[:rank] ** 2).sum() / (values**2).sum()
    return torch.from_numpy(result), index, energy


def matrix_of(tensors, gamma, shape):
    """The layer's matrix by its formula, from the stored tensors."""
    up, down = tensors["low_rank_up"].double(), tensors["low_rank_down"].double()
    weight = gamma * up @ down
    if "sparse_index" in tensors:
        for place, channel in enumerate(tensors["sparse_index"].tolist()):
            weight[:, channel] += (1 - gamma) * tensors["sparse_weight"].double()[:, place]
    assert weight.shape == shape
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_kept", [0, 1, 5])
@pytest.mark.parametrize("gamma", [0.2, 0.7])
def test_a_layer_is_the_best_rank_and_the_worst_channels(shape, num_kept, gamma):
    weight = trained_weight(shape)
    config = LostConfig(gamma=gamma, activation="identity", sparse_values="complement")
    tensors, error = approximate(weight, config, 11, num_kept, None, torch.float64)
    wanted, index, energy = reference(weight, 11, num_kept)
    assert_close(matrix_of(tensors, gamma, weight.shape), wanted, "initialisation")
    assert tensors.get("sparse_index", torch.empty(0)).tolist() == index.tolist()
    assert error.energy_kept == pytest.approx(energy, rel=1e-10)
    assert error.relative_error == pytest.approx(float((weight - wanted).norm() / weight.norm()), rel=1e-9)
    assert error.calibrated_error is None
    # Negative control: without 1 / gamma in the factors it is another matrix.
    tensors["low_rank_up"] = tensors["low_rank_up"] * gamma
    assert relative_rms_error(matrix_of(tensors, gamma, weight.shape), wanted) > 0.1


def test_calibration_weighs_channels():
    weight = trained_weight((37, 63))
    scale = torch.from_numpy(np.exp(np.random.default_rng(3).normal(size=63)))
    tensors, error = approximate(weight, CONFIG, 9, 3, scale, torch.float64)
    wanted, index, energy = reference(weight, 9, 3, scale)
    assert_close(matrix_of(tensors, 0.7, weight.shape), wanted, "initialisation")
    assert tensors["sparse_index"].tolist() == index.tolist()
    assert error.energy_kept == pytest.approx(energy, rel=1e-10)
    # In outputs for inputs of these sizes it beats the plain conversion, which beats it in the weight itself.
    plain, plain_error = approximate(weight, CONFIG, 9, 3, None, torch.float64)
    x = torch.randn(4000, 63, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    outputs = [
        float((x @ (weight - matrix_of(found, 0.7, weight.shape)).T).norm() / (x @ weight.T).norm())
        for found in (tensors, plain)
    ]
    assert outputs[0] < 0.8 * outputs[1]
    assert error.relative_error > plain_error.relative_error
    assert error.calibrated_error == pytest.approx(outputs[0], rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, "random"])
@pytest.mark.parametrize(("rank", "num_kept"), [("full", 0), ("full", 4), (3, "all")])
def test_full_rank_or_full_density_is_the_weight(shape, scale, rank, num_kept):
    weight = trained_weight(shape)
    scale = None if scale is None else torch.rand(shape[1], dtype=torch.float64) + 0.1
    rank = min(shape) if rank == "full" else rank
    num_kept = shape[1] if num_kept == "all" else num_kept
    tensors, error = approximate(weight, CONFIG, rank, num_kept, scale, torch.float64)
    assert_close(matrix_of(tensors, 0.7, weight.shape), weight, "initialisation")
    assert error.relative_error < LIMITS["initialisation"]
    # Negative control: one triplet less without kept channels is not the weight.
    less, _ = approximate(weight, CONFIG, min(shape) - 1, 0, scale, torch.float64)
    assert relative_rms_error(matrix_of(less, 0.7, weight.shape), weight) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_channels_are_exact_to_one_rounding_of_what_the_stored_factors_miss(dtype):
    weight = trained_weight((37, 63)).to(dtype)
    tensors, error = approximate(weight, CONFIG, 11, 5, None, dtype)
    assert {tensor.dtype for name, tensor in tensors.items() if name != "sparse_index"} == {dtype}
    made = matrix_of(tensors, 0.7, weight.shape)
    index = tensors["sparse_index"]
    missed = weight.double() - 0.7 * tensors["low_rank_up"].double() @ tensors["low_rank_down"].double()
    rounding = torch.finfo(dtype).eps / 2
    assert ((made - weight.double())[:, index].abs() <= missed[:, index].abs() * rounding * 1.01 + 1e-7).all()
    assert error.relative_error == pytest.approx(float((weight.double() - made).norm() / weight.double().norm()))


def test_gamma_modes_make_the_same_matrix():
    weight = trained_weight((37, 63))
    modes = {}
    for mode in ("fixed", "learnable", "folded"):
        config = LostConfig(gamma=0.7, gamma_mode=mode, activation="identity", sparse_values="complement")
        modes[mode], _ = approximate(weight, config, 9, 4, None, torch.float64)
    assert modes["learnable"].pop("gamma").tolist() == pytest.approx([0.7])
    fixed = matrix_of(modes["fixed"], 0.7, weight.shape)
    assert_close(matrix_of(modes["learnable"], 0.7, weight.shape), fixed, "float64")
    folded = modes["folded"]["low_rank_up"] @ modes["folded"]["low_rank_down"]
    folded[:, modes["folded"]["sparse_index"]] += modes["folded"]["sparse_weight"]
    assert_close(folded, fixed, "initialisation")


def test_a_weight_of_zeros_stays_one():
    tensors, error = approximate(torch.zeros(7, 9), CONFIG, 2, 1, None, torch.float32)
    assert not matrix_of(tensors, 0.7, (7, 9)).any()
    assert (error.energy_kept, error.relative_error) == (1.0, 0.0)


def test_what_cannot_be_held_is_named():
    with pytest.raises(LostError, match="not finite"):
        approximate(torch.full((5, 6), float("nan")), CONFIG, 2, 1, None, torch.float32)
    with pytest.raises(LostError, match="float16"):
        approximate(6e4 * torch.randn(50, 60), CONFIG, 1, 1, None, torch.float16)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectra(shape):
    weight = trained_weight(shape)
    scale = torch.rand(shape[1], dtype=torch.float64) + 0.1
    for factor in (None, scale):
        values = np.linalg.svd(weight.numpy() * (1 if factor is None else factor.numpy()), compute_uv=False) ** 2
        found = squared_singular_values(weight, factor).numpy()
        assert found.shape == values.shape
        assert np.abs(found - values).max() < 1e-13 * values[0]
        assert (np.diff(found) <= 0).all()


def test_scales_are_rms_with_a_floor():
    scale = scale_of(torch.tensor([4.0, 0.0, 16.0], dtype=torch.float64))
    typical = np.sqrt(20 / 3)
    assert scale.tolist() == pytest.approx([2 / typical, SMALLEST_SCALE, 4 / typical])
    assert scale_of(torch.zeros(3, dtype=torch.float64)).tolist() == [1, 1, 1]
