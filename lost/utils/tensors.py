"""Tensors that may be sharded over processes."""

import torch
from torch.distributed.tensor import DTensor


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, gathered from the processes (called on every one), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
