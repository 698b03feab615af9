"""Sum of token losses; dividing by the global count of the step is the caller's."""

import torch
from torch.nn import functional as F

IGNORED_LABEL = -100


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] moved one place to the left, so that position t holds what logits t predict."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def count_label_tokens(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens of [B, T] labels are predicted: the first of each row and the padding are not."""
    return (labels[:, 1:] != IGNORED_LABEL).sum()


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of predicting labels [B, T] from logits [B, T, V], in float32, [].

    Labels follow Hugging Face: not shifted yet, -100 where there is no loss.
    """
    targets = next_token_labels(labels).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")
