"""LostLinear as a module: construction, errors, options, saving, casting and copying."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lost
from lost.config.model import LostConfig
from lost.model.lost_linear import LostLinear
from lost.utils.errors import ConfigError, LostError, ShapeError


def layer(**options) -> LostLinear:
    return LostLinear(40, 30, **{"lost_rank": 8, "density": 0.1, "bias": True, **options})


def dense(bias=True, dtype=torch.float64) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(40, 30, bias=bias, dtype=dtype)


def x(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def test_public_name():
    assert lost.LostLinear is LostLinear


def test_shapes_and_initial_values():
    made = layer()
    assert made.low_rank_down.shape == (8, 40)
    assert made.low_rank_up.shape == (30, 8)
    assert made.sparse_weight.shape == (30, 4)
    assert made.sparse_index.dtype == torch.int64
    assert made.sparse_index.tolist() == sorted(set(made.sparse_index.tolist()))
    assert made.gamma == 0.7
    assert isinstance(made.gamma, float)
    assert not made.bias.any()
    assert float(made.sparse_weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert set(made.state_dict()) == {"low_rank_down", "low_rank_up", "sparse_weight", "sparse_index", "bias"}


def test_rows_axis_shapes():
    made = layer(selection_axis="rows")
    assert made.sparse_weight.shape == (3, 40)
    assert made.sparse_index.max() < 30


def test_direct_construction_follows_the_global_seed():
    torch.manual_seed(5)
    first = layer()
    torch.manual_seed(5)
    again, other = layer(), layer()
    assert torch.equal(first.low_rank_down, again.low_rank_down)
    assert not torch.equal(first.low_rank_down, other.low_rank_down)


@pytest.mark.parametrize(
    ("density", "num_kept"), [(0.01, 1), (0.1, 10), (0.29, 29), (0.999, 99), (1, 100), (1.0, 100), (1e-9, 1), (0, 0)]
)
def test_number_of_kept_channels(density, num_kept):
    made = LostLinear(100, 20, lost_rank=3, density=density)
    assert made.num_kept == num_kept
    if num_kept == 0:
        assert made.sparse_weight is None
        assert made.sparse_index is None
        assert set(made.state_dict()) == {"low_rank_down", "low_rank_up"}
    else:
        assert made.sparse_index.tolist() == sorted(made.sparse_index.tolist())
        assert len(made.sparse_index) == num_kept


def test_no_sparse_block_keeps_gamma():
    made = layer(density=0, dtype=torch.float64)
    expected = 0.7 * nn.functional.silu(x() @ made.low_rank_down.T) @ made.low_rank_up.T
    assert torch.allclose(made(x()), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("lost_rank", "rank"), [(1, 1), (30, 30), (0.5, 15), (0.1, 3), (1.0, 30), (0.001, 1), (0.9, 27)]
)
def test_rank_as_count_or_fraction(lost_rank, rank):
    assert layer(lost_rank=lost_rank).low_rank_down.shape == (rank, 40)


def test_full_rank_identity_with_gamma_one_reproduces_the_dense_layer():
    linear = dense()
    for density in (0, 0.1):
        config = LostConfig(lost_rank=30, gamma=1, density=density, activation="identity")
        made = LostLinear.from_linear(linear, config)
        assert torch.allclose(made(x()), linear(x()), rtol=1e-12, atol=1e-14)
        assert torch.allclose(made.dense_weight(), linear.weight, rtol=1e-12, atol=1e-14)


def test_gamma_zero_is_the_kept_channels_alone():
    linear = dense()
    made = LostLinear.from_linear(linear, LostConfig(lost_rank=8, gamma=0, density=1))
    assert torch.allclose(made(x()), linear(x()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "identity"])
def test_activation_is_used(activation):
    made = LostLinear.from_linear(dense(), LostConfig(lost_rank=8, activation=activation, density=0, gamma=1))
    act = {"silu": nn.SiLU(), "gelu": nn.GELU(), "relu": nn.ReLU(), "identity": nn.Identity()}[activation]
    expected = act(x() @ made.low_rank_down.T) @ made.low_rank_up.T + made.bias
    assert torch.allclose(made(x()), expected, rtol=1e-12, atol=1e-14)


# --------------------------------------------------------------------------------------------------- gamma


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_gamma_modes_start_as_the_same_function(axis):
    layers = {
        mode: LostLinear.from_linear(
            dense(), LostConfig(lost_rank=8, density=0.2, gamma_mode=mode, selection_axis=axis)
        )
        for mode in ("fixed", "learnable", "folded")
    }
    expected = layers["fixed"](x())
    # A learnable gamma is float32: 0.7 there differs from 0.7 in the eighth digit.
    assert torch.allclose(layers["learnable"](x()), expected, rtol=1e-6, atol=1e-7)
    assert torch.allclose(layers["folded"](x()), expected, rtol=1e-12, atol=1e-14)
    assert layers["folded"].gamma is None
    assert not torch.equal(layers["folded"].sparse_weight, layers["fixed"].sparse_weight)


def test_learnable_gamma_is_a_float32_parameter_of_one_value():
    made = layer(gamma_mode="learnable")
    assert isinstance(made.gamma, nn.Parameter)
    assert made.gamma.shape == (1,)
    assert "gamma" in made.state_dict()
    made(x(torch.float32)).sum().backward()
    assert made.gamma.grad.abs().item() > 0


def test_learnable_gamma_stays_float32_when_the_layer_is_narrowed():
    made = layer(gamma_mode="learnable")
    parameter = made.gamma
    made.to(torch.bfloat16)
    assert made.gamma is parameter
    assert made.gamma.dtype == torch.float32
    assert made.gamma.item() == pytest.approx(0.7, abs=1e-7)
    assert made.low_rank_down.dtype == torch.bfloat16
    assert made(x(torch.bfloat16)).dtype == torch.bfloat16
    made.double()
    assert made.gamma.dtype == torch.float64


# -------------------------------------------------------------------------------------------- dense_weight


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("mode", ["fixed", "learnable", "folded"])
@pytest.mark.parametrize("density", [0, 0.2])
def test_dense_weight_is_the_matrix_of_the_layer(axis, mode, density):
    config = LostConfig(lost_rank=8, density=density, activation="identity", gamma_mode=mode, selection_axis=axis)
    made = LostLinear.from_linear(dense(), config)
    expected = nn.functional.linear(x(), made.dense_weight(), made.bias)
    assert torch.allclose(made(x()), expected, rtol=1e-12, atol=1e-14)
    assert made.dense_weight().shape == (30, 40)


def test_dense_weight_needs_the_identity():
    with pytest.raises(ConfigError, match=r"activation = silu.*only activation = identity"):
        layer().dense_weight()


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lost_rank": 31}, ShapeError, r"lost_rank = 31 for a linear 40 -> 30.*min\(in_features, out_features\) = 30"),
        ({"lost_rank": 0}, LostError, "lost_rank = 0: a count must be at least 1"),
        ({"lost_rank": 1.5}, LostError, "lost_rank = 1.5: a fraction"),
        ({"density": 1.01}, ConfigError, "density = 1.01: must be at most 1"),
        ({"density": -0.1}, ConfigError, "density = -0.1: must be at least 0"),
        ({"gamma": 1.5}, ConfigError, "gamma = 1.5: must be at most 1"),
        ({"gamma": -0.5}, ConfigError, "gamma = -0.5: must be at least 0"),
        ({"activation": "sillu"}, ConfigError, "activation"),
        ({"gamma_mode": "trained"}, ConfigError, "gamma_mode"),
        ({"selection_axis": "diagonal"}, ConfigError, "selection_axis"),
        ({"gamma": 0, "density": 0}, ConfigError, "gamma = 0 with density = 0"),
    ],
)
def test_mistakes_are_named(options, error, words):
    with pytest.raises(error, match=words):
        layer(**options)


def test_dense_weight_of_another_shape():
    with pytest.raises(ShapeError, match=r"\[40, 30\].*\[30, 40\]"):
        layer().initialise(torch.zeros(40, 30), LostConfig(lost_rank=8))


@pytest.mark.parametrize(
    "options",
    [
        {"rank_overrides": {"a": 3}},
        {"density_overrides": {"a": 0.1}},
        {"activation_modules": "mlp"},
        {"target_modules": ["a"]},
    ],
)
def test_from_linear_refuses_settings_that_need_names(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}.*lost.inject"):
        LostLinear.from_linear(dense(), LostConfig(**options))


# -------------------------------------------------------------------------- flags, saving, casting, copying


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_from_linear_keeps_bias_dtype_flags(dtype, has_bias):
    linear = dense(has_bias, dtype).eval()
    linear.weight.requires_grad_(False)
    made = LostLinear.from_linear(linear, LostConfig(lost_rank=8, density=0.1))
    assert not made.training
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert not made.low_rank_down.requires_grad
    assert not made.sparse_weight.requires_grad
    if has_bias:
        assert torch.equal(made.bias, linear.bias)
        assert made.bias is not linear.bias
        assert made.bias.requires_grad
    else:
        assert made.bias is None


def test_from_linear_on_meta_computes_nothing():
    with torch.device("meta"):
        linear = nn.Linear(40, 30)
        direct = layer()
    for made in (LostLinear.from_linear(linear, LostConfig(lost_rank=8)), direct):
        assert {t.device.type for t in made.state_dict().values()} == {"meta"}
        assert made.sparse_index.dtype == torch.int64
    direct.to_empty(device="cpu")
    direct.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.isfinite(direct(x(torch.float32))).all()


def test_skip_init_and_reset_equal_any_generator():
    first, second = layer(), layer()
    for made in (first, second):
        made.reset_parameters(torch.Generator().manual_seed(7))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_index_survives_casts(cast):
    made = layer()
    index = made.sparse_index.clone()
    getattr(made, cast)()
    made.to(torch.float16).to("cpu")
    assert made.sparse_index.dtype == torch.int64
    assert torch.equal(made.sparse_index, index)


@pytest.mark.parametrize("mode", ["fixed", "learnable", "folded"])
def test_save_and_load(tmp_path, mode):
    made, other = layer(gamma_mode=mode), layer(gamma_mode=mode)
    with torch.no_grad():
        made.bias.normal_()
    assert not torch.equal(made(x(torch.float32)), other(x(torch.float32)))
    save_file(made.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(made.sparse_index, other.sparse_index)
    assert torch.equal(made(x(torch.float32)), other(x(torch.float32)))


def test_state_without_the_index_does_not_load():
    state = {name: value for name, value in layer().state_dict().items() if name != "sparse_index"}
    with pytest.raises(RuntimeError, match="sparse_index"):
        layer().load_state_dict(state)


@pytest.mark.parametrize("mode", ["fixed", "learnable"])
def test_copies_are_equal_and_separate(mode):
    made = layer(gamma_mode=mode)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(made(x(torch.float32)), other(x(torch.float32)))
        with torch.no_grad():
            other.low_rank_up.zero_()
            other.sparse_index.zero_()
        assert made.low_rank_up.any()
        assert made.sparse_index.any()


def test_repr_says_what_it_is():
    assert "in_features=40, out_features=30, lost_rank=8, num_kept=4" in repr(layer())


def test_training_moves_every_parameter_and_never_the_index():
    torch.manual_seed(0)
    made = layer(gamma_mode="learnable", activation="gelu")
    before = {name: value.clone() for name, value in made.state_dict().items()}
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    target = torch.randn(5, 30)
    losses = []
    for _ in range(30):
        loss = (made(x(torch.float32)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before) - {"sparse_index"}
