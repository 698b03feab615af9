"""Random arguments of the pointwise operators (RMSNorm, SwiGLU, rotary embedding), with values and gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lost_kernels.rmsnorm import reference_rms_norm, rms_norm
from lost_kernels.rmsnorm.op import rms_norm_op
from lost_kernels.rope import reference_rope, rope
from lost_kernels.rope.op import rope_op
from lost_kernels.swiglu import reference_swiglu, swiglu
from lost_kernels.swiglu.op import swiglu_op
from torch import Tensor

EPS = 1e-5
OURS: dict[str, Callable] = {"rms_norm": rms_norm, "swiglu": swiglu, "rope": rope}
DEFINITIONS: dict[str, Callable] = {"rms_norm": reference_rms_norm, "swiglu": reference_swiglu, "rope": reference_rope}
# The operators with plain torch inside, as they are on CUDA in float64.
OPERATORS: dict[str, Callable] = {
    "rms_norm": lambda x, weight, eps: rms_norm_op(x, weight, eps, "grouped")[0],
    "swiglu": lambda gate, up: swiglu_op(gate, up, "grouped"),
    "rope": lambda query, key, cos, sin: rope_op(query, key, cos, sin, "grouped"),
}


@dataclass
class Pointwise:
    """Arguments of one operator: those with a gradient, and the others, which come after them."""

    name: str
    leaves: dict[str, Tensor]
    constants: tuple[Any, ...] = ()

    def of(self, function: Callable) -> dict[str, Tensor]:
        """Values of function(*arguments) and the gradients of a fixed random weighting of them, by name."""
        found = function(*self.leaves.values(), *self.constants)
        values = found if isinstance(found, tuple) else (found,)
        generator = torch.Generator().manual_seed(9)
        weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in values]
        gradients = torch.autograd.grad(values, list(self.leaves.values()), weights)
        named = {f"value {number}": value for number, value in enumerate(values)}
        return named | {f"d_{name}": value for name, value in zip(self.leaves, gradients, strict=True)}

    def ours(self, kernels: str = "triton") -> dict[str, Tensor]:
        return self.of(partial(OURS[self.name], kernels=kernels))

    def exact(self) -> dict[str, Tensor]:
        """What the definition says of these values in float64."""
        return self.cast(torch.float64).of(DEFINITIONS[self.name])

    def cast(self, dtype: torch.dtype) -> "Pointwise":
        """These values in that dtype and the same layouts."""

        def cast(value: Any) -> Any:
            return value.detach().to(dtype) if isinstance(value, Tensor) else value

        leaves = {name: cast(value).requires_grad_() for name, value in self.leaves.items()}
        return Pointwise(self.name, leaves, tuple(map(cast, self.constants)))


def norm_case(shape: tuple[int, ...] = (19, 71), seed: int = 0) -> Pointwise:
    """x of rows with very different means and sizes."""
    normal = _normal(seed)
    x = normal(*shape) * (3 * normal(*shape[:-1], 1)).exp() + normal(*shape[:-1], 1)
    return Pointwise("rms_norm", _leaves(x=x, weight=1 + 0.5 * normal(shape[-1])), (EPS,))


def swiglu_case(shape: tuple[int, ...] = (19, 71), seed: int = 0) -> Pointwise:
    normal = _normal(seed)
    return Pointwise("swiglu", _leaves(gate=3 * normal(*shape), up=normal(*shape)))


def rope_case(
    batch: int = 2,
    query_heads: int = 5,
    key_heads: int = 3,
    seq_len: int = 7,
    head_dim: int = 6,
    *,
    num_tables: int = 1,
    has_equal_halves: bool = True,
    seed: int = 0,
) -> Pointwise:
    """Queries and keys as attention has them, [B, T, H, D] transposed.

    Args:
        num_tables: of cos and sin, 1 or `batch`.
        has_equal_halves: as LLaMA's tables; else cos and sin are four tables of independent numbers.
    """
    normal = _normal(seed)
    query, key = (normal(batch, seq_len, heads, head_dim).transpose(1, 2) for heads in (query_heads, key_heads))
    if has_equal_halves:
        angles = 3 * normal(num_tables, seq_len, head_dim // 2).repeat(1, 1, 2)
        tables = angles.cos(), angles.sin()
    else:
        tables = normal(num_tables, seq_len, head_dim), normal(num_tables, seq_len, head_dim)
    return Pointwise("rope", _leaves(query=query, key=key), tables)


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _leaves(**values: Tensor) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in values.items()}
