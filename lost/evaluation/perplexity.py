"""Validation loss and perplexity: exact over every token, and by the formula that the papers print.

Shape letters: n rows of a micro-batch, T seq_len, V vocab.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from lost_kernels.cross_entropy import token_cross_entropy
from torch import Tensor, nn

from lost.model.head import head_gives, plain_head
from lost.utils.errors import DataError
from lost.utils.labels import IGNORED_LABEL, next_token_labels

# The evaluators of the papers this project compares with (GaLore, SLTrain, CoLA share this code).
LINEAGE_BATCH_ROWS = 256
LINEAGE_TARGET_TOKENS = 10_000_000

# Logits are turned to float32 and reduced this many values at a time: 64 MiB, whatever the vocabulary.
CHUNK_VALUES = 2**24


class Rows(Protocol):
    """Token rows that can be read by index; labels follow Hugging Face's convention (-100: no loss)."""

    def __len__(self) -> int: ...

    def read(self, indices: list[int], /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class PerplexityResult:
    """Validation loss of one set.

    Attributes:
        loss: sum of token losses over the number of predicted tokens, in nats a token.
        perplexity: exp(loss).
        perplexity_lineage: the papers' formula, which reads too low; only for comparison with their tables.
        num_tokens: predicted tokens, padding and the first token of every row excluded.
        num_rows: rows read.
        lineage_note: on how much the papers' formula ran here and by what it divided.
    """

    loss: float
    perplexity: float
    perplexity_lineage: float
    num_tokens: int
    num_rows: int
    lineage_note: str


@dataclass(frozen=True)
class RowSums:
    """What every formula needs to know of each row, in row order, on the CPU.

    Attributes:
        loss: sum of the row's token losses, float64 [rows].
        predicted: tokens of the row that have a loss, float64 [rows].
        labelled: labels of the row before the shift, float64 [rows]: what the papers count towards their 10 M.
    """

    loss: Tensor
    predicted: Tensor
    labelled: Tensor


def perplexity(model: nn.Module, rows: Rows, **options: Any) -> PerplexityResult:
    """exp(sum of token losses / number of predicted tokens), over whole rows in their order; options of `row_sums`.

    Raises:
        DataError: the rows hold no token to predict.
    """
    return summarise(row_sums(model, rows, **options))


def row_sums(
    model: nn.Module,
    rows: Rows,
    *,
    micro_batch_size: int,
    device: torch.device | str,
    max_tokens: int = 0,
    autocast: torch.dtype | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RowSums:
    """Losses and counts of every row, in row order.

    Args:
        model: returns an output with `.logits` [n, T, V] for the tensors of a batch.
        rows: the validation set.
        micro_batch_size: rows of one forward.
        device: where the model is.
        max_tokens: rows are taken until they hold this many predicted tokens; 0 takes all of them.
        autocast: dtype of matrix products under autocast; None runs the model as it is.
        process_index: this process, which reads every num_processes-th micro-batch.
        num_processes: processes that call this together; each runs the same number of forwards.
        gather: joins a tensor of every process along dimension 0 in process order; needed by several processes.
        progress: called with (rows done, rows of all processes) after each forward.
    Returns:
        The same numbers on every process.
    Numerics: cross-entropy in float32 from the model's logits; sums of a row and of all rows in float64, in row
        order. Neither micro_batch_size nor num_processes changes the result but for rounding inside the model.
    """
    assert num_processes == 1 or gather is not None, "several processes need a gather function"
    num_rows = rows_to_read(rows, max_tokens, micro_batch_size)
    batches = [range(start, min(start + micro_batch_size, num_rows)) for start in range(0, num_rows, micro_batch_size)]
    num_rounds = math.ceil(len(batches) / num_processes)
    # Columns: loss, predicted, labelled. One slot a row of every micro-batch, so that all processes gather one shape.
    table = torch.zeros(num_rounds, micro_batch_size, 3, dtype=torch.float64)
    with evaluation_mode(model), autocast_to(device, autocast):
        for turn in range(num_rounds):
            mine = turn * num_processes + process_index
            # Wrapped models communicate in their forward: a process without a micro-batch of its own repeats the
            # last one and leaves it uncounted.
            batch = rows.read(list(batches[min(mine, len(batches) - 1)]))
            sums = batch_sums(model, batch, device)
            if mine < len(batches):
                table[turn, : len(sums)] = sums
            if progress is not None:
                progress(min((turn + 1) * num_processes * micro_batch_size, num_rows), num_rows)
    return in_row_order(table, batches, num_processes, gather, device)


def rows_to_read(rows: Rows, max_tokens: int, rows_at_a_time: int) -> int:
    """How many rows, from the first, hold max_tokens predicted tokens (0: all rows). The same on every process."""
    if not max_tokens:
        return len(rows)
    num_tokens = 0
    for start in range(0, len(rows), rows_at_a_time):
        labels = rows.read(list(range(start, min(start + rows_at_a_time, len(rows)))))["labels"]
        for offset, count in enumerate((labels[:, 1:] != IGNORED_LABEL).sum(1).tolist()):
            num_tokens += count
            if num_tokens >= max_tokens:
                return start + offset + 1
    return len(rows)


def batch_sums(model: nn.Module, batch: dict[str, Tensor], device: torch.device | str) -> Tensor:
    """Loss, predicted tokens and labelled tokens of every row of one forward, float64 [n, 3] on the CPU."""
    inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    # Position t predicts label t + 1; the last position predicts nothing.
    targets = next_token_labels(labels)
    losses = model_token_losses(model, inputs, targets.to(device)).cpu().double()
    columns = [losses.sum(1), (targets != IGNORED_LABEL).sum(1), (labels != IGNORED_LABEL).sum(1)]
    return torch.stack([column.double() for column in columns], dim=1)


def model_token_losses(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of every position in float32, [n, T]; a LLaMA's logits never exist as a whole."""
    head = plain_head(model)
    if head is None:
        return token_losses(model(**inputs, use_cache=False).logits, targets)

    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten()).view(targets.shape)

    with head_gives(head, losses):
        return model(**inputs, use_cache=False).logits


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position in float32, [n, T]; 0 where the target is -100. Bounded extra memory."""
    logits_MV, targets_M = logits.flatten(0, 1), targets.flatten()
    chunk = max(1, CHUNK_VALUES // logits_MV.shape[1])
    pieces = [
        F.cross_entropy(piece.float(), target, ignore_index=IGNORED_LABEL, reduction="none")
        for piece, target in zip(logits_MV.split(chunk), targets_M.split(chunk), strict=True)
    ]
    return torch.cat(pieces).view(targets.shape)


def in_row_order(
    table: Tensor,
    batches: list[range],
    num_processes: int,
    gather: Callable[[Tensor], Tensor] | None,
    device: torch.device | str,
) -> RowSums:
    """The sums of all processes, sorted back into row order.

    Args:
        table: this process's sums, float64 [rounds, micro_batch_size, 3].
    """
    if num_processes > 1 and gather is not None:
        gathered = gather(table.to(device)).cpu()
        # [process, round, ...] to the order in which micro-batches were dealt out: round by round.
        table = gathered.view(num_processes, *table.shape).transpose(0, 1).flatten(0, 1)
    filled = [table[index, : len(batch)] for index, batch in enumerate(batches)]
    loss, predicted, labelled = torch.cat(filled or [table.new_zeros(0, 3)]).unbind(1)
    return RowSums(loss, predicted, labelled)


def summarise(sums: RowSums) -> PerplexityResult:
    """Both formulas from the sums of the rows.

    Raises:
        DataError: no row has a token to predict.
    """
    num_tokens = int(sums.predicted.sum())
    if not num_tokens:
        raise DataError(
            f"the validation set has {len(sums.loss)} rows and no token to predict: give it more text, or raise"
            " data.validation_fraction"
        )
    loss = float(sums.loss.sum()) / num_tokens
    lineage, note = lineage_loss(sums)
    return PerplexityResult(loss, safe_exp(loss), safe_exp(lineage), num_tokens, len(sums.loss), note)


def lineage_loss(sums: RowSums) -> tuple[float, str]:
    """The loss as the papers' evaluators print it, and a note on what it ran over.

    Batches of 256 rows are read until more than 10 M labelled tokens are counted; the mean losses of the n batches
    are added and divided by n + 1, because the counter starts at 1.
    Source: evaluate_model in torchrun_main.py of GaLore, from which the others copied; differs in that a last batch
    of fewer rows counts as a batch (their data never ends).
    """
    total, counted, num_batches = 0.0, 0.0, 0
    for loss, predicted, labelled in zip(
        sums.loss.split(LINEAGE_BATCH_ROWS),
        sums.predicted.split(LINEAGE_BATCH_ROWS),
        sums.labelled.split(LINEAGE_BATCH_ROWS),
        strict=True,
    ):
        if counted > LINEAGE_TARGET_TOKENS:
            break
        num_batches += 1
        if predicted.sum() > 0:
            total += float(loss.sum() / predicted.sum())
        counted += float(labelled.sum())
    return total / (num_batches + 1), lineage_note(num_batches, int(counted))


def lineage_note(num_batches: int, num_tokens: int) -> str:
    """What the papers' formula ran over, and how far that is from what they ran it over."""
    plural = "" if num_batches == 1 else "es"
    note = (
        f"the papers' formula: mean losses of {num_batches} batch{plural} of up to {LINEAGE_BATCH_ROWS} rows, their sum"
        f" divided by {num_batches + 1}"
    )
    if num_tokens < LINEAGE_TARGET_TOKENS:
        note += (
            f"; {num_tokens:,} tokens where the papers use {LINEAGE_TARGET_TOKENS:,}, so the loss reads"
            f" {100 / (num_batches + 1):.1f} % too low: not comparable with their tables"
        )
    return note


def safe_exp(loss: float) -> float:
    """exp(loss), or infinity where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the training flag is what it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def autocast_to(device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """Autocast on the device, or nothing where dtype is None."""
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)
