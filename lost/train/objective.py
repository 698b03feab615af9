"""What a model is trained for: its loss, and what a step counts. B rows, T tokens, C classes."""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from lost.train.loss import model_loss_sum
from lost.utils.labels import count_label_tokens

Batch = dict[str, torch.Tensor]


class Objective(Protocol):
    """The loss of a step is the sum of `loss_sum` over that of `num_labels`, over all micro-batches and processes."""

    def num_labels(self, batch: Batch) -> int:
        """Labels that have a loss."""
        ...

    def num_tokens(self, batch: Batch) -> int:
        """Tokens that the step has trained on, for tokens_seen and tokens_per_second."""
        ...

    def loss_sum(self, wrapped: nn.Module, model: nn.Module, inputs: Batch, labels: torch.Tensor) -> torch.Tensor:
        """Sum of the losses of the labels, float32 [].

        Args:
            wrapped: what the forward of training goes through; gives an output with `.logits`.
            model: what it wraps.
            inputs: arguments of the forward.
            labels: of the micro-batch.
        """
        ...


class NextToken:
    """Each token from those before it; labels [B, T] as Hugging Face has them (not shifted, -100: no loss)."""

    def num_labels(self, batch: Batch) -> int:
        return int(count_label_tokens(batch["labels"]))

    def num_tokens(self, batch: Batch) -> int:
        return self.num_labels(batch)

    def loss_sum(self, wrapped: nn.Module, model: nn.Module, inputs: Batch, labels: torch.Tensor) -> torch.Tensor:
        return model_loss_sum(wrapped, model, inputs, labels)


class Classification:
    """One class a row: cross-entropy of logits [B, C] against labels int64 [B]."""

    def num_labels(self, batch: Batch) -> int:
        return len(batch["labels"])

    def num_tokens(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum())

    def loss_sum(self, wrapped: nn.Module, model: nn.Module, inputs: Batch, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return self.loss_of(wrapped(**inputs, use_cache=False).logits, labels)

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="sum")


class Regression(Classification):
    """One number a row: squared error of logits [B, 1] against labels float32 [B]."""

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(logits.float().squeeze(1), labels, reduction="sum")
