"""The head of a language model with something else than logits as its output, through any wrapper of the model.

Shapes: B rows, T seq_len, D hidden_size, V vocab_size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import LlamaForCausalLM


def plain_head(model: nn.Module) -> nn.Linear | None:
    """lm_head of a LLaMA (transformers' or ours) whose output is hidden W^T and nothing else; None: another model."""
    if not isinstance(model, LlamaForCausalLM):
        return None
    head = model.lm_head
    return head if type(head) is nn.Linear and head.bias is None else None


@contextmanager
def head_gives(head: nn.Linear, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside it the model's `.logits` are function(hidden [B, T, D], weight [V, D]).

    The head is still called as a module: FSDP2, DDP and ZeRO bring its weight as for every forward.
    """
    head.forward = lambda hidden: function(hidden, head.weight)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del head.forward
