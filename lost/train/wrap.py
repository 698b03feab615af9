"""What is done to a finished model so that it trains: recompute, compile, DDP. The model knows nothing of it."""

import torch
from torch import nn

from lost.config.schema import RuntimeConfig
from lost.model.lost_linear import LostLinear
from lost.train.runtime import Runtime


def wrap_model(model: nn.Module, config: RuntimeConfig, runtime: Runtime) -> nn.Module:
    """The module whose forward trains; parameters stay those of `model`."""
    model.to(runtime.device)
    model.train()
    if runtime.num_processes > 1:
        # DDP sends process 0's parameters to the others; the kept channels must be process 0's as well.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    set_recompute(model, config.recompute)
    if config.compile:
        for block in blocks(model):
            block.compile()
    return runtime.accelerator.prepare_model(model)


def set_recompute(model: nn.Module, recompute: str) -> None:
    """Makes the backward pass of `model` compute again what runtime.recompute says."""
    for module in model.modules():
        if isinstance(module, LostLinear):
            module.recompute_z = recompute == "p0"
    if recompute == "block":
        # transformers renamed it; 5.17 has the old name only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]


def blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated transformer blocks: the longest ModuleList of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert lists, f"{type(model).__name__} has no ModuleList of blocks"
    return max(lists, key=len)
