"""Head and cross-entropy a chunk of tokens at a time, so that the logits never exist as a whole.

Shapes: M tokens, C tokens of a chunk, D hidden_size, V vocab_size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lost_kernels.cross_entropy.reference import IGNORED_TARGET


def losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, *, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token losses and the gradients of their sum; those that are not needed are None.

    Args:
        hidden: [M, D], in the dtype of the products.
        weight: [V, D]; cast to the dtype of `hidden` for the products.
        targets: int64 [M], -100: no loss.
        chunk_tokens: C.

    Returns:
        (losses [M] in float32 or better, d hidden [M, D] in its dtype, d weight [V, D] in the weight's dtype).

    Numerics: the gradient of the weight is summed over the chunks in float32 or better and rounded once.
    """
    used = weight.to(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    d_hidden = torch.empty_like(hidden) if needs_hidden else None
    d_weight = None
    # One memory for all chunks: the pages of a new one are zeroed by the system, 4 % of a step of llama_60m on a CPU.
    all_logits = hidden.new_empty(min(chunk_tokens, hidden.shape[0]), weight.shape[0])
    all_log_p = torch.empty_like(all_logits) if hidden.dtype is wide else None
    for rows in _chunks(hidden.shape[0], chunk_tokens):
        is_ignored = targets[rows] == IGNORED_TARGET
        # Any column will do for a token without loss.
        columns = targets[rows].masked_fill(is_ignored, 0)[:, None]
        logits = torch.mm(hidden[rows], used.T, out=all_logits[: len(columns)])
        out = None if all_log_p is None else all_log_p[: len(columns)]
        log_p = torch.log_softmax(logits, dim=1, dtype=wide, out=out)
        losses[rows] = -log_p.gather(1, columns)[:, 0].masked_fill(is_ignored, 0)
        if not needs_hidden and not needs_weight:
            continue
        d_logits = log_p.exp_().scatter_add_(1, columns, log_p.new_full((), -1).expand_as(columns))
        d_logits = d_logits if logits.dtype is wide else logits.copy_(d_logits)
        del log_p
        # A token without loss is left out of the two products, which is less to write than its row of d_logits.
        if d_hidden is not None:
            d_hidden[rows] = (d_logits @ used).masked_fill_(is_ignored[:, None], 0)
        if needs_weight:
            d_weight = _plus_product(d_weight, d_logits.T, hidden[rows].masked_fill(is_ignored[:, None], 0), wide)
    if needs_weight and d_weight is None:
        d_weight = hidden.new_zeros(weight.shape, dtype=wide)
    return losses, d_hidden, None if d_weight is None else d_weight.to(weight.dtype)


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, in the memory of `total`; None is zero, which nobody writes first."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if dtype is left.dtype else total.add_(left @ right)
