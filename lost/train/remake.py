"""runtime.recompute=p0 and p1 without looking at operators: norms and the MLP's product make their values again.

Selective checkpoints (`lost.train.recompute`) look at every operator of a block, twice, which costs Python several
milliseconds a block. These two levels do not need them: whatever they make again comes from two kinds of modules, and
nothing else of a block is worth dropping.

p0: norm and product keep what they read instead of what they compute on the way. p1: the layers behind them do not
keep what they read either; whichever of them is first in the backward pass makes it again for all.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from lost.model.blocks import outputs_of, product_of


def remake_pointwise(block: LlamaDecoderLayer, level: str) -> None:
    """Makes `block` keep in training what `level`, one of `accounting.memory.REMADE_LEVELS`, says."""
    values = RemadeValues()
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.forward = partial(_norm_forward, norm, values)
    block.mlp.forward = partial(_mlp_forward, block.mlp, values)
    if level == "p1":
        block.forward = partial(_dropping, values, block.forward)


def _norm_forward(norm: LlamaRMSNorm, values: "RemadeValues", hidden_states: Tensor) -> Tensor:
    # The norm's own forward; of a sharded model the weight may be nowhere when the value is made again.
    def normed(hidden_states: Tensor, weight: Tensor) -> Tensor:
        itself: Any = SimpleNamespace(weight=weight, **others)
        return _cast(type(norm).forward(itself, hidden_states))

    others = {name: getattr(norm, name) for name in ("variance_epsilon", "kernels") if hasattr(norm, name)}
    return values.make(normed, hidden_states, norm.weight)


def _mlp_forward(mlp: LlamaMLP, values: "RemadeValues", x: Tensor) -> Tensor:
    gate, up = outputs_of((mlp.gate_proj, mlp.up_proj), x)
    return mlp.down_proj(values.make(lambda gate, up: _cast(product_of(mlp, gate, up)), gate, up))


def _dropping(values: "RemadeValues", forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """The block's forward, whose layers keep none of the values that can be made again."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with torch.autograd.graph.saved_tensors_hooks(values.pack, values.unpack):
        try:
            return forward(*args, **kwargs)
        finally:
            values.by_address.clear()


def _cast(value: Tensor) -> Tensor:
    """`value` in the dtype in which autocast gives it to the layers: the copies that they would keep are this one."""
    device_type = value.device.type
    is_cast = torch.is_autocast_enabled(device_type) and value.dtype != torch.float64
    return value.to(torch.get_autocast_dtype(device_type)) if is_cast else value


class RemadeValues:
    """The values of one pass through a block that can be made again.

    Attributes:
        by_address: of memory, the value that lies there and its recipe, until the pass ends.
    """

    def __init__(self) -> None:
        self.by_address: dict[int, tuple[Tensor, Recipe]] = {}

    def make(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), of which autograd keeps the inputs alone."""
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
            return function(*inputs)
        recipe = Recipe(function, inputs)
        value = _Remade.apply(recipe, *inputs)
        # Held here, so that nothing else can lie at this address.
        self.by_address[value.data_ptr()] = value.detach(), recipe
        return value

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps instead of a tensor of the forward pass."""
        value, recipe = self.by_address.get(tensor.data_ptr(), (None, None))
        if value is None or tensor.shape.numel() != value.shape.numel() or tensor.dtype != value.dtype:
            return tensor
        assert value.is_contiguous() and tensor.is_contiguous(), "a view of a remade value in another order"  # noqa: PT018
        return recipe, tensor.shape

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        recipe, shape = kept
        return recipe.value().detach().view(shape)


class Recipe:
    """How one value is made again; what is made serves all that read it and then its own backward pass."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.function = function
        # Without what the inputs came from, which nothing here may keep alive. Of a parameter, a norm's few numbers, a
        # copy: sharded training takes its memory away after the forward pass.
        self.inputs = [
            (t.detach().clone() if isinstance(t, nn.Parameter) else t.detach(), t.requires_grad) for t in inputs
        ]
        self.device_type = inputs[0].device.type
        self.autocast = torch.is_autocast_enabled(self.device_type), torch.get_autocast_dtype(self.device_type)
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def value(self) -> Tensor:
        return self._make()[0]

    def gradients(self, d_value: Tensor) -> list[Tensor | None]:
        """Of the inputs; None where not needed."""
        value, leaves = self._make()
        self._made = None
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, d_value))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def _make(self) -> tuple[Tensor, list[Tensor]]:
        if self._made is None:
            leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in self.inputs]
            is_enabled, dtype = self.autocast
            # The layers that read the value have their hooks in force while they ask for it.
            with torch.enable_grad(), torch.autocast(self.device_type, dtype=dtype, enabled=is_enabled):
                self._made = self.function(*leaves), leaves
        return self._made


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.recipe = recipe
        return recipe.function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_value: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.recipe.gradients(d_value)
