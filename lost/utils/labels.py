"""Labels as Hugging Face has them: not shifted, -100 where there is no loss. B rows, T seq_len."""

import torch
from torch.nn import functional as F

IGNORED_LABEL = -100


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] moved one place to the left, so that position t holds what logits t predict."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def count_label_tokens(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens of [B, T] labels are predicted: the first of each row and the padding are not."""
    return (labels[:, 1:] != IGNORED_LABEL).sum()
