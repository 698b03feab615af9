"""Factors and kept channels against a definition written with numpy's SVD, in float64."""

import numpy as np
import pytest
import torch

from lost.config.model import LostConfig
from lost.model.lost_init import factorise, singular_triplets
from lost.testing.numerics import LIMITS, assert_close, relative_rms_error
from lost.utils.errors import ConfigError

SHAPES = [(63, 41), (41, 63), (48, 48)]
RANK, KEPT = 11, 7


def gaussian(shape=(63, 41), seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.02


def trained_like(shape=(63, 41), seed=0) -> torch.Tensor:
    """A decaying spectrum and columns of different sizes, as trained weights have."""
    left, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(shape[0], shape[0])))
    weight = left @ (gaussian(shape, seed).numpy() * np.exp(-np.arange(shape[0]) / 15)[:, None])
    return torch.from_numpy(weight * np.linspace(0.5, 2, shape[1]))


def numpy_triplets(weight: torch.Tensor):
    """U, S, V^T with the largest |entry| of each row of V^T positive, row by row."""
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    for i in range(len(values)):
        if right[i, np.argmax(np.abs(right[i]))] < 0:
            left[:, i], right[i] = -left[:, i], -right[i]
    return left, values, right


def defined_complement(weight, span, rank, num_triplets):
    left, values, right = numpy_triplets(weight)
    chosen = {
        "all": range(rank, len(values)),
        "next": range(rank, min(len(values), rank + num_triplets)),
        "smallest": range(max(rank, len(values) - num_triplets), len(values)),
        "whole": range(len(values)),
    }[span]
    return sum(values[i] * np.outer(left[:, i], right[i]) for i in chosen)


def defined_channels(complement, score, axis, count):
    channels = complement.T if axis == "columns" else complement
    scores = [np.abs(c).sum() if score == "l1" else np.sqrt((c * c).sum()) for c in channels]
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def config(**options) -> LostConfig:
    return LostConfig(lost_rank=RANK, **options)


@pytest.mark.parametrize("init", ["auto", "svd", "gram"])
@pytest.mark.parametrize("make", [gaussian, trained_like])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_equal_the_definition(init, make, shape):
    weight = make(shape)
    left, values, right = numpy_triplets(weight)
    factors = factorise(weight, config(init=init), RANK, KEPT)
    root = np.sqrt(values[:RANK])
    assert_close(factors.low_rank_down, torch.from_numpy(root[:, None] * right[:RANK]), "initialisation", "A")
    assert_close(factors.low_rank_up, torch.from_numpy(left[:, :RANK] * root), "initialisation", "B")
    index = defined_channels(defined_complement(weight, "all", RANK, 0), "l2", "columns", KEPT)
    assert factors.sparse_index.tolist() == index
    assert factors.sparse_index.dtype == torch.int64
    assert torch.equal(factors.sparse_weight, weight[:, index])


@pytest.mark.parametrize("init", ["auto", "svd", "gram"])
@pytest.mark.parametrize("span", ["all", "next", "smallest", "whole"])
@pytest.mark.parametrize("score", ["l2", "l1"])
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_kept_channels_and_complement_values(init, span, score, axis):
    weight = trained_like((41, 63), seed=3)
    options = config(
        init=init, complement_span=span, span_triplets=9, score=score, selection_axis=axis, sparse_values="complement"
    )
    if init == "gram" and span == "smallest":
        with pytest.raises(ConfigError, match=r"singular value 41 of this weight is \d\.\de-\d\d of the largest"):
            factorise(weight * torch.logspace(0, -6, 63, dtype=torch.float64), options, RANK, KEPT)
    factors = factorise(weight, options, RANK, KEPT)
    complement = defined_complement(weight, span, RANK, 9)
    index = defined_channels(complement, score, axis, KEPT)
    assert factors.sparse_index.tolist() == index
    expected = complement[:, index] if axis == "columns" else complement[index]
    assert_close(factors.sparse_weight, torch.from_numpy(expected), "initialisation")


def test_spans_and_scores_choose_different_channels():
    """Otherwise the test above could not tell one option from another."""
    weight = trained_like((41, 63), seed=3)

    def chosen(span, score):
        return tuple(defined_channels(defined_complement(weight, span, RANK, 9), score, "columns", KEPT))

    assert len({chosen(span, "l2") for span in ("all", "next", "smallest", "whole")}) == 4
    assert chosen("all", "l1") != chosen("all", "l2")


def test_span_is_cut_at_the_last_triplet():
    weight = gaussian()
    for span in ("next", "smallest"):
        wide = factorise(weight, config(complement_span=span, span_triplets=1000), RANK, KEPT)
        assert torch.equal(wide.sparse_index, factorise(weight, config(), RANK, KEPT).sparse_index)


@pytest.mark.parametrize("make", [gaussian, trained_like])
@pytest.mark.parametrize("init", ["svd", "gram"])
def test_product_of_the_factors_is_the_best_approximation(make, init):
    """Eckart-Young: the error is the norm of the remaining singular values, and no other rank-R matrix is closer."""
    weight = make()
    factors = factorise(weight, config(init=init), RANK, KEPT)
    product = factors.low_rank_up @ factors.low_rank_down
    smallest = np.sqrt((np.linalg.svd(weight.numpy(), compute_uv=False)[RANK:] ** 2).sum())
    error = float((weight - product).norm())
    assert abs(error - smallest) <= 1e-12 * smallest
    assert np.linalg.matrix_rank(product.numpy()) == RANK
    nudged = product + 1e-6 * factors.low_rank_up[:, :1] @ factors.low_rank_down[1:2]
    assert float((weight - nudged).norm()) > error


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_and_svd_agree(shape):
    weight = trained_like(shape, seed=5)
    by_gram, by_svd = (factorise(weight, config(init=init), RANK, KEPT) for init in ("gram", "svd"))
    assert_close(by_gram.low_rank_down, by_svd.low_rank_down, "initialisation")
    assert_close(by_gram.low_rank_up, by_svd.low_rank_up, "initialisation")
    assert torch.equal(by_gram.sparse_index, by_svd.sparse_index)


def test_kept_columns_minus_the_product_are_orthogonal_to_the_left_factor():
    """U_r^T (W_s - (B A)_I) = 0 for a true SVD; an independent draw of W_s breaks it."""
    weight = gaussian()
    factors = factorise(weight, config(), RANK, KEPT)
    rest = factors.sparse_weight - (factors.low_rank_up @ factors.low_rank_down)[:, factors.sparse_index]
    overlap = factors.low_rank_up.T @ rest
    assert float(overlap.norm() / (factors.low_rank_up.norm() * rest.norm())) < 1e-14
    drawn = gaussian(tuple(rest.shape), seed=1)
    assert float((factors.low_rank_up.T @ drawn).norm() / (factors.low_rank_up.norm() * drawn.norm())) > 1e-2


# ------------------------------------------------------------------------------------------------- signs, ties


def from_triplets(right_rows, values=(3.0, 2.0, 1.0), num_rows=5) -> torch.Tensor:
    """A weight whose right singular vectors are the given orthonormal rows."""
    right = torch.tensor(right_rows, dtype=torch.float64)
    left = torch.linalg.qr(gaussian((num_rows, len(values)), seed=2)).Q
    return (left * torch.tensor(values, dtype=torch.float64)) @ right


@pytest.mark.parametrize("init", ["svd", "gram"])
@pytest.mark.parametrize("flip", [1, -1])
def test_largest_entry_of_each_row_of_v_is_positive(init, flip):
    """The sign of W0 cannot show in V: only B turns with it."""
    weight = trained_like((30, 50))
    down = factorise(flip * weight, config(init=init), RANK, KEPT).low_rank_down
    largest = down.gather(1, down.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    assert_close(down, factorise(weight, config(init=init), RANK, KEPT).low_rank_down, "initialisation")


@pytest.mark.parametrize("init", ["svd", "gram"])
def test_equal_entries_the_first_decides_the_sign(init):
    half, third = 0.5, 1 / np.sqrt(2)
    rows = [[-half, half, half, -half], [0.0, third, -third, 0.0], [third, 0.0, 0.0, -third]]
    for seed in range(20):
        noise = gaussian((5, 4), seed=seed) * 1e-13
        right = singular_triplets(from_triplets(rows) + noise, 3, init).right
        assert right[0, 0] > 0
        assert right[1, 1] > 0
        assert right[2, 0] > 0


@pytest.mark.parametrize("init", ["svd", "gram"])
def test_equal_channels_the_lowest_index_is_kept(init):
    """Twin columns have the same score up to rounding; three of each of these pairs of twins are wanted."""
    base = trained_like((63, 20), seed=7)
    for seed in range(10):
        place = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        weight = torch.cat([base, base], dim=1)[:, place]
        kept = factorise(weight, config(init=init), RANK, 5).sparse_index.tolist()
        twins = {j: [k for k in range(40) if int(place[k]) % 20 == int(place[j]) % 20] for j in range(40)}
        # Five of twins are two whole pairs and the lower one of the third.
        alone = [j for j in kept if not set(twins[j]) <= set(kept)]
        assert len(alone) == 1
        assert alone[0] == min(twins[alone[0]])


@pytest.mark.parametrize("init", ["auto", "svd"])
def test_full_rank_leaves_nothing_so_the_first_channels_are_kept(init):
    weight = gaussian((20, 30))
    factors = factorise(weight, LostConfig(lost_rank=20, init=init), 20, 4)
    assert factors.sparse_index.tolist() == [0, 1, 2, 3]
    assert_close(factors.low_rank_up @ factors.low_rank_down, weight, "initialisation")


def test_rank_deficient_weights_and_zero():
    weight = gaussian((30, 4), seed=1) @ gaussian((4, 50), seed=2)
    factors = factorise(weight, config(), RANK, KEPT)
    assert_close(factors.low_rank_up @ factors.low_rank_down, weight, "initialisation")
    assert factors.sparse_index.tolist() == list(range(KEPT))
    nothing = factorise(torch.zeros(30, 50), config(), RANK, KEPT)
    assert torch.equal(nothing.low_rank_up @ nothing.low_rank_down, torch.zeros(30, 50, dtype=torch.float64))
    assert nothing.sparse_index.tolist() == list(range(KEPT))


@pytest.mark.parametrize("ratio", [3e-3, 3e-4])
def test_auto_takes_gram_only_where_it_is_exact(ratio):
    """Singular values 1, ..., ratio: below 1e-3 gram refuses and names the ratio, and auto equals the SVD."""
    left, right = torch.linalg.qr(gaussian((40, 8))).Q, torch.linalg.qr(gaussian((30, 8), seed=1)).Q
    weight = (left * torch.logspace(0, np.log10(ratio), 8, dtype=torch.float64)) @ right.T
    options = {"lost_rank": 8}
    auto, svd = (factorise(weight, LostConfig(init=init, **options), 8, 3) for init in ("auto", "svd"))
    if ratio > 1e-3:
        gram = factorise(weight, LostConfig(init="gram", **options), 8, 3)
        assert torch.equal(auto.low_rank_down, gram.low_rank_down)
        assert not torch.equal(auto.low_rank_down, svd.low_rank_down)
        return
    assert torch.equal(auto.low_rank_down, svd.low_rank_down)
    with pytest.raises(ConfigError, match=r"3\.0e-04 of the largest"):
        factorise(weight, LostConfig(init="gram", **options), 8, 3)


# --------------------------------------------------------------------------------------------- drawn options


def drawn(seed=0, weight=None, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = gaussian((300, 400)) if weight is None else weight
    return factorise(weight, LostConfig(lost_rank=100, **options), 100, 200, generator)


def test_random_channels_depend_on_the_generator_only():
    first, again, other = drawn(0, score="random"), drawn(0, score="random"), drawn(1, score="random")
    assert torch.equal(first.sparse_index, again.sparse_index)
    assert not torch.equal(first.sparse_index, other.sparse_index)
    assert first.sparse_index.tolist() == sorted(set(first.sparse_index.tolist()))
    # The 200 of 400 channels with the highest scores would be hit by chance with probability 1e-119.
    assert not torch.equal(first.sparse_index, drawn(0).sparse_index)


def test_cola_factors_have_the_variance_of_their_source():
    """Entries of B A have standard deviation (N + K)^(-1/2)."""
    factors = drawn(factor_init="cola")
    product = factors.low_rank_up @ factors.low_rank_down
    assert float(product.std() * np.sqrt(700)) == pytest.approx(1, abs=0.03)
    assert float(factors.low_rank_down.std() / factors.low_rank_up.std()) == pytest.approx(1, abs=0.02)


def test_xavier_factors():
    factors = drawn(factor_init="xavier")
    assert float(factors.low_rank_down.std()) == pytest.approx(np.sqrt(2 / 500), rel=0.02)
    assert float(factors.low_rank_up.std()) == pytest.approx(np.sqrt(2 / 400), rel=0.02)


def test_kaiming_a_zero_b():
    factors = drawn(factor_init="kaiming_a_zero_b")
    assert not factors.low_rank_up.any()
    down = factors.low_rank_down
    assert float(down.abs().max()) <= 400**-0.5
    assert float(down.std()) == pytest.approx(400**-0.5 / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize("factor_init", ["cola", "xavier", "kaiming_a_zero_b"])
def test_drawn_factors_keep_the_channels_of_the_svd(factor_init):
    assert torch.equal(drawn(factor_init=factor_init).sparse_index, drawn().sparse_index)


def test_sparse_values_kaiming_and_zero():
    assert not drawn(sparse_values="zero").sparse_weight.any()
    values = drawn(sparse_values="kaiming").sparse_weight
    assert values.shape == (300, 200)
    assert float(values.abs().max()) <= 400**-0.5
    assert float(values.std()) == pytest.approx(400**-0.5 / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    ("dense_init", "std"),
    [("kaiming", 400**-0.5 / np.sqrt(3)), ("xavier", np.sqrt(2 / 700)), ("orthogonal", 400**-0.5)],
)
def test_dense_init_draws_another_weight(dense_init, std):
    """Density 1 shows the whole W0 in the sparse block."""
    given = gaussian((300, 400))
    options = LostConfig(lost_rank=100, density=1, dense_init=dense_init)
    weight = factorise(given, options, 100, 400, torch.Generator().manual_seed(3)).sparse_weight
    assert float(weight.std()) == pytest.approx(std, rel=0.02)
    assert relative_rms_error(weight, given) > 0.5
    if dense_init == "orthogonal":
        assert_close(weight @ weight.T, torch.eye(300, dtype=torch.float64), "initialisation")


def test_dense_init_model_is_the_given_weight():
    given = gaussian((300, 400))
    assert torch.equal(factorise(given, LostConfig(lost_rank=100, density=1), 100, 400).sparse_weight, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_are_factorised_in_float64(dtype):
    weight = gaussian().to(dtype)
    before = weight.clone()
    factors = factorise(weight, config(), RANK, KEPT)
    assert factors.low_rank_down.dtype == torch.float64
    assert_close(
        factors.low_rank_down, factorise(weight.double(), config(), RANK, KEPT).low_rank_down, "initialisation"
    )
    assert torch.equal(weight, before)


# ------------------------------------------------------------------------------------------ negative controls


@pytest.mark.parametrize("mistake", ["sign", "order", "rank", "root", "float32"])
def test_negative_controls(mistake):
    """Mistakes that the comparison with the definition must notice."""
    weight = gaussian()
    _, values, right = numpy_triplets(weight)
    down = torch.from_numpy(np.sqrt(values[:RANK])[:, None] * right[:RANK])
    wrong = {
        "sign": down * torch.tensor([-1.0] + [1.0] * (RANK - 1), dtype=torch.float64)[:, None],
        "order": down.flip(0),
        "rank": torch.from_numpy(np.sqrt(values[1 : RANK + 1])[:, None] * right[1 : RANK + 1]),
        "root": torch.from_numpy(values[:RANK, None] * right[:RANK]),
        "float32": factorise(weight.float(), config(), RANK, KEPT).low_rank_down,
    }[mistake]
    assert relative_rms_error(wrong, down) > 1e3 * LIMITS["initialisation"]
    with pytest.raises(AssertionError):
        assert_close(wrong, down, "initialisation")
