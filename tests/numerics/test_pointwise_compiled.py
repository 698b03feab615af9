"""The Triton kernels of RMSNorm, SwiGLU and rotary embedding compiled for sm_80, sm_90, sm_100 and gfx942.

At sizes of 130M (hidden_size 768), 1B (hidden_size 2048, 32 heads of 64) and 7B (4096, 32 heads of 128) models.
"""

import pytest

pytest.importorskip("triton")

from lost_kernels.rmsnorm import triton_impl as norm_impl
from lost_kernels.rmsnorm import triton_kernels as norm_kernels
from lost_kernels.rope import triton_impl as rope_impl
from lost_kernels.rope import triton_kernels as rope_kernels
from lost_kernels.swiglu import triton_impl as swiglu_impl
from lost_kernels.swiglu import triton_kernels as swiglu_kernels

from lost.testing.compiled import TARGETS, Compiled, compiled

NUM_HEADS = 32
# Registers of a thread: with 64 a multiprocessor of 65,536 holds half of its 2,048 threads.
CAPS = {
    ("norm_forward", 768): 40,
    ("norm_forward", 2048): 40,
    ("norm_backward", 2048): 64,
    ("norm_backward", 4096): 64,
    ("swiglu_forward", 0): 40,
    ("swiglu_backward", 0): 48,
    ("rope", 64): 64,
    ("rope", 128): 64,
    ("rope_backward", 64): 64,
}
# Vectors that a thread reads and writes: one of every tensor, two where they are float32; rope: one of cos, of sin and
# of four heads for each half of a head. The code for queries and keys is there twice, on gfx942 merged.
VECTORS = {
    "norm_forward": (2, 1),
    "norm_backward": (3, 3),
    "swiglu_forward": (2, 1),
    "swiglu_backward": (3, 2),
    "rope": (4 + 8, 8),
    "rope_backward": (4 + 8, 8),
}
SPECIAL = {"rstd_ptr": "*fp32", "d_weight_ptr": "*fp32", "eps": "fp32"}


def kernel_of(name: str, size: int) -> tuple:
    """(kernel, its tile, its constants)."""
    if name.startswith("norm"):
        tile = norm_impl.tile_for(size)
        constants = {"WIDTH": size, "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
        if name == "norm_forward":
            return norm_kernels.rms_norm_forward, tile, constants
        return norm_kernels.rms_norm_backward, tile, constants | {"NEEDS_WEIGHT": True}
    if name.startswith("swiglu"):
        tile = swiglu_impl.TILE
        return getattr(swiglu_kernels, name), tile, {"BLOCK": tile.columns}
    tile = rope_impl.tile_for(size)
    heads = {"NUM_QUERY_HEADS": NUM_HEADS, "NUM_KEY_HEADS": NUM_HEADS, "BLOCK_HEADS": rope_impl.BLOCK_HEADS}
    block = {"HALF": size // 2, "BLOCK_TOKENS": tile.rows, "BLOCK_HALF": tile.columns}
    return rope_kernels.rotate, tile, heads | block | {"IS_BACKWARD": name == "rope_backward"}


def compile_for(target: str, name: str, size: int, **changes) -> Compiled:
    """`changes`: of constants, or of the set of arguments that are multiples of 16."""
    kernel, tile, constants = kernel_of(name, size)
    unaligned = changes.pop("unaligned", set())
    constants = constants | changes
    others = [argument for argument in kernel.arg_names if argument not in constants]
    types = {arg: SPECIAL.get(arg, "*bf16" if arg.endswith("_ptr") else "i32") for arg in others}
    aligned = {arg for arg in others if arg.endswith("_ptr") or "stride" in arg or arg == "num_values"}
    num_warps = tile.num_threads // TARGETS[target].warp_size
    return compiled(kernel, types, constants, aligned - unaligned, num_warps, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "size"), CAPS)
def test_vectors_registers_and_spills(target, name, size):
    made = compile_for(target, name, size)
    assert made.spilled == 0
    assert 0 < made.registers <= CAPS[name, size]
    loads, stores = VECTORS[name]
    assert made.wide_loads >= loads
    assert made.wide_stores >= stores
    assert made.narrow_loads == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_lies_at_odd_places_loses_the_vectors(target):
    """Negative controls, and why the product is not computed row by row."""
    assert compile_for(target, "norm_forward", 2048, WIDTH=2047).wide_loads < VECTORS["norm_forward"][0]
    made = compile_for(target, "swiglu_forward", 0, unaligned={"num_values"})
    assert made.wide_loads < VECTORS["swiglu_forward"][0]
    made = compile_for(target, "rope", 64, unaligned={"query_stride_t", "key_stride_t"})
    assert made.wide_loads < VECTORS["rope"][0]
