"""The Triton kernels compiled for sm_80, sm_90, sm_100 and gfx942 at a 1B model's sizes: vectors, registers, spills."""

import pytest

pytest.importorskip("triton")

from lost_kernels.lost_linear import triton_kernels
from lost_kernels.lost_linear.layout import padded
from lost_kernels.lost_linear.triton_impl import TILES

from lost.testing.compiled import TARGETS, Compiled, compiled

RANK, NUM_KEPT = 512, 21
WIDTH = padded(RANK + NUM_KEPT)
# Registers of a thread: with 64 a multiprocessor of 65,536 holds half of its 2,048 threads.
CAPS = {"z_forward": 64, "z_backward": 64, "add_kept": 64, "inverse_map": 40}
STRIDES = {"h_stride", "z_stride", "dz_stride", "dx_stride", "in_features"}


def compile_for(target: str, name: str, width: int = WIDTH, **changes) -> Compiled:
    kernel, tile = getattr(triton_kernels, name), TILES[name]
    member = {"RANK": RANK, "NUM_KEPT": NUM_KEPT, "WIDTH": width, "ACTIVATION": "silu", "HAS_GAMMA": True}
    block = {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    constants = {
        "z_forward": member | block,
        "z_backward": member | block | {"NEEDS_GAMMA": True},
        "add_kept": block | {"NUM_MEMBERS": 3},
        "inverse_map": {"NUM_KEPT": NUM_KEPT, "BLOCK_CHANNELS": tile.rows, "BLOCK_KEPT": tile.columns},
    }[name] | changes
    special = {"gamma_ptr": "*fp32", "d_gamma_ptr": "*fp32", "index_ptr": "*i64", "inverse_ptr": "*i32"}
    others = [argument for argument in kernel.arg_names if argument not in constants]
    types = {arg: special.get(arg, "*bf16" if arg.endswith("_ptr") else "i32") for arg in others}
    aligned = {arg for arg in others if arg.endswith("_ptr") or arg in STRIDES}
    return compiled(kernel, types, constants, aligned, tile.num_threads // TARGETS[target].warp_size, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CAPS)
def test_registers_and_spills(target, name):
    made = compile_for(target, name)
    assert made.spilled == 0
    assert 0 < made.registers <= CAPS[name]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["z_forward", "z_backward", "add_kept"])
def test_rows_move_in_vectors_of_16_bytes(target, name):
    made = compile_for(target, name)
    # Of h in four blocks, of z or dz in the fifth too; narrow are the kept columns alone, which lie anywhere.
    wide = {"z_forward": (4, 5), "z_backward": (9, 4), "add_kept": (1, 1)}[name]
    assert made.wide_loads >= wide[0]
    assert made.wide_stores >= wide[1]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_width_that_is_not_padded_loses_the_vectors(target):
    """Negative control, and why z is padded: R + S = 533 columns a row."""
    made = compile_for(target, "z_forward", width=RANK + NUM_KEPT)
    assert made.wide_stores < compile_for(target, "z_forward").wide_stores
