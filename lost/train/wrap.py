"""What training does to the blocks of a model, which knows nothing of it."""

from torch import nn

from lost.accounting.memory import REMADE_LEVELS
from lost.model.blocks import LostLlamaAttention, LostLlamaMLP, LostLlamaRMSNorm
from lost.model.lost_linear import LostLinear
from lost.train.recompute import LEVELS, checkpoint_selectively, llama_blocks
from lost.train.remake import remake_pointwise


def set_recompute(model: nn.Module, recompute: str, *, is_traced: bool = False) -> None:
    """Makes the backward pass of `model` compute again what runtime.recompute says (`lost.train.recompute`).

    Args:
        recompute: none, block or one of LEVELS.
        is_traced: blocks are compiled: every level is then a matter of operators.
    """
    if recompute in LEVELS:
        for block in llama_blocks(model):
            if recompute in REMADE_LEVELS and not is_traced:
                remake_pointwise(block, recompute)
            else:
                checkpoint_selectively(block, recompute)
    elif recompute == "block":
        # transformers renamed it; 5.17 has the old name only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]


def set_kernels(model: nn.Module, kernels: str) -> None:
    """Makes every module of ours in `model` compute as runtime.kernels came out to be."""
    for module in model.modules():
        if isinstance(module, LostLinear | LostLlamaRMSNorm | LostLlamaAttention | LostLlamaMLP):
            module.kernels = kernels


def blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated transformer blocks: the longest ModuleList of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert lists, f"{type(model).__name__} has no ModuleList of blocks"
    return max(lists, key=len)
