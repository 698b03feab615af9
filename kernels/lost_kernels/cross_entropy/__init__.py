"""Cross-entropy of a language model's head: `linear_cross_entropy` is what training calls, `reference` defines it.

Shapes: M tokens, D hidden_size, V vocab_size.
"""

import torch
from torch import Tensor

from lost_kernels.cross_entropy.chunked import losses_and_gradients
from lost_kernels.cross_entropy.op import linear_cross_entropy_op
from lost_kernels.cross_entropy.reference import IGNORED_TARGET
from lost_kernels.cross_entropy.reference import linear_cross_entropy as reference_linear_cross_entropy

__all__ = ["IGNORED_TARGET", "linear_cross_entropy", "reference_linear_cross_entropy", "token_cross_entropy"]

# Tokens whose logits exist together. GPUs need many to be busy; a CPU is as fast with few.
CHUNK_TOKENS = {"cuda": 4096, "cpu": 512}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int = 0) -> Tensor:
    """`reference.linear_cross_entropy`, a chunk of tokens at a time; both gradients are made in the forward pass.

    Under autocast the products are in autocast's dtype, as for nn.Linear, and the weight's gradient is summed in
    float32. Kept for the backward pass: the two gradients, [M, D] and [V, D].

    Args:
        hidden: what the head reads, [M, D].
        weight: [V, D].
        targets: int64 [M]; -100: the token has no loss.
        chunk_tokens: tokens whose logits exist together; 0: as the device wants it.

    Returns:
        The sum of the token losses in float32 or better, [].

    Raises:
        RuntimeError: in a second derivative; the reference has one.
    """
    is_training = torch.is_grad_enabled()
    loss_sum, _, _ = linear_cross_entropy_op(
        hidden.to(_product_dtype(hidden)),
        weight,
        targets,
        chunk_tokens or _chunk_tokens(hidden),
        is_training and hidden.requires_grad,
        is_training and weight.requires_grad,
    )
    return loss_sum


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int = 0) -> Tensor:
    """The loss of every token in float32 or better, [M], 0 where its target is -100; without gradients."""
    dtype = _product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        losses, _, _ = losses_and_gradients(
            hidden.to(dtype),
            weight,
            targets,
            chunk_tokens or _chunk_tokens(hidden),
            needs_hidden=False,
            needs_weight=False,
        )
    return losses


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def _chunk_tokens(hidden: Tensor) -> int:
    return CHUNK_TOKENS.get(hidden.device.type, CHUNK_TOKENS["cuda"])
