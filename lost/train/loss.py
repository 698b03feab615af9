"""Sum of token losses; dividing by the global count of the step is the caller's."""

import torch
from lost_kernels.cross_entropy import linear_cross_entropy
from torch import nn
from torch.nn import functional as F

from lost.model.head import head_gives, plain_head
from lost.utils.labels import IGNORED_LABEL, next_token_labels


def model_loss_sum(
    wrapped: nn.Module, model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the token losses of one micro-batch, [], without the logits as a whole where the model is a LLaMA.

    Args:
        wrapped: what the forward of training goes through; gives an output with `.logits` [B, T, V].
        model: what it wraps.
        inputs: arguments of the forward.
        labels: [B, T] as Hugging Face has them.
    """
    head = plain_head(model)
    if head is None:
        return token_loss_sum(wrapped(**inputs, use_cache=False).logits, labels)
    targets = next_token_labels(labels).flatten()
    with head_gives(head, lambda hidden, weight: linear_cross_entropy(hidden.flatten(0, 1), weight, targets)):
        return wrapped(**inputs, use_cache=False).logits


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of predicting labels [B, T] from logits [B, T, V], in float32, [].

    Labels follow Hugging Face: not shifted yet, -100 where there is no loss.
    """
    targets = next_token_labels(labels).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")
