"""init = draw against real factorisations of Gaussian weights, mostly in distribution."""

import numpy as np
import pytest
import torch

from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.model import LostLinear, build_model, inject
from lost.model.drawn_init import draw_factors, haar, largest_singular_values, singular_values_of_gaussian
from lost.model.lost_init import Factors, FreshWeight, factorise
from lost.testing.numerics import assert_close
from lost.utils.errors import ConfigError

RANK, KEPT, STD = 11, 7, 0.02
SHAPES = [(63, 41), (41, 63), (48, 48)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(shape=(63, 41), seed=0, rank=RANK, kept=KEPT, std=STD, **options) -> Factors:
    config = LostConfig(lost_rank=rank, init="draw", **options)
    return draw_factors(FreshWeight(shape, std), config, rank, kept, generator(seed))


def factorised(shape=(63, 41), seed=0, rank=RANK, kept=KEPT, std=STD, **options) -> Factors:
    weight = torch.randn(shape, dtype=torch.float64, generator=generator(seed)) * std
    return factorise(weight, LostConfig(lost_rank=rank, init="svd", **options), rank, kept, generator(seed))


def sparse_in_place(factors: Factors, axis: str) -> torch.Tensor:
    """W_s - (B A)_I with the kept channels as columns."""
    product = factors.low_rank_up @ factors.low_rank_down
    kept = product[:, factors.sparse_index] if axis == "columns" else product[factors.sparse_index]
    rest = factors.sparse_weight - kept
    return rest if axis == "columns" else rest.T


def along_channels(factors: Factors, axis: str) -> torch.Tensor:
    """The singular vectors that lie along a kept channel, as unit columns."""
    vectors = factors.low_rank_up if axis == "columns" else factors.low_rank_down.T
    return vectors / vectors.norm(dim=0)


def overlap(vectors: torch.Tensor, rest: torch.Tensor) -> float:
    return float((vectors.T @ rest).norm() / rest.norm())


def largest_gap(ours, theirs) -> float:
    """Kolmogorov-Smirnov distance of two samples, and what it stays under with probability 0.999 if they are alike."""
    points = np.concatenate([ours, theirs])
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (ours, theirs)]
    limit = 1.95 * np.sqrt((len(ours) + len(theirs)) / (len(ours) * len(theirs)))
    return float(np.abs(shares[0] - shares[1]).max() / limit)


# ------------------------------------------------------------------------------------------------ the identity


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_the_sparse_block_agrees_with_the_factors(shape, axis):
    """U_r^T (W_s - (B A)_I) = 0, as for a true SVD."""
    for make in (drawn, factorised):
        factors = make(shape, selection_axis=axis)
        assert overlap(along_channels(factors, axis), sparse_in_place(factors, axis)) < 1e-13


def test_an_independent_sparse_block_does_not_agree():
    """Negative control: what a W_s drawn on its own gives with R = N / 4 and full-size factors."""
    factors = drawn((400, 400), rank=100, kept=4)
    independent = torch.randn(400, 4, dtype=torch.float64, generator=generator(9)) * STD
    wrong = independent - (factors.low_rank_up @ factors.low_rank_down)[:, factors.sparse_index]
    assert 0.6 < overlap(along_channels(factors, "columns"), wrong) < 0.85
    assert overlap(along_channels(factors, "columns"), sparse_in_place(factors, "columns")) < 1e-13


# --------------------------------------------------------------------------------------------- singular values


@pytest.mark.parametrize("size", [1, 2, 17, 300])
def test_bisection_finds_the_singular_values_of_a_bidiagonal_matrix(size):
    numbers = np.random.default_rng(size)
    diagonal, above = numbers.normal(size=size), numbers.normal(size=size - 1)
    expected = np.linalg.svd(np.diag(diagonal) + np.diag(above, 1), compute_uv=False)
    for count in {1, size // 2 + 1, size}:
        ours = largest_singular_values(diagonal**2, above**2, count)
        assert np.abs(ours**2 - expected[:count] ** 2).max() < 1e-12 * expected[0] ** 2
    if size > 2:
        swapped = largest_singular_values(np.flip(diagonal**2), above**2, size)
        assert np.abs(swapped - expected).max() > 1e-3


def test_bisection_passes_zero_pivots():
    """Integers, so that midpoints hit eigenvalues of leading blocks exactly."""
    expected = np.linalg.svd(np.diag([2.0, 2.0, 0.0, 1.0]) + np.diag([0.0, 1.0, 2.0], 1), compute_uv=False)
    ours = largest_singular_values(np.array([4.0, 4.0, 0.0, 1.0]), np.array([0.0, 1.0, 4.0]), 4)
    assert np.abs(ours**2 - expected**2).max() < 1e-12 * expected[0] ** 2


NUM_SAMPLES = 300


@pytest.fixture(scope="module", params=[(14, 9), (9, 14), (10, 10)], ids=str)
def spectra(request):
    """(shape, ours [samples, n], energies, values of real SVDs)."""
    shape, size = request.param, min(request.param)
    numbers = np.random.default_rng(1)
    ours, energies = zip(*(singular_values_of_gaussian(*shape, size, numbers) for _ in range(NUM_SAMPLES)), strict=True)
    real = np.linalg.svd(np.random.default_rng(2).normal(size=(NUM_SAMPLES, *shape)), compute_uv=False)
    return shape, torch.stack(ours).numpy(), np.array(energies), real


def test_singular_values_have_the_distribution_of_real_ones(spectra):
    _, ours, energies, real = spectra
    for place in range(ours.shape[1]):
        assert largest_gap(ours[:, place], real[:, place]) < 1, place
    assert largest_gap(ours[:, 0] / ours[:, 1], real[:, 0] / real[:, 1]) < 1
    assert largest_gap(energies, (real**2).sum(1)) < 1
    assert np.allclose(energies, (ours**2).sum(1))


def test_wrong_degrees_of_freedom_would_be_seen(spectra):
    """Negative control: each chi with one degree too many."""
    (rows, columns), _, _, real = spectra
    numbers = np.random.default_rng(1)
    wrong = [singular_values_of_gaussian(rows + 1, columns + 1, 1, numbers)[0].item() for _ in range(NUM_SAMPLES)]
    assert largest_gap(np.array(wrong), real[:, 0]) > 1


# -------------------------------------------------------------------------------------- vectors, signs, channels


def test_haar_columns_are_orthonormal_and_uniform():
    draws = torch.stack([haar(12, 5, generator(seed)) for seed in range(800)])
    assert_close(draws.mT @ draws, torch.eye(5, dtype=torch.float64).expand(800, 5, 5), "initialisation")
    # The square of each entry is Beta(1/2, 11/2): mean 1/12, and the sign is even: 800 draws give 0.5 +- 0.06 (3.5 sd).
    assert float((draws.square().mean(0) - 1 / 12).abs().max()) < 0.02
    assert float(((draws > 0).double().mean(0) - 0.5).abs().max()) < 0.065


def test_plain_qr_would_be_seen():
    """Negative control: LAPACK's own signs."""
    gaussian = torch.stack([torch.randn(12, 5, dtype=torch.float64, generator=generator(seed)) for seed in range(800)])
    signs = (torch.linalg.qr(gaussian).Q > 0).double().mean(0)
    assert float((signs - 0.5).abs().max()) > 0.3


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_those_of_an_svd(shape):
    """Orthogonal factors of equal norms, falling values, and the largest entry of each row of V positive."""
    factors = drawn(shape)
    down, up = factors.low_rank_down, factors.low_rank_up
    values = down.norm(dim=1).square()
    assert_close(up.T @ up, torch.diag(values), "initialisation")
    assert_close(down @ down.T, torch.diag(values), "initialisation")
    assert (values.diff() < 0).all()
    assert (down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all()
    # sqrt(N) + sqrt(K) bounds the largest singular value but for a few percent.
    assert float(values[0]) == pytest.approx(STD * (shape[0] ** 0.5 + shape[1] ** 0.5), rel=0.15)


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_kept_channels_and_values_look_like_real_ones(axis):
    """Means over 40 layers: size of the sparse block and of its remainder, and an even choice of channels."""
    made = {
        make: [make((120, 80), seed, rank=20, kept=4, selection_axis=axis) for seed in range(40)]
        for make in (drawn, factorised)
    }
    for measure in (
        lambda factors: float(factors.sparse_weight.norm()),
        lambda factors: float(sparse_in_place(factors, axis).norm()),
        lambda factors: float(sparse_in_place(factors, axis).norm(dim=0).max()),
        lambda factors: float(factors.low_rank_down.norm()),
    ):
        ours, theirs = (np.mean([measure(factors) for factors in made[make]]) for make in (drawn, factorised))
        assert ours == pytest.approx(theirs, rel=0.03)
    indices = torch.stack([factors.sparse_index for factors in made[drawn]])
    assert (indices.diff(dim=1) > 0).all()
    assert 0.35 < float(indices.double().mean()) / (80 if axis == "columns" else 120) < 0.65


def test_kept_channels_are_those_that_the_factors_miss_most():
    best, random = (
        np.mean([float(sparse_in_place(drawn(seed=seed, score=score), "columns").norm()) for seed in range(40)])
        for score in ("l2", "random")
    )
    assert best > 1.05 * random


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_leaves_no_remainder(shape):
    rank = min(shape)
    factors = drawn(shape, rank=rank)
    assert factors.sparse_index.tolist() == list(range(KEPT))
    kept = (factors.low_rank_up @ factors.low_rank_down)[:, :KEPT]
    assert_close(factors.sparse_weight, kept, "initialisation")


def test_values_of_the_sparse_block():
    original, complement, zero = (drawn(sparse_values=word) for word in ("original", "complement", "zero"))
    assert torch.equal(complement.sparse_index, original.sparse_index)
    assert_close(complement.sparse_weight, sparse_in_place(original, "columns"), "initialisation")
    assert not zero.sparse_weight.any()
    assert drawn(kept=0).sparse_weight is None


def test_every_channel_kept():
    factors = drawn(kept=41)
    assert factors.sparse_index.tolist() == list(range(41))
    whole = factorised(kept=41).sparse_weight
    assert float(factors.sparse_weight.norm()) == pytest.approx(float(whole.norm()), rel=0.05)


def test_xavier_sets_the_size():
    small, large = drawn(), drawn(dense_init="xavier")
    ratio = np.sqrt(2 / (63 + 41)) / STD
    assert_close(
        large.low_rank_up @ large.low_rank_down, ratio * (small.low_rank_up @ small.low_rank_down), "initialisation"
    )


# ------------------------------------------------------------------------------------------- in layers and models

MODEL = ModelConfig(
    name="small",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=63,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    lineage_rank=5,
)
DRAW = LostConfig(lost_rank=5, density=0.1, init="draw")


def test_a_drawn_model_depends_on_the_seed_only():
    one, again, other = (build_model(MODEL, DRAW, seed=seed).state_dict() for seed in (0, 0, 1))
    torch.manual_seed(5)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert sum("low_rank" in name and not torch.equal(one[name], other[name]) for name in one) == 28
    products = [one[f"model.layers.{block}.mlp.up_proj.low_rank_down"] for block in (0, 1)]
    assert not torch.equal(*products)
    assert all(torch.isfinite(value).all() for value in one.values())


def test_the_dense_weights_are_not_drawn(monkeypatch):
    """Only embedding and head are: the time and the memory of the others are what draw saves."""
    shapes = []
    draw = FreshWeight.draw
    monkeypatch.setattr(FreshWeight, "draw", lambda self: shapes.append(self.shape) or draw(self))
    build_model(MODEL, DRAW, seed=0)
    assert shapes == [(97, 48), (97, 48)]
    shapes.clear()
    build_model(MODEL, DenseConfig(), seed=0)
    assert len(shapes) == 16


def test_a_given_weight_is_never_replaced_by_a_draw():
    linear = torch.nn.Linear(20, 30)
    with pytest.raises(ConfigError, match=r"init = draw: this weight is given.*use init=auto"):
        LostLinear.from_linear(linear, DRAW)
    module = torch.nn.Sequential(linear)
    with pytest.raises(ConfigError, match="this weight is given"):
        inject(module, LostConfig(lost_rank=5, init="draw", target_modules=["all_linear"]))
    assert module[0] is linear


@pytest.mark.parametrize(
    "option",
    [
        {"dense_init": "kaiming"},
        {"dense_init": "orthogonal"},
        {"factor_init": "cola"},
        {"complement_span": "next"},
        {"score": "l1"},
        {"sparse_values": "kaiming"},
    ],
    ids=str,
)
def test_options_that_draw_does_not_know(option):
    key, value = next(iter(option.items()))
    with pytest.raises(ConfigError, match=f"{key} = {value} with init = draw.*init=auto"):
        LostConfig(lost_rank=5, init="draw", **option)
    LostConfig(lost_rank=5, **option)
