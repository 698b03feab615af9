"""Groups of LOST layers that read one x: gradients, torch's own checks of operators, compiling, autocast."""

import pytest
import torch
from lost_kernels.lost_linear import LostWeights, lost_group, reference_lost_linear
from torch.utils._python_dispatch import TorchDispatchMode

from lost.testing.lost_groups import IN_FEATURES, KINDS, SIZES, assert_same, case, model_gradients
from lost.testing.numerics import assert_close, relative_rms_error
from lost.testing.processes import run_processes


class Looking(TorchDispatchMode):
    """Sees every operator and changes nothing."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def by_operators(x, members, activation):
    """`lost_group` as whoever looks at operators finds it; otherwise they are not called."""
    with Looking() as looking:
        ys = lost_group(x, members, activation)
    assert {"lost::group_down", "lost::group_up"} <= looking.names
    return ys


WAYS = {"directly": lost_group, "by operators": by_operators}
both_ways = pytest.mark.parametrize("function", WAYS.values(), ids=WAYS)


@both_ways
@pytest.mark.parametrize("num_members", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "identity", "gelu", "relu"])
def test_a_group_is_its_members_one_by_one(function, num_members, kind, has_bias, activation):
    given = case(SIZES[:num_members], kind, has_bias=has_bias, activation=activation)
    assert_same(given.outputs(function), given.outputs(), "float64")


@both_ways
@pytest.mark.parametrize("sizes", [((5, 0, 11), (4, 0, 7)), ((5, 13, 1), (13, 1, 3)), ((1, 1, 1), (1, 1, 1))])
def test_no_sparse_block_at_all_all_channels_and_one_of_each(function, sizes):
    given = case(sizes)
    assert_same(given.outputs(function), given.outputs(), "float64")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_bits(dtype):
    given = case(kind="learnable", shape=(3, 17)).cast(dtype)
    directly, by_operator = given.outputs(lost_group), given.outputs(by_operators)
    assert all(torch.equal(value, by_operator[name]) for name, value in directly.items())


@both_ways
@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize("num_members", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(function, activation, num_members, kind):
    given = case(SIZES[:num_members], kind, activation=activation, shape=(2,))
    names = list(given.leaves)

    def from_values(*values):
        by_name = dict(zip(names, values, strict=True))
        members = [
            LostWeights(*(by_name.get(f"{name} {number}", value) for name, value in member._asdict().items()))
            for number, member in enumerate(given.members)
        ]
        return tuple(function(by_name["x"], members, activation))

    assert torch.autograd.gradcheck(from_values, list(given.leaves.values()), fast_mode=num_members > 1)


@both_ways
@pytest.mark.parametrize("needed", ["x", "low_rank_down 1", "low_rank_up 0", "sparse_weight 2", "gamma 2", "bias 1"])
def test_one_gradient_alone(function, needed):
    given = case(kind="learnable")
    expected = given.outputs()[needed]
    for name, leaf in given.leaves.items():
        leaf.requires_grad_(name == needed)
    total = 0
    generator = torch.Generator().manual_seed(9)
    for y in function(given.x, given.members, "silu"):
        total = total + (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    total.backward()
    assert_close(given.leaves[needed].grad, expected, "float64", needed)
    assert [name for name, leaf in given.leaves.items() if leaf.grad is not None] == [needed]


@both_ways
def test_an_output_that_nobody_uses(function):
    given = case()
    ours, expected = (
        torch.autograd.grad(ys[0].sum() + ys[2].square().sum(), given.x)[0]
        for ys in (
            function(given.x, given.members, "silu"),
            [reference_lost_linear(given.x, *m[:5], "silu", m.bias) for m in given.members],
        )
    )
    assert_close(ours, expected, "float64")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_sparse", [True, False])
def test_torchs_checks_of_the_operators(kind, has_sparse):
    """Schema, fake tensors, autograd registration, AOT with static and dynamic shapes."""
    sizes = SIZES if has_sparse else ((5, 0, 11), (4, 0, 7))
    given = case(sizes, kind, shape=(6,)).cast(torch.float32)
    sparse = [(m.sparse_weight, m.sparse_index) for m in given.members if m.sparse_weight is not None]
    indices = [index for _, index in sparse]
    down = (given.x, [m.low_rank_down for m in given.members], indices, "grouped")
    torch.library.opcheck(torch.ops.lost.group_down.default, down)
    h, kept = (t.detach().requires_grad_() for t in torch.ops.lost.group_down(*down))
    gammas = [m.gamma for m in given.members]
    up = (
        h,
        kept,
        [m.low_rank_up for m in given.members],
        [weight for weight, _ in sparse],
        gammas if kind == "learnable" else [],
        [m.bias for m in given.members],
        [size[1] for size in sizes],
        gammas if kind == "fixed" else [],
        "silu",
        "grouped",
    )
    torch.library.opcheck(torch.ops.lost.group_up.default, up)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_any_number_of_rows(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lost_group, fullgraph=True, backend=backend, dynamic=True)
    for num_rows in (6, 9, 17):
        given = case(kind="learnable", shape=(num_rows,), seed=num_rows)
        assert_same(given.outputs(compiled), given.outputs(), "float64")
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [*WAYS, "compiled"])
def test_autocast_gives_bfloat16_outside_and_float32_gradients(kind, way):
    torch._dynamo.reset()
    given = case(kind=kind, shape=(100,)).cast(torch.float32)
    function = WAYS.get(way) or torch.compile(lost_group, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = given.outputs(function)
    assert {value.dtype for name, value in ours.items() if name[0] == "y"} == {torch.bfloat16}
    assert {value.dtype for name, value in ours.items() if name[0] != "y"} == {torch.float32}
    expected = given.cast(torch.float64).outputs()
    # Dot products of 6 to 11 numbers that nearly cancel.
    cancelling = {"gamma 0", "gamma 1", "gamma 2"}
    assert_same(
        {name: value for name, value in ours.items() if name not in cancelling},
        {name: value for name, value in expected.items() if name not in cancelling},
        "bfloat16",
    )


@both_ways
def test_autocast_does_not_round_gamma(function):
    """0.7 times 248 is 173.6, which is 174 in bfloat16; with gamma in bfloat16, 0.69921875, it would be 173."""
    weights = LostWeights(torch.eye(4), torch.eye(4), None, None, torch.tensor([0.7]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = function(torch.full((1, 4), 248.0), [weights], "identity")
        (rounded,) = function(
            torch.full((1, 4), 248.0), [weights._replace(gamma=torch.tensor([0.69921875]))], "identity"
        )
    assert y.unique().tolist() == [174.0]
    assert rounded.unique().tolist() == [173.0]


@both_ways
def test_autocast_leaves_float64_alone(function):
    given = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {y.dtype for y in function(given.x, given.members, "silu")} == {torch.float64}


def test_gradients_are_the_same_bits_in_every_run():
    given = case(shape=(64,)).cast(torch.float32)
    first, again = given.outputs(lost_group), given.outputs(lost_group)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("wrong", ["order", "index", "gamma", "activation", "shared down"])
def test_negative_controls(wrong):
    """A deliberate mistake in one member of three is far above the limits of this file, in float32 as well."""
    given = case()
    expected = given.outputs()
    first, second, third = given.members
    if wrong == "order":
        given.members = [third._replace(low_rank_down=first.low_rank_down[:3]), second, first]
    if wrong == "index":
        given.members[2] = third._replace(sparse_index=(third.sparse_index + 1) % IN_FEATURES)
    if wrong == "gamma":
        given.members[1] = second._replace(gamma=first.gamma)
    if wrong == "shared down":
        given.members[1] = second._replace(low_rank_down=first.low_rank_down[:4])
    activation = "gelu" if wrong == "activation" else "silu"
    ys = lost_group(given.x, given.members, activation)
    errors = [relative_rms_error(y, expected[f"y {number}"]) for number, y in enumerate(ys)]
    assert max(errors) > 3e-2


@pytest.mark.parametrize(("wrapper", "is_compiled"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_gradients_of_two_processes_are_those_of_one(tmp_path, wrapper, is_compiled):
    """Every process has other rows; against the definition in one process."""
    expected = model_gradients(0, "none", "reference", False)
    for found in run_processes(model_gradients, tmp_path, wrapper, "grouped", is_compiled):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert_close(value, expected[name], "initialisation", name)
