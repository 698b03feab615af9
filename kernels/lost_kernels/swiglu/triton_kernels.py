"""Triton kernels of silu(gate) * up, bound by memory, over values that lie one after the other.

Not over rows: with an odd intermediate_size every other row would begin where no vector can be read. Arithmetic is
float32; forward, silu is rounded to the dtype of gate before it multiplies, as in transformers.
"""

import triton
import triton.language as tl


@triton.jit
def swiglu_forward(gate_ptr, up_ptr, y_ptr, num_values, BLOCK: tl.constexpr):
    """y = silu(gate) * up. Grid (values / BLOCK)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < num_values
    gate = tl.load(gate_ptr + places, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=is_there, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + places, (silu * up).to(y_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def swiglu_backward(dy_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, num_values, BLOCK: tl.constexpr):
    """d_gate = dy up silu'(gate), d_up = dy silu(gate); gate and up stay as they are. Grid (values / BLOCK)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < num_values
    dy = tl.load(dy_ptr + places, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + places, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=is_there, other=0.0).to(tl.float32)
    opening = tl.sigmoid(gate)
    d_gate = dy * up * opening * (1.0 + gate * (1.0 - opening))
    tl.store(d_gate_ptr + places, d_gate.to(d_gate_ptr.dtype.element_ty), mask=is_there)
    tl.store(d_up_ptr + places, (dy * gate * opening).to(d_up_ptr.dtype.element_ty), mask=is_there)
