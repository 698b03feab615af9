"""The LOST map against a definition written with loops over channels, in float64; and its lower precisions."""

import math

import pytest
import torch
from lost_kernels.lost_linear import lost_linear, reference_lost_linear

from lost.testing.numerics import LIMITS, assert_close, relative_rms_error

ACTIVATIONS = ("silu", "identity", "gelu", "relu")


def act(h: torch.Tensor, name: str) -> torch.Tensor:
    """The activations from their formulas, not from torch.nn.functional."""
    if name == "silu":
        return h / (1 + torch.exp(-h))
    if name == "gelu":
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return torch.maximum(h, torch.zeros_like(h)) if name == "relu" else h


def defined(x, down, up, sparse, index, gamma, activation, bias=None, axis="columns"):
    """y channel by channel: sums of products, no joined matrices."""
    low = [act((x * down[r]).sum(-1), activation) for r in range(down.shape[0])]
    left, right = (1.0, 1.0) if gamma is None else (gamma, 1 - gamma)
    outputs = []
    for n in range(up.shape[0]):
        y = sum(left * low[r] * up[n, r] for r in range(down.shape[0]))
        if sparse is not None and axis == "columns":
            for s, channel in enumerate(index.tolist()):
                y = y + right * x[..., channel] * sparse[n, s]
        if sparse is not None and axis == "rows":
            for s, channel in enumerate(index.tolist()):
                y = y + (right * (x * sparse[s]).sum(-1) if channel == n else 0)
        outputs.append((y if bias is None else y + bias[n]).reshape(x.shape[:-1]))
    return torch.stack(outputs, -1)


def tensors(axis="columns", has_sparse=True, has_bias=True, shape=(3, 7), seed=0):
    """Random arguments with odd sizes: K 13, N 11, R 5, S 3; gamma as a tensor [1]."""
    generator = torch.Generator().manual_seed(seed)
    in_features, out_features, rank, kept = 13, 11, 5, 3

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).requires_grad_()

    channels = in_features if axis == "columns" else out_features
    sparse = normal(out_features, kept) if axis == "columns" else normal(kept, in_features)
    return {
        "x": normal(*shape, in_features),
        "down": normal(rank, in_features),
        "up": normal(out_features, rank),
        "sparse": sparse if has_sparse else None,
        "index": torch.randperm(channels, generator=generator)[:kept].sort().values if has_sparse else None,
        "gamma": torch.tensor([0.37], dtype=torch.float64, requires_grad=True),
        "bias": normal(out_features) if has_bias else None,
    }


def called(function, given, activation, axis, **changes):
    a = {**given, **changes}
    arguments = (a["x"], a["down"], a["up"], a["sparse"], a["index"], a["gamma"], activation, a["bias"])
    return function(*arguments, axis) if function is defined else function(*arguments, selection_axis=axis)


def value_and_gradients(function, given, activation, axis):
    """y and the gradients of a fixed random weighting of it, by name."""
    y = called(function, given, activation, axis)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    leaves = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.requires_grad and v is not None}
    if given["gamma"] is None or not isinstance(given["gamma"], torch.Tensor):
        leaves.pop("gamma", None)
    gradients = torch.autograd.grad((y * weighting).sum(), list(leaves.values()))
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


FUNCTIONS = {"grouped": lost_linear, "reference": reference_lost_linear}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gamma", ["tensor", 0.7, 0.0, 1.0, None])
def test_value_and_gradients_equal_the_definition(function, axis, activation, gamma):
    given = tensors(axis)
    if gamma != "tensor":
        given["gamma"] = gamma
    expected = value_and_gradients(defined, given, activation, axis)
    for name, ours in value_and_gradients(function, given, activation, axis).items():
        assert_close(ours, expected[name], "float64", name)


@pytest.mark.parametrize("has_sparse", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_parts_that_may_be_missing(has_sparse, has_bias):
    given = tensors(has_sparse=has_sparse, has_bias=has_bias)
    expected = value_and_gradients(defined, given, "silu", "columns")
    for name, ours in value_and_gradients(lost_linear, given, "silu", "columns").items():
        assert_close(ours, expected[name], "float64", name)


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(axis, activation):
    given = tensors(axis, shape=(4,))
    names = ("x", "down", "up", "sparse", "gamma", "bias")

    def function(*values):
        return called(lost_linear, given, activation, axis, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, [given[name] for name in names])


@pytest.mark.parametrize("needed", ["x", "down", "up", "sparse", "gamma", "bias"])
def test_one_gradient_alone(needed):
    given = tensors()
    expected = value_and_gradients(defined, given, "silu", "columns")[needed]
    frozen = {
        name: value.detach().requires_grad_(name == needed)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in given.items()
    }
    ours = value_and_gradients(lost_linear, frozen, "silu", "columns")
    assert set(ours) == {"y", needed}
    assert_close(ours[needed], expected, "float64", needed)


@pytest.mark.parametrize("shape", [(), (1,), (63,), (2, 3, 5), (0,)])
def test_any_leading_shape(shape):
    given = tensors(shape=shape)
    y = called(lost_linear, given, "silu", "columns")
    assert y.shape == (*shape, 11)
    assert_close(y, called(defined, given, "silu", "columns"), "float64") if y.numel() else None


def test_non_contiguous_input_and_output_gradient():
    given = tensors(shape=(6, 5))
    given["x"] = given["x"].detach().transpose(0, 1).requires_grad_()
    y = called(lost_linear, given, "silu", "columns")
    expected = called(defined, given, "silu", "columns")
    weighting = torch.randn(11, 6, 5, dtype=torch.float64).permute(2, 1, 0)
    ours = torch.autograd.grad(y, given["x"], weighting)[0]
    assert_close(ours, torch.autograd.grad(expected, given["x"], weighting)[0], "float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lower_precision(dtype, axis, activation):
    """Reference: float64 from the same rounded inputs."""
    given = tensors(axis, shape=(100,))
    low = {
        k: v.detach().to(dtype).requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in given.items()
    }
    low["gamma"] = given["gamma"].detach().float().requires_grad_()
    wide = {
        k: v.detach().double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in low.items()
    }
    expected = value_and_gradients(defined, wide, activation, axis)
    for name, ours in value_and_gradients(lost_linear, low, activation, axis).items():
        assert ours.dtype == (torch.float32 if name == "gamma" else dtype)
        assert_close(ours, expected[name], str(dtype).removeprefix("torch."), name)


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_autocast_is_bfloat16_outside_and_float32_in_the_gradients(axis):
    given = {
        k: v.detach().float().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in tensors(axis, shape=(100,)).items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = value_and_gradients(lost_linear, given, "silu", axis)
    assert ours["y"].dtype == torch.bfloat16
    assert {ours[name].dtype for name in ours if name != "y"} == {torch.float32}
    expected = value_and_gradients(
        defined,
        {
            k: v.detach().double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in given.items()
        },
        "silu",
        axis,
    )
    for name, value in ours.items():
        assert_close(value, expected[name], "bfloat16", name)


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_compiles_whole_and_equals_eager(axis):
    torch._dynamo.reset()
    given = tensors(axis)
    compiled = torch.compile(lost_linear, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(defined, given, "silu", axis)
    for name, ours in value_and_gradients(compiled, given, "silu", axis).items():
        assert_close(ours, expected[name], "float64", name)


def test_keeps_the_input_h_and_the_kept_columns():
    """Between forward and backward: x, h [100, 5], the kept columns [100, 3] and the parameters; no z."""
    given = tensors(shape=(100,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        called(lost_linear, given, "silu", "columns")
    own_storage = {v.data_ptr() for v in given.values() if v is not None}
    extra = [t for t in kept if t.data_ptr() not in own_storage]
    assert sorted({tuple(t.shape) for t in extra}) == [(100, 3), (100, 5)]


def test_second_derivative_is_refused():
    given = tensors()
    y = called(lost_linear, given, "silu", "columns")
    (first,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("wrong", ["index", "gamma", "swapped gamma", "activation", "up", "bias"])
@pytest.mark.parametrize("limit", ["float64", "float32", "bfloat16"])
def test_negative_controls(wrong, limit):
    """A deliberate mistake exceeds every limit of this file many times over."""
    given = tensors(shape=(100,))
    changes = {
        "index": {"index": (given["index"] + 1) % 13},
        "gamma": {"gamma": given["gamma"] + 0.05},
        "swapped gamma": {"gamma": 1 - given["gamma"]},
        "up": {"up": given["up"].flip(1)},
        "bias": {"bias": None},
        "activation": {},
    }[wrong]
    expected = called(defined, given, "silu", "columns")
    y = called(lost_linear, given, "gelu" if wrong == "activation" else "silu", "columns", **changes)
    assert relative_rms_error(y, expected) > 3 * LIMITS[limit]
    with pytest.raises(AssertionError):
        assert_close(y, expected, limit)
