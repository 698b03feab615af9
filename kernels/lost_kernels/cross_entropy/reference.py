"""Cross-entropy of a language model's head in plain PyTorch: the definition that the chunked one must agree with.

Shapes: M tokens, D hidden_size, V vocab_size.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORED_TARGET = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden W^T)[target], in float32 or better, [].

    Args:
        hidden: what the head reads, [M, D].
        weight: W, [V, D].
        targets: int64 [M]; -100: the token has no loss.

    Numerics: logits are rounded to the dtype of the product, everything after it is in float32 (float64: float64).
    """
    return token_cross_entropy(hidden, weight, targets).sum()


def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden W^T)[target] of every token, [M]; 0 where the target is -100."""
    logits = F.linear(hidden, weight)
    logits = logits.to(logits.dtype if logits.itemsize > 4 else logits.float().dtype)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="none")
