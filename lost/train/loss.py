"""Sum of token losses; dividing by the global count of the step is the caller's."""

import torch
from torch.nn import functional as F

from lost.utils.labels import IGNORED_LABEL, next_token_labels


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of predicting labels [B, T] from logits [B, T, V], in float32, [].

    Labels follow Hugging Face: not shifted yet, -100 where there is no loss.
    """
    targets = next_token_labels(labels).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")
