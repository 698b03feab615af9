"""What a block keeps between its forward and its backward pass: one policy a level, the rest is computed again.

A block is checkpointed whole, and a policy names the operators whose outputs are kept all the same. Sizes a token: D
hidden_size, F intermediate_size, R lost_rank; every level keeps the block's input and the output of o_proj, whose sum
is the second residual.

| level | kept besides | computed again |
|---|---|---|
| p0 | h, q, k, v, attention, gate, up, outputs of norms, the MLP's product | insides of norms and SwiGLU, rope |
| p1 | h, q, k, v, attention, gate, up | everything between products: norms, SwiGLU, rope |
| p2 | h, q, k, v, attention | the products of gate and up with their up factors too |
| p3 | h | every product with an up factor, and attention |

h are the outputs of the down factors with the kept input columns; a dense layer has none, so that its p3 is little
more than runtime.recompute=block. Of every level the last product is made once more: its inputs mark the end.

p0 and p1 come this way where blocks are compiled only; otherwise `lost.train.remake` keeps the same for less of
Python's time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lost.model.lost_linear import LostLinear

# In the order of the forward pass.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOW_RANK = "low rank"
LEVELS: dict[str, frozenset[str]] = {
    "p0": frozenset({LOW_RANK, "pointwise", "attention", *PROJECTIONS[:-1]}),
    "p1": frozenset({LOW_RANK, "attention", *PROJECTIONS[:-1]}),
    "p2": frozenset({LOW_RANK, "attention", *PROJECTIONS[:4]}),
    "p3": frozenset({LOW_RANK, "o_proj"}),
}

aten, lost = torch.ops.aten, torch.ops.lost
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
# Of norms and of the MLP's product where they are operators.
POINTWISE = {lost.rms_norm.default, lost.swiglu.default}
PRODUCTS = {aten.mm.default, aten.addmm.default}


def checkpoint_selectively(block: LlamaDecoderLayer, level: str) -> None:
    """Makes `block` keep in training what LEVELS[level] says; transformers calls the function set here.

    After `lost.train.wrap.set_kernels`, which decides what operators there are.
    """
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = _checkpoint(level, operators_of(block))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Operators:
    """Those of one pass through a block, in their order.

    Attributes:
        products: what each matrix product of aten is, in the words of LEVELS.
        group_ups: the projections that `lost::group_up` computes.
    """

    products: tuple[str, ...]
    group_ups: tuple[str, ...]
    intermediate_size: int


@cache
def _checkpoint(level: str, operators: Operators) -> Callable:
    """One function for all blocks alike: a compiler that met another one in every block would compile each anew."""
    context = partial(contexts, level, operators)
    return partial(checkpoint, use_reentrant=False, context_fn=context)


def contexts(level: str, operators: Operators) -> Any:
    """Contexts of one forward pass and of its repetition, as torch's checkpoint wants them."""
    return create_selective_checkpoint_contexts(Policy(LEVELS[level], operators))


class Policy:
    """Says of every operator of one pass through a block whether its output is kept.

    The operators of a projection are known by their number: blocks call them in one order, grouped or not.
    """

    def __init__(self, kept: frozenset[str], operators: Operators):
        self.kept, self.operators = kept, operators
        # torch 2.11 asks in the repetition too.
        self.num_seen = {False: (0, 0), True: (0, 0)}

    def __call__(self, context: Any, op: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG002
        is_kept = self.name_of(op, args, context.is_recompute) in self.kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    def name_of(self, op: Callable, args: tuple, is_recompute: bool) -> str:
        """What the operator's output is, in the words of LEVELS; empty: something else."""
        num_products, num_ups = self.num_seen[is_recompute]
        if op in PRODUCTS:
            self.num_seen[is_recompute] = num_products + 1, num_ups
            return self.operators.products[num_products]
        if op is lost.group_up.default:
            num_members = len(args[2])
            self.num_seen[is_recompute] = num_products, num_ups + num_members
            # The members of a group share a level: q, k and v, or gate and up.
            return self.operators.group_ups[num_ups]
        if op is lost.group_down.default:
            return LOW_RANK
        if op in ATTENTION:
            return "attention"
        if op in POINTWISE:
            return "pointwise"
        return "pointwise" if op is aten.mul.Tensor and self._is_input_of_a_layer(*args) else ""

    def _is_input_of_a_layer(self, left: Any, right: Any) -> bool:
        """Whether left * right is a norm's weight times its values, or the MLP's product."""
        if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
            return False
        return left.dim() == 1 or (left.shape == right.shape and left.shape[-1] == self.operators.intermediate_size)


def operators_of(block: LlamaDecoderLayer) -> Operators:
    products: list[str] = []
    group_ups: list[str] = []
    for name in PROJECTIONS:
        layer = getattr(block.mlp if name in ("gate_proj", "up_proj", "down_proj") else block.self_attn, name)
        if not isinstance(layer, LostLinear):
            products.append(name)
        elif layer.uses_operators:
            group_ups.append(name)
        else:
            has_sparse_product = layer.selection_axis == "rows" and layer.num_kept > 0
            products += [LOW_RANK, *[LOW_RANK] * has_sparse_product, name]
    return Operators(tuple(products), tuple(group_ups), block.mlp.intermediate_size)


def llama_blocks(model: nn.Module) -> list[LlamaDecoderLayer]:
    """The blocks that levels know; none in another architecture, which keeps everything."""
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
