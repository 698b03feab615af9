"""Every linear layer of a LLaMA by its qualified name, with its shape."""

from dataclasses import dataclass

from lost.config.model import ModelConfig

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"


@dataclass(frozen=True)
class LinearShape:
    """One bias-free linear layer: its name in the causal language model and its widths."""

    name: str
    in_features: int
    out_features: int

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features


def block_linears(model: ModelConfig, index: int) -> list[LinearShape]:
    """The seven projections of block `index`, in the order of the forward pass."""
    hidden, intermediate = model.hidden_size, model.intermediate_size
    key_value = model.num_key_value_heads * (hidden // model.num_attention_heads)
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, key_value),
        "self_attn.v_proj": (hidden, key_value),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    return [LinearShape(f"model.layers.{index}.{name}", *shape) for name, shape in widths.items()]


def head_linear(model: ModelConfig) -> LinearShape:
    return LinearShape(HEAD, model.hidden_size, model.vocab_size)


def linear_shapes(model: ModelConfig) -> list[LinearShape]:
    """Every nn.Linear of the dense causal language model, lm_head last."""
    blocks = [linear for index in range(model.num_hidden_layers) for linear in block_linears(model, index)]
    return [*blocks, head_linear(model)]
