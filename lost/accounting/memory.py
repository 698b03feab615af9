"""Bytes of a training step on one device, from the config alone.

State is exact. Activations are what transformers' LLaMA and our layer keep for the backward pass as eager PyTorch runs
them, with an attention that does not keep its scores (flash or memory-efficient). Left out: the allocator's
fragmentation, the libraries' workspaces and what torch.compile fuses away.
"""

from dataclasses import dataclass
from typing import Literal

from lost.accounting.costs import LinearCost, linear_costs, sum_of
from lost.accounting.parameters import count_parameters
from lost.config.schema import ModelConfig, ParameterizationConfig

GIB = 2**30
FLOAT32_BYTES = 4
INDEX_BYTES = 8

Precision = Literal["fp32", "bf16", "pure_bf16"]
Recompute = Literal["none", "p0", "block"]


@dataclass(frozen=True)
class Widths:
    """Bytes of a number: weights (and gradients and optimizer states), and what products are computed in."""

    weight: int
    compute: int

    @property
    def is_autocast(self) -> bool:
        return self.weight != self.compute


WIDTHS: dict[Precision, Widths] = {"fp32": Widths(4, 4), "bf16": Widths(4, 2), "pure_bf16": Widths(2, 2)}


@dataclass(frozen=True)
class State:
    """Bytes that live through the whole run."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a training step.

    Args:
        state: weights, gradients, the two moments of Adam, index buffers.
        activations: kept by the blocks and the final norm for the backward pass.
        working: everything else at the worst moment of the step: logits and their gradients, copies of weights that
            autocast keeps, a weight's gradient before it is added, a block that is being recomputed.
        worst_moment: the phase of the step that `working` belongs to.
    """

    state: State
    activations: int
    working: int
    worst_moment: str

    @property
    def total(self) -> int:
        return self.state.total + self.activations + self.working


def state_bytes(model: ModelConfig, parameterization: ParameterizationConfig, precision: Precision) -> State:
    """Weights, gradients and the two moments of Adam, all in the dtype of the weights; int64 indices."""
    weights = count_parameters(model, parameterization) * WIDTHS[precision].weight
    num_index = sum(cost.num_index for cost in linear_costs(model, parameterization))
    return State(weights, gradients=weights, optimizer=2 * weights, buffers=num_index * INDEX_BYTES)


def block_activation_bytes(
    model: ModelConfig,
    costs: list[LinearCost],
    precision: Precision,
    recompute: Recompute,  # noqa: ARG001
) -> int:
    """Bytes per token that one block keeps between its forward and its backward pass.

    Args:
        model: the architecture.
        costs: of the block's seven linear layers.
        precision: of the run.
        recompute: block counts as none: a block that is made again keeps everything until its backward pass.
    """
    width = WIDTHS[precision]
    key_value = model.num_key_value_heads * (model.hidden_size // model.num_attention_heads)
    # The float32 input of a norm, what it multiplies with its weight, and the root of the mean square.
    norms = 2 * (model.hidden_size * (FLOAT32_BYTES + width.weight) + FLOAT32_BYTES)
    # The two norms' outputs are shared by the layers that read them, but autocast makes copies for each of the five.
    readers = [cost for cost in costs if not cost.linear.name.endswith(("o_proj", "down_proj"))]
    num_inputs = sum_of(readers, "num_input_casts") if width.is_autocast else 2
    inputs = num_inputs * model.hidden_size * width.compute
    # Rotated queries and keys, values, the output, and the log of the softmax's sum.
    attention = 2 * (model.hidden_size + key_value) * width.compute + model.num_attention_heads * FLOAT32_BYTES
    # gate, silu(gate), up and their product.
    mlp = 4 * model.intermediate_size * width.compute
    saved_values = sum_of(costs, "saved_values")
    layers = saved_values * width.compute + sum_of(costs, "saved_float32") * FLOAT32_BYTES
    return norms + inputs + attention + mlp + layers


def activation_bytes_per_token(
    model: ModelConfig, parameterization: ParameterizationConfig, precision: Precision, recompute: Recompute
) -> int:
    """Bytes per token that the whole model keeps for its backward pass, the loss left out."""
    width = WIDTHS[precision]
    if recompute == "block":
        blocks = model.num_hidden_layers * model.hidden_size * width.weight
    else:
        per_block = _by_block(model, parameterization)
        blocks = sum(block_activation_bytes(model, costs, precision, recompute) for costs in per_block)
    final_norm = model.hidden_size * (FLOAT32_BYTES + width.weight + width.compute) + FLOAT32_BYTES
    return blocks + final_norm


def memory_per_device(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    *,
    micro_batch_size: int,
    seq_len: int,
    precision: Precision,
    recompute: Recompute,
) -> Memory:
    """Peak of a training step with the whole model and its optimizer on the device (single or ddp)."""
    tokens = micro_batch_size * seq_len
    args = (model, parameterization, tokens, precision, recompute)
    phases = {
        "end of the forward pass": _forward_bytes(model, parameterization, tokens, precision),
        "loss, forward": _loss_forward_bytes(*args),
        "loss, backward": _loss_backward_bytes(*args),
        "lm_head, backward": _head_backward_bytes(*args),
        "block, backward": _block_backward_bytes(*args),
    }
    worst = max(phases, key=lambda phase: phases[phase])
    return Memory(
        state=state_bytes(model, parameterization, precision),
        activations=tokens * activation_bytes_per_token(model, parameterization, precision, recompute),
        working=phases[worst],
        worst_moment=worst,
    )


def _forward_bytes(
    model: ModelConfig, parameterization: ParameterizationConfig, tokens: int, precision: Precision
) -> int:
    """Logits, while autocast still holds its copy of every weight."""
    casts = _cast_bytes(linear_costs(model, parameterization), precision)
    return tokens * model.vocab_size * WIDTHS[precision].compute + casts


def _loss_forward_bytes(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    tokens: int,
    precision: Precision,
    recompute: Recompute,
) -> int:
    """Logits, their float32 copy and log-softmax."""
    width = WIDTHS[precision]
    copy = 0 if width.compute == FLOAT32_BYTES else FLOAT32_BYTES
    per_token = model.vocab_size * (width.compute + copy + FLOAT32_BYTES)
    return tokens * per_token + _kept_cast_bytes(model, parameterization, precision, recompute)


def _loss_backward_bytes(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    tokens: int,
    precision: Precision,
    recompute: Recompute,
) -> int:
    """The float32 log-softmax, its gradient and that of the logits."""
    per_token = 3 * model.vocab_size * FLOAT32_BYTES
    return tokens * per_token + _kept_cast_bytes(model, parameterization, precision, recompute)


def _head_backward_bytes(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    tokens: int,
    precision: Precision,
    recompute: Recompute,
) -> int:
    """The gradient of the logits and that of lm_head's weight before it is added to the sum over micro-batches."""
    width = WIDTHS[precision]
    logits = tokens * model.vocab_size * width.compute
    num_weights = model.vocab_size * model.hidden_size
    kept = _kept_cast_bytes(model, parameterization, precision, recompute)
    # Autocast's gradient is widened once the products are done, and the cast weight and the logits' gradient freed.
    return kept + max(logits + num_weights * width.compute, num_weights * width.weight)


def _block_backward_bytes(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    tokens: int,
    precision: Precision,
    recompute: Recompute,
) -> int:
    """Gradients inside one block, its largest weight's before it is added, and the block if it is recomputed."""
    width = WIDTHS[precision]
    largest = max(cost.num_parameters for cost in linear_costs(model, parameterization)[:-1]) * width.weight
    if recompute != "block":
        casts = _cast_bytes(linear_costs(model, parameterization)[:-1], precision)
        # What lives together beside the block's activations, from the order of autograd's operations.
        gradients = (3 * model.intermediate_size + 2 * model.hidden_size) * width.compute
        return largest + casts + tokens * gradients
    # The block's input is kept anyway; the first gradient is that of the MLP's product, when all is recomputed.
    per_token = model.intermediate_size * width.compute - model.hidden_size * width.weight
    blocks = _by_block(model, parameterization)
    recomputed = max(
        tokens * (per_token + block_activation_bytes(model, costs, precision, recompute))
        + _cast_bytes(costs, precision)
        for costs in blocks
    )
    return largest + recomputed


def _cast_bytes(costs: list[LinearCost], precision: Precision) -> int:
    """Autocast's copies of the weights of these layers."""
    width = WIDTHS[precision]
    return sum(cost.num_cast_weights for cost in costs) * width.compute if width.is_autocast else 0


def _kept_cast_bytes(
    model: ModelConfig, parameterization: ParameterizationConfig, precision: Precision, recompute: Recompute
) -> int:
    """Those that the backward pass needs: all, or lm_head's alone where the blocks cast again."""
    costs = linear_costs(model, parameterization)
    return _cast_bytes(costs[-1:] if recompute == "block" else costs, precision)


def _by_block(model: ModelConfig, parameterization: ParameterizationConfig) -> list[list[LinearCost]]:
    *costs, _ = linear_costs(model, parameterization)
    per_block = len(costs) // model.num_hidden_layers
    return [costs[start : start + per_block] for start in range(0, len(costs), per_block)]
