"""Bytes of a training step on one device, from the config alone.

State is exact. Activations are what transformers' LLaMA and our layer keep for the backward pass as eager PyTorch runs
them, with an attention that does not keep its scores (flash or memory-efficient). Left out: the allocator's
fragmentation, the libraries' workspaces and what torch.compile fuses away.
"""

from dataclasses import dataclass
from typing import Literal

from lost.accounting.costs import LinearCost, linear_costs, sum_of
from lost.accounting.parameters import count_parameters
from lost.config.model import ModelConfig, ParameterizationConfig

GIB = 2**30
FLOAT32_BYTES = 4
INDEX_BYTES = 8

Precision = Literal["fp32", "bf16", "pure_bf16"]
Recompute = Literal["none", "p0", "p1", "p2", "p3", "block"]
# Levels of which a block keeps single tensors and makes the others again (`lost.train.recompute`).
LEVELS = ("p0", "p1", "p2", "p3")
# Those of them at which only norms and the MLP's product make values again (`lost.train.remake`).
REMADE_LEVELS = ("p0", "p1")
# As in lost_kernels.cross_entropy on a GPU, which needs torch and is not imported here.
LOSS_CHUNK_TOKENS = 4096


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
    model: ModelConfig, costs: list[LinearCost], precision: Precision, recompute: Recompute
) -> int:
    """Bytes per token that one block keeps between its forward and its backward pass.

    Args:
        model: the architecture.
        costs: of the block's seven linear layers.
        precision: of the run.
        recompute: block counts as none: a block that is made again keeps everything until its backward pass.
    """
    if recompute in LEVELS:
        return _level_bytes(model, costs, precision, recompute)
    width = WIDTHS[precision]
    # The float32 input of a norm, what it multiplies with its weight, and the root of the mean square.
    norms = 2 * (model.hidden_size * (FLOAT32_BYTES + width.weight) + FLOAT32_BYTES)
    # The two norms' outputs are shared by the layers that read them, but autocast makes copies for each of the five.
    readers = [cost for cost in costs if not cost.linear.name.endswith(("o_proj", "down_proj"))]
    num_inputs = sum_of(readers, "num_input_casts") if width.is_autocast else 2
    inputs = num_inputs * model.hidden_size * width.compute
    # gate, silu(gate), up and their product.
    mlp = 4 * model.intermediate_size * width.compute
    return norms + inputs + mlp + _attention_and_layer_bytes(model, costs, width)


def _attention_and_layer_bytes(model: ModelConfig, costs: list[LinearCost], width: Widths) -> int:
    key_value = model.num_key_value_heads * (model.hidden_size // model.num_attention_heads)
    # Rotated queries and keys, values, the output, and the log of the softmax's sum.
    attention = 2 * (model.hidden_size + key_value) * width.compute + model.num_attention_heads * FLOAT32_BYTES
    return attention + sum_of(costs, "saved_values") * width.compute + sum_of(costs, "saved_float32") * FLOAT32_BYTES


def _level_bytes(model: ModelConfig, costs: list[LinearCost], precision: Precision, recompute: Recompute) -> int:
    """`block_activation_bytes` of a level: what lost.train.recompute names, and the block's input."""
    width = WIDTHS[precision]
    if recompute in REMADE_LEVELS:
        # The inputs of the two norms, gate and up.
        kept = 2 * model.hidden_size * width.weight + 2 * model.intermediate_size * width.compute
        # What the layers behind norms and product read.
        read = (2 * model.hidden_size + model.intermediate_size) * width.compute if recompute == "p0" else 0
        return kept + read + _attention_and_layer_bytes(model, costs, width)
    # The input is in the dtype of the residuals, o_proj's output and what the down factors give in that of products.
    kept = model.hidden_size * (width.weight + width.compute) + sum_of(costs, "low_rank_values") * width.compute
    if recompute == "p3":
        return kept
    key_value = model.num_key_value_heads * (model.hidden_size // model.num_attention_heads)
    return kept + 2 * (model.hidden_size + key_value) * width.compute + model.num_attention_heads * FLOAT32_BYTES


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
    phases = {
        "loss": _loss_bytes(model, parameterization, tokens, precision),
        "lm_head, backward": _head_backward_bytes(model, tokens, precision),
        "block, backward": _block_backward_bytes(model, parameterization, tokens, precision, recompute),
    }
    worst = max(phases, key=lambda phase: phases[phase])
    return Memory(
        state=state_bytes(model, parameterization, precision),
        activations=tokens * activation_bytes_per_token(model, parameterization, precision, recompute),
        working=phases[worst],
        worst_moment=worst,
    )


def _loss_bytes(model: ModelConfig, parameterization: ParameterizationConfig, tokens: int, precision: Precision) -> int:
    """Logits of one chunk and the gradients of head and hidden states, while autocast holds copies of all weights."""
    width = WIDTHS[precision]
    num_weights = model.vocab_size * model.hidden_size
    chunk_tokens = min(tokens, LOSS_CHUNK_TOKENS)
    logits = chunk_tokens * model.vocab_size * width.compute
    softmax = chunk_tokens * model.vocab_size * FLOAT32_BYTES
    # In a lower precision the chunk's gradient of the weight is a tensor of its own before it is added.
    product = num_weights * width.compute if width.compute < FLOAT32_BYTES else 0
    d_weight, d_hidden = num_weights * FLOAT32_BYTES, tokens * model.hidden_size * width.compute
    # That of the only chunk is the gradient itself: nothing of it is there yet while the softmax is.
    is_first_alone = product > 0 and tokens <= LOSS_CHUNK_TOKENS
    softmax_or_product = max(softmax if is_first_alone else softmax + d_weight, product + d_weight)
    return logits + softmax_or_product + d_hidden + _cast_bytes(linear_costs(model, parameterization), precision)


def _head_backward_bytes(model: ModelConfig, tokens: int, precision: Precision) -> int:
    """The two gradients that the loss has made, and their products with its own."""
    width = WIDTHS[precision]
    return 2 * model.hidden_size * (model.vocab_size * width.weight + tokens * width.compute)


def _block_backward_bytes(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    tokens: int,
    precision: Precision,
    recompute: Recompute,
) -> int:
    """Gradients inside one block, its largest weight's before it is added, and what of the block is made again."""
    width = WIDTHS[precision]
    largest = max(cost.num_parameters for cost in linear_costs(model, parameterization)[:-1]) * width.weight
    if recompute == "none" or recompute in REMADE_LEVELS:
        casts = _cast_bytes(linear_costs(model, parameterization)[:-1], precision)
        # What lives together beside the block's activations, from the order of autograd's operations. Of a level,
        # the remade silu(gate) too.
        num_products = 3 if recompute == "none" else 4
        gradients = (num_products * model.intermediate_size + 2 * model.hidden_size) * width.compute
        return largest + casts + tokens * gradients
    # The first gradient is that of the MLP's product, when all has been made again beside what was kept.
    per_token = model.intermediate_size * width.compute
    return largest + max(
        tokens * (per_token + _made_again_bytes(model, costs, precision, recompute)) + _cast_bytes(costs, precision)
        for costs in _by_block(model, parameterization)
    )


def _made_again_bytes(model: ModelConfig, costs: list[LinearCost], precision: Precision, recompute: Recompute) -> int:
    """Bytes per token of one block that exist during its backward pass only."""
    whole = block_activation_bytes(model, costs, precision, "none")
    if recompute == "block":
        return whole - model.hidden_size * WIDTHS[precision].weight
    return whole - _level_bytes(model, costs, precision, recompute)


def _cast_bytes(costs: list[LinearCost], precision: Precision) -> int:
    """Autocast's copies of the weights of these layers."""
    width = WIDTHS[precision]
    return sum(cost.num_cast_weights for cost in costs) * width.compute if width.is_autocast else 0


def _by_block(model: ModelConfig, parameterization: ParameterizationConfig) -> list[list[LinearCost]]:
    *costs, _ = linear_costs(model, parameterization)
    per_block = len(costs) // model.num_hidden_layers
    return [costs[start : start + per_block] for start in range(0, len(costs), per_block)]
