"""Floating-point operations of the matrix products, per token of training."""

from dataclasses import dataclass

from lost.accounting.costs import linear_costs, sum_of
from lost.config.model import ModelConfig, ParameterizationConfig

# A multiply-add is two operations; the backward pass has one product for the input and one for the weight.
FLOPS_PER_MAC = 2
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of one pass, by where they are spent."""

    linears: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.linears + self.attention + self.head


def forward_flops(model: ModelConfig, parameterization: ParameterizationConfig, seq_len: int) -> Flops:
    """FLOPs per token of a forward pass, means over a row of `seq_len` tokens.

    Attention counts the products that a causal model needs: token t meets t keys, (seq_len + 1) / 2 on average.
    (The convention of PaLM's MFU counts the whole square, which an implementation need not compute.)
    Norms, activations, softmax, rotary embedding and the look-up of the embedding are left out.
    """
    *blocks, head = linear_costs(model, parameterization)
    mean_context = (seq_len + 1) / 2
    # Scores, then the weighted sum of the values.
    attention_macs = model.num_hidden_layers * 2 * model.hidden_size * mean_context
    return Flops(
        linears=FLOPS_PER_MAC * sum_of(blocks, "forward_macs"),
        attention=FLOPS_PER_MAC * attention_macs,
        head=FLOPS_PER_MAC * head.forward_macs,
    )


def flops_per_token(model: ModelConfig, parameterization: ParameterizationConfig, seq_len: int) -> float:
    """FLOPs per token of one training step, forward and backward, head included, without recomputed activations."""
    return FORWARD_AND_BACKWARD * forward_flops(model, parameterization, seq_len).total
