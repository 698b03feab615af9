"""RMSNorm, SwiGLU and rotary embedding as operators: transformers' values, gradients, compiling, autocast, memory.

In float64 the operators compute in plain torch, whatever `kernels` says, so that all but the Triton kernels is here.
"""

from functools import partial
from typing import Any

import pytest
import torch
from lost_kernels.rmsnorm import rms_norm
from lost_kernels.rope import rope
from lost_kernels.swiglu import swiglu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lost.testing.numerics import LIMITS, assert_close, relative_rms_error
from lost.testing.pointwise import DEFINITIONS, EPS, OPERATORS, OURS, norm_case, rope_case, swiglu_case

SMALL_ROPE = partial(rope_case, 2, 3, 2, 5, 6)
CASES = {
    "rms_norm": partial(norm_case, (7, 63)),
    "swiglu": partial(swiglu_case, (7, 63)),
    "rope": SMALL_ROPE,
    "rope, a table a sequence": partial(SMALL_ROPE, num_tables=2),
    "rope, four tables": partial(SMALL_ROPE, has_equal_halves=False),
}
NAMES = ("rms_norm", "swiglu", "rope")


def assert_same(ours: dict, expected: dict, limit: str) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert_close(value, expected[name], limit, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["auto", "reference", "grouped"])
def test_values_are_those_of_transformers_bit_for_bit(dtype, kernels):
    x, weight = norm_case((5, 64)).cast(dtype).leaves.values()
    theirs = LlamaRMSNorm(64, EPS)
    theirs.weight = torch.nn.Parameter(weight)
    assert torch.equal(rms_norm(x, weight, EPS, kernels), theirs(x))
    gate, up = swiglu_case().cast(dtype).leaves.values()
    assert torch.equal(swiglu(gate, up, kernels), torch.nn.functional.silu(gate) * up)
    case = rope_case(num_tables=2).cast(dtype)
    arguments = *case.leaves.values(), *case.constants
    for ours, value in zip(rope(*arguments, kernels), apply_rotary_pos_emb(*arguments), strict=True):
        assert torch.equal(ours, value)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    case = CASES[name]()
    function = partial(OURS[case.name], kernels="triton")
    assert torch.autograd.gradcheck(lambda *leaves: function(*leaves, *case.constants), list(case.leaves.values()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_is_the_definition(name, dtype):
    case = CASES[name]().cast(getattr(torch, dtype))
    ours, expected = case.of(OPERATORS[case.name]), case.exact()
    assert {value.dtype for value in ours.values()} == {getattr(torch, dtype)}
    assert_same(ours, expected, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_torchs_checks_of_the_operators(name):
    """Schema, fake tensors, autograd registration, AOT with static and dynamic shapes."""
    case = CASES[name]().cast(torch.float32)
    operator = getattr(torch.ops.lost, name).default
    torch.library.opcheck(operator, (*case.leaves.values(), *case.constants, "grouped"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_for_any_number_of_rows(name, backend):
    torch._dynamo.reset()
    compiled = torch.compile(partial(OURS[name], kernels="triton"), fullgraph=True, backend=backend, dynamic=True)
    for count in (6, 17):
        shape = {"seq_len": count} if name == "rope" else {"shape": (2, count, 12)}
        case = {"rms_norm": norm_case, "swiglu": swiglu_case, "rope": rope_case}[name](**shape, seed=count)
        ours, eager = case.of(compiled), case.ours()
        assert_same(ours, case.exact(), "float64")
        assert {key: value.stride() for key, value in ours.items()} == {k: v.stride() for k, v in eager.items()}
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, is_compiled):
    """Products are what autocast rounds; float32 stays float32, and what comes from a product stays bfloat16."""
    torch._dynamo.reset()
    given = CASES[name]().cast(torch.float32)
    if name != "rms_norm":
        given.leaves = {key: leaf.detach().bfloat16().requires_grad_() for key, leaf in given.leaves.items()}
    dtype = next(iter(given.leaves.values())).dtype
    function = OPERATORS[name]
    used = torch.compile(function, fullgraph=True, backend="aot_eager") if is_compiled else function
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = given.of(used)
        definition = given.of(DEFINITIONS[name])
    plain = given.of(function)
    for key, value in ours.items():
        assert value.dtype == definition[key].dtype == dtype
        assert torch.equal(value, plain[key])


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_between_forward_and_backward(name):
    """The arguments themselves, and a number a row of a norm; the definition keeps more, but for the rotation."""
    case = CASES[name]()
    kept = {"rms_norm": 63 * (7 + 1) + 7, "swiglu": 2 * 7 * 63, "rope": 2 * 5 * 6}[name]
    assert values_kept(name, case, OURS[name]) == kept
    assert values_kept(name, case, DEFINITIONS[name]) > kept - (name == "rope")


def values_kept(name: str, case: Any, function: Any) -> int:
    storages: dict[int, int] = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    arguments = *case.leaves.values(), *case.constants
    if function is OURS[name]:
        function = partial(function, kernels="triton")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = function(*arguments)
    assert found is not None
    return sum(storages.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_backward_pass_gives_the_same_and_arguments_stay_as_they_are(name):
    case = CASES[name]()
    before = [leaf.detach().clone() for leaf in case.leaves.values()]
    found = OURS[name](*case.leaves.values(), *case.constants, kernels="triton")
    total = sum(value.square().sum() for value in (found if isinstance(found, tuple) else (found,)))
    leaves = list(case.leaves.values())
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_policy_of_recomputation_keeps_stays_as_it_is(name):
    """In place, the repetition would work on what the first pass had already changed."""
    case = CASES[name]()
    first = next(iter(case.leaves))
    factor = torch.eye(case.leaves[first].shape[-1], dtype=torch.float64, requires_grad=True)

    def policy(_, op, *args, **kwargs):  # noqa: ARG001
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def block(factor):
        product = (case.leaves[first].flatten(0, -2) @ factor).view(case.leaves[first].shape)
        values = [product if key == first else leaf for key, leaf in case.leaves.items()]
        found = OURS[name](*values, *case.constants, kernels="triton")
        return sum((v * v.detach().cos()).sum() for v in (found if isinstance(found, tuple) else (found,)))

    (plain,) = torch.autograd.grad(block(factor), factor)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    (again,) = torch.autograd.grad(checkpoint(block, factor, use_reentrant=False, context_fn=contexts), factor)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_derivative_is_refused(name):
    case = CASES[name]()
    found = OURS[name](*case.leaves.values(), *case.constants, kernels="triton")
    value = found[0] if isinstance(found, tuple) else found
    leaf = next(iter(case.leaves.values()))
    (first,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), leaf)


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_one_gradient_of_a_norm_alone(needed):
    case = norm_case((7, 63))
    expected = case.exact()[f"d_{needed}"]
    for name, leaf in case.leaves.items():
        leaf.requires_grad_(name == needed)
    y = rms_norm(*case.leaves.values(), EPS, kernels="triton")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (found,) = torch.autograd.grad(y, case.leaves[needed], weights)
    assert_close(found, expected, "float64")


def test_a_norm_of_two_dtypes():
    """bfloat16 values with a float32 weight give float32, as in transformers; gradients have their leaves' dtypes."""
    x, weight = norm_case((7, 63)).leaves.values()
    x, weight = x.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    ours, definition = (function(x, weight, EPS) for function in (OPERATORS["rms_norm"], DEFINITIONS["rms_norm"]))
    assert ours.dtype == definition.dtype == torch.float32
    assert torch.equal(ours, definition)
    assert [g.dtype for g in torch.autograd.grad(ours.sum(), [x, weight])] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name):
    """Arguments and gradients that are transposed or one expanded number, and heads that lie in pieces."""
    case = CASES[name]()
    leaves = [
        leaf.detach().mT.contiguous().mT.requires_grad_() if leaf.dim() > 1 else leaf for leaf in case.leaves.values()
    ]
    ours, expected = (
        function(*leaves, *case.constants) for function in (partial(OURS[name], kernels="triton"), DEFINITIONS[name])
    )
    for own, value in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, expected)), strict=True):
        assert_close(own, value, "float64")
        for gradient in (torch.ones(()).double().expand_as(value), value.detach().mT.contiguous().mT):
            found = torch.autograd.grad(own, leaves, gradient, retain_graph=True, allow_unused=True)
            exact = torch.autograd.grad(value, leaves, gradient, retain_graph=True, allow_unused=True)
            for left, right in zip(found, exact, strict=True):
                # The operator says zeros where the definition says nothing.
                assert_close(left, torch.zeros_like(left) if right is None else right, "float64")


def test_tables_with_a_gradient_are_the_definitions():
    case = rope_case()
    tables = [table.requires_grad_() for table in case.constants]
    ours = rope(*case.leaves.values(), *tables, kernels="triton")
    exact = DEFINITIONS["rope"](*case.leaves.values(), *tables)
    found, expected = (torch.autograd.grad(values[0].square().sum(), tables[0])[0] for values in (ours, exact))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_another_word_for_kernels_is_refused(name):
    case = CASES[name]()
    with pytest.raises(ValueError, match="kernels = 'fast': one of auto, reference, grouped, triton"):
        OURS[name](*case.leaves.values(), *case.constants, kernels="fast")


@pytest.mark.parametrize("wrong", ["weight", "eps", "swapped", "angle", "table"])
def test_negative_controls(wrong):
    """A deliberate mistake in an argument is far above the limits of this file."""
    case = CASES[
        {"weight": "rms_norm", "eps": "rms_norm", "swapped": "swiglu"}.get(wrong, "rope, a table a sequence")
    ]()
    expected = case.exact()
    leaves = case.leaves
    if wrong == "weight":
        case.leaves = {"x": leaves["x"], "weight": leaves["weight"].detach().roll(1).requires_grad_()}
    if wrong == "eps":
        case.constants = (100 * EPS,)
    if wrong == "swapped":
        case.leaves = {"gate": leaves["up"], "up": leaves["gate"]}
    if wrong == "angle":
        case.constants = case.constants[0], -case.constants[1]
    if wrong == "table":
        case.constants = tuple(table[:1] for table in case.constants)
    assert relative_rms_error(case.ours()["value 0"], expected["value 0"]) > 3 * LIMITS["bfloat16"]
