"""LLaMA's norm, attention and MLP by LOST's operators: linears that read one input (q/k/v, gate/up) share its product.

Modules, parameters and their names are transformers' own; only the forward pass differs. `kernels` of every module says
how it is computed (`lost_kernels`): set by the training runtime (runtime.kernels).
"""

from collections.abc import Sequence
from typing import Any

from lost_kernels.lost_linear import lost_group
from lost_kernels.rmsnorm import rms_norm
from lost_kernels.rope import rope
from lost_kernels.swiglu import swiglu
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
)

from lost.model.lost_linear import LostLinear


class LostLlamaRMSNorm(LlamaRMSNorm):
    kernels: str = "auto"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, self.kernels)


class LostLlamaAttention(LlamaAttention):
    kernels: str = "auto"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        projected = outputs_of((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
        query, key = rope(query, key, *position_embeddings, self.kernels)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)  # pyright: ignore[reportArgumentType]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2).contiguous()), weights


class LostLlamaMLP(LlamaMLP):
    kernels: str = "auto"

    def forward(self, x: Tensor) -> Tensor:
        gate, up = outputs_of((self.gate_proj, self.up_proj), x)
        return self.down_proj(product_of(self, gate, up))


def product_of(mlp: LlamaMLP, gate: Tensor, up: Tensor) -> Tensor:
    """What down_proj reads: act(gate) * up, [..., intermediate_size], of LOST's MLP and of transformers' own."""
    if isinstance(mlp, LostLlamaMLP) and mlp.config.hidden_act == "silu":
        return swiglu(gate, up, mlp.kernels)
    return mlp.act_fn(gate) * up


def outputs_of(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """layer(x) of every layer, by one group of operators where the layers can share them.

    Whoever hooks a layer (DeepSpeed's ZeRO-3 gathers its parameters so) has it called by itself.
    """
    if not can_share(layers):
        return [layer(x) for layer in layers]
    first: Any = layers[0]
    return lost_group(x, [layer.weights for layer in layers], first.activation, kernels=first.kernels)  # pyright: ignore


def can_share(layers: Sequence[nn.Module]) -> bool:
    """Whether the layers are LOST layers of one kind that nobody has hooked."""
    kinds = set()
    for layer in layers:
        if type(layer) is not LostLinear or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            return False
        if not layer.uses_operators:
            return False
        kinds.add((layer.kernels, layer.activation, layer.gamma_mode, layer.bias is None))
    return len(kinds) == 1
