"""`lost::linear_cross_entropy`: an operator that compilers and checkpoints see as one, gradients made in its forward.

Shapes: M tokens, D hidden_size, V vocab_size.
"""

import torch
from torch import Tensor

from lost_kernels.cross_entropy.chunked import losses_and_gradients


@torch.library.custom_op("lost::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the token losses [], its gradients of hidden and weight); one that is not needed is empty."""
    with torch.autocast(hidden.device.type, enabled=False):
        losses, d_hidden, d_weight = losses_and_gradients(
            hidden, weight, targets, chunk_tokens, needs_hidden=needs_hidden, needs_weight=needs_weight
        )
    return (
        losses.sum(),
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight,
    )


@linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, chunk_tokens, needs_hidden, needs_weight):  # noqa: ARG001
    return (
        hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


def _keep_gradients(ctx, inputs, output):
    _, d_hidden, d_weight = output
    ctx.needs_hidden, ctx.needs_weight = inputs[-2:]
    ctx.mark_non_differentiable(d_hidden, d_weight)
    # Zeros in their sizes for the gradients that nobody has: as much memory as the gradients themselves.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_hidden, d_weight)


@torch.autograd.function.once_differentiable
def _scale_gradients(ctx, d_loss, *_):
    """The gradients times that of the loss. The kept ones are left as they are, for a second backward pass."""
    d_hidden, d_weight = ctx.saved_tensors
    if d_loss is None:
        return (None,) * 6
    return (
        d_hidden * d_loss if ctx.needs_hidden else None,
        d_weight * d_loss if ctx.needs_weight else None,
        *[None] * 4,
    )


linear_cross_entropy_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)
