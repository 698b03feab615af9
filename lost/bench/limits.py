"""The least time that a machine needs for a layer, a block or a step: every kernel at its FLOP/s or its bandwidth.

A product reads its operands once and writes its result once; a pass between products reads and writes what it must.
Launches are free and nothing stays in a cache from one kernel to the next: where a cache holds the operands, as for
small layers on a CPU, a time may be below it. What a level of recomputation repeats is not counted.

Shapes: M tokens, K in_features, N out_features, R lost_rank, S kept channels, D hidden_size, F intermediate_size.
"""

from collections.abc import Iterable
from typing import NamedTuple

from lost.accounting import count_parameters
from lost.accounting.costs import FIRST_READER
from lost.accounting.shapes import block_linears
from lost.accounting.targets import lost_shapes
from lost.config.model import LostConfig, ModelConfig, ParameterizationConfig

# Tokens of the chunked loss whose logits exist together.
CHUNK_TOKENS = 4096
# AdamW reads weight, gradient and two moments and writes all but the gradient.
ADAMW_PASSES = 7


class Work(NamedTuple):
    """One kernel."""

    flops: float
    num_bytes: float


class Machine(NamedTuple):
    """What one large matrix product and one large copy reached."""

    flops_per_second: float
    bytes_per_second: float

    def least_seconds(self, works: Iterable[Work]) -> float:
        return sum(max(work.flops / self.flops_per_second, work.num_bytes / self.bytes_per_second) for work in works)


class Widths(NamedTuple):
    """A linear layer; num_down columns come out of its first product and num_up go into its second.

    Both 0: one product, dense.
    """

    in_features: int
    out_features: int
    num_down: int = 0
    num_up: int = 0


def lost_widths(in_features: int, out_features: int, rank: int, num_kept: int, selection_axis: str) -> Widths:
    """R columns down; up too, with the S kept ones beside them (rows: S more columns down in their place)."""
    is_rows = selection_axis == "rows"
    return Widths(in_features, out_features, rank + is_rows * num_kept, rank + (not is_rows) * num_kept)


def products(num_tokens: int, inner: int, columns: int, value_bytes: int) -> list[Work]:
    """y = x W^T and its gradients of x and W: x [M, inner], y [M, columns]."""
    sizes = num_tokens * inner, inner * columns, num_tokens * columns
    return [Work(2.0 * num_tokens * inner * columns, value_bytes * sum(sizes))] * 3


def layer_works(widths: Widths, num_tokens: int, value_bytes: int) -> list[Work]:
    """Forward and backward of one layer."""
    return group_works([widths], num_tokens, value_bytes)


def group_works(group: list[Widths], num_tokens: int, value_bytes: int) -> list[Work]:
    """Forward and backward of layers that read one input; factorised ones share the product with their down factors."""
    works = []
    down = sum(widths.num_down for widths in group)
    if down:
        works += products(num_tokens, group[0].in_features, down, value_bytes)
    for widths in group:
        works += products(num_tokens, widths.num_up or widths.in_features, widths.out_features, value_bytes)
        # z is written from h and the kept columns; then, with its gradient read, again and with theirs.
        works.append(Work(0.0, value_bytes * num_tokens * 6 * widths.num_up))
    if not down:
        # Each layer's gradient of x is added to those before it.
        works.append(Work(0.0, value_bytes * num_tokens * 3 * group[0].in_features * (len(group) - 1)))
    return works


def block_widths(model: ModelConfig, form: ParameterizationConfig, factor_rank: int = 0) -> list[list[Widths]]:
    """The linears of the first block, those that read one input together.

    Args:
        factor_rank: every layer has two factors of this rank, whatever `form` is; 0: as `form` says.
    """
    linears = block_linears(model, 0)
    found = {
        linear.name: Widths(linear.in_features, linear.out_features, factor_rank, factor_rank) for linear in linears
    }
    if isinstance(form, LostConfig) and not factor_rank:
        for shape in lost_shapes(form, linears):
            sizes = shape.linear.in_features, shape.linear.out_features, shape.lost_rank, shape.num_kept
            found[shape.linear.name] = lost_widths(*sizes, form.selection_axis)
    groups: dict[str, list[Widths]] = {}
    for name, widths in found.items():
        own = name.rpartition(".")[2]
        groups.setdefault(FIRST_READER.get(own, own), []).append(widths)
    return list(groups.values())


def block_works(
    model: ModelConfig,
    form: ParameterizationConfig,
    num_tokens: int,
    seq_len: int,
    value_bytes: int,
    factor_rank: int = 0,
) -> list[Work]:
    """Forward and backward of one block, causal attention as one kernel each way."""
    works = []
    for group in block_widths(model, form, factor_rank):
        works += group_works(group, num_tokens, value_bytes)
    hidden, intermediate = model.hidden_size, model.intermediate_size
    attention = float(seq_len * hidden * num_tokens)
    values = value_bytes * num_tokens
    return [
        *works,
        # Scores and weighted values of half a square; backward makes the scores again and has four products.
        Work(2 * attention, 4 * values * hidden),
        Work(5 * attention, 8 * values * hidden),
        # Two norms with their residuals and rope, both ways.
        *[Work(0.0, 4 * values * hidden)] * 6,
        Work(0.0, 3 * values * intermediate),
        Work(0.0, 6 * values * intermediate),
    ]


def step_works(
    model: ModelConfig,
    form: ParameterizationConfig,
    num_tokens: int,
    seq_len: int,
    value_bytes: int,
    state_bytes: int,
    factor_rank: int = 0,
) -> list[Work]:
    """All blocks, embedding, head with chunked loss, AdamW.

    Args:
        value_bytes: of an activation.
        state_bytes: of a weight, a gradient and a moment.
    """
    works = block_works(model, form, num_tokens, seq_len, value_bytes, factor_rank) * model.num_hidden_layers
    num_chunks = max(1, round(num_tokens / CHUNK_TOKENS))
    chunk = num_tokens / num_chunks
    for _ in range(num_chunks):
        works += products(int(chunk), model.hidden_size, model.vocab_size, value_bytes)
        works.append(Work(0.0, 3 * value_bytes * chunk * model.vocab_size))
    works.append(Work(0.0, 4 * value_bytes * num_tokens * model.hidden_size))
    num_parameters = count_parameters(model, form)
    if factor_rank:
        blocks = [widths for group in block_widths(model, form, factor_rank) for widths in group]
        dense = sum(widths.in_features * widths.out_features for widths in blocks)
        factors = sum(factor_rank * (widths.in_features + widths.out_features) for widths in blocks)
        num_parameters += model.num_hidden_layers * (factors - dense)
    return [*works, Work(0.0, ADAMW_PASSES * state_bytes * num_parameters)]
