"""The Triton kernels of RMSNorm, SwiGLU and rotary embedding in Triton's interpreter, on a CPU: errors as JSON.

    TRITON_INTERPRET=1 python -m lost.testing.interpreted_pointwise

The variable must be set before triton is imported. Memory that nobody has written is NaN.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from lost_kernels.rmsnorm import triton_impl as norm_impl
from lost_kernels.rope import triton_impl as rope_impl
from lost_kernels.swiglu import triton_impl as swiglu_impl
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lost.testing.numerics import relative_rms_error
from lost.testing.pointwise import DEFINITIONS, EPS, Pointwise, norm_case, rope_case, swiglu_case

# Blocks are 1,024 values. Norms: several rows in a block, a row a block, rows as wide as a block and wider, and more
# blocks than programs. SwiGLU: less than a block, several, exactly one.
CASES: dict[str, Callable[[], Pointwise]] = {
    "rms_norm, odd": norm_case,
    "rms_norm, narrow": partial(norm_case, (40, 5)),
    "rms_norm, one row": partial(norm_case, (1, 63)),
    "rms_norm, a row a block": partial(norm_case, (5, 1000)),
    "rms_norm, a block exactly": partial(norm_case, (4, 512)),
    "rms_norm, wide rows": partial(norm_case, (3, 2049)),
    "rms_norm, three dimensions": partial(norm_case, (2, 3, 100)),
    "rms_norm, more blocks than programs": partial(norm_case, (100, 17)),
    "swiglu, odd": swiglu_case,
    "swiglu, one number": partial(swiglu_case, (1,)),
    "swiglu, a block exactly": partial(swiglu_case, (4, 256)),
    "swiglu, three dimensions": partial(swiglu_case, (2, 3, 1000)),
    "rope, odd": rope_case,
    "rope, one token": partial(rope_case, 1, 1, 1, 1, 2),
    "rope, a table a sequence": partial(rope_case, 3, 4, 4, 5, 10, num_tables=3),
    "rope, four tables": partial(rope_case, has_equal_halves=False),
    "rope, more tokens than a block": partial(rope_case, 1, 2, 1, 150, 10),
    "rope, as llama": partial(rope_case, 2, 8, 2, 33, 64),
}
EMPTY = [partial(norm_case, (0, 7)), partial(swiglu_case, (0, 7)), partial(rope_case, seq_len=0)]


def errors() -> dict[str, float]:
    """The largest relative RMS error over values and gradients, by case; and of deliberate mistakes, as 'wrong: ..'."""
    found = {}
    for name, make in CASES.items():
        with changed(norm_impl, "MAX_PROGRAMS", 3 if "more blocks" in name else norm_impl.MAX_PROGRAMS):
            found[name] = error_of(make())
    for make in EMPTY:
        case = make().cast(torch.float32)
        assert all(value.shape == case.exact()[name].shape for name, value in case.ours().items())
    found |= {f"bits: {name}": share for name, share in shares_of_other_bits().items()}
    for (case, name), mistake in MISTAKES.items():
        with mistake:
            found[f"wrong: {case}: {name}"] = error_of(CASES[case]())
    return found


def error_of(case: Pointwise) -> float:
    narrow = case.cast(torch.float32)
    expected = narrow.exact()
    return max(relative_rms_error(value, expected[name]) for name, value in narrow.ours().items())


def shares_of_other_bits() -> dict[str, float]:
    """Of all values in float16, whose rounding the interpreter has right, how many are not those of transformers."""
    norm, product = norm_case((32, 128)).cast(torch.float16), swiglu_case((32, 128)).cast(torch.float16)
    x, weight = norm.leaves.values()
    theirs = LlamaRMSNorm(128, EPS)
    theirs.weight = torch.nn.Parameter(weight)
    return {
        "rms_norm": _share_of_other_bits(norm.ours(), theirs(x)),
        "rms_norm without the rounding": _share_of_other_bits(norm.ours(), F.rms_norm(x, (128,), weight, EPS)),
        "swiglu": _share_of_other_bits(product.ours(), product.of(DEFINITIONS["swiglu"])["value 0"]),
        "swiglu without the rounding": _share_of_other_bits(product.ours(), product.exact()["value 0"].half()),
    }


def _share_of_other_bits(ours: dict[str, Tensor], other: Tensor) -> float:
    assert ours["value 0"].dtype == other.dtype
    return float((ours["value 0"] != other).double().mean())


@contextmanager
def changed(place: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(place, name)
    setattr(place, name, value)
    yield
    setattr(place, name, original)


@triton.jit
def swapped_forward(gate_ptr, up_ptr, y_ptr, num_values, BLOCK: tl.constexpr):
    """gate * silu(up)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < num_values
    gate = tl.load(gate_ptr + places, mask=is_there, other=0.0)
    up = tl.load(up_ptr + places, mask=is_there, other=0.0)
    tl.store(y_ptr + places, gate * up * tl.sigmoid(up), mask=is_there)


def _first_weight(original: Callable, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return original(x, weight[:1].expand_as(weight).contiguous(), eps)


def _eps_forgotten(original: Callable, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return original(x, weight, 0 * eps)


def _one_sum_left_out(original: Callable, *arguments: Any, needs_weight: bool) -> tuple[Tensor, Tensor | None]:
    dy, x, weight, rstd = arguments
    dx, _ = original(dy, x, weight, rstd, needs_weight=needs_weight)
    return dx, original(dy[1:], x[1:], weight, rstd[1:], needs_weight=needs_weight)[1]


def _always_forward(original: Callable, *arguments: Any, is_backward: bool) -> None:  # noqa: ARG001
    original(*arguments, is_backward=False)


def _one_table(original: Callable, table: Tensor) -> tuple[int, int]:
    return 0, original(table)[1]


def _without_keys(original: Callable, new_query: Tensor, new_key: Tensor, *others: Tensor, is_backward: bool) -> None:
    original(new_query, torch.empty_like(new_key), *others, is_backward=is_backward)


def _replaced(place: Any, name: str, wrong: Callable) -> Any:
    return changed(place, name, partial(wrong, getattr(place, name)))


# By the case that sees it.
MISTAKES = {
    ("rms_norm, odd", "the first weight for all"): _replaced(norm_impl, "rms_norm_forward", _first_weight),
    ("rms_norm, odd", "without eps"): _replaced(norm_impl, "rms_norm_forward", _eps_forgotten),
    ("rms_norm, odd", "a row is not in the sum"): _replaced(norm_impl, "rms_norm_backward", _one_sum_left_out),
    ("swiglu, odd", "gate and up swapped"): changed(swiglu_impl.triton_kernels, "swiglu_forward", swapped_forward),
    ("rope, odd", "backward as forward"): _replaced(rope_impl, "rotate_into", _always_forward),
    ("rope, a table a sequence", "one table for all"): _replaced(rope_impl, "_strides", _one_table),
    ("rope, odd", "keys never written"): _replaced(rope_impl, "rotate_into", _without_keys),
}


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    # Fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True)
    print(json.dumps(errors()))
