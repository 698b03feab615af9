"""Weight and gradient norms by group of parameters, and the global norm that clipping uses."""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lost.train.runtime import Runtime
from lost.utils.tensors import local_of


def group_of(name: str) -> str:
    """The name without the layer's number: attention.q_proj.low_rank_down, mlp.up_proj, norm, embed_tokens, ..."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("model", "layers", "weight")]
    if "norm" in name:
        return "norm"
    return ".".join({"self_attn": "attention"}.get(part, part) for part in parts)


def group_norms(model: nn.Module, runtime: Runtime) -> dict[str, float]:
    """'weight_norm/<group>' and 'grad_norm/<group>', L2 over all layers, in float32."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight_norm/{group_of(name)}", name] = parameter.detach()
        if parameter.grad is not None:
            tensors[f"grad_norm/{group_of(name)}", name] = parameter.grad
    squares: dict[str, float] = defaultdict(float)
    for (group, _), square in zip(tensors, square_sums(list(tensors.values()), runtime).tolist(), strict=True):
        squares[group] += square
    return {key: math.sqrt(value) for key, value in sorted(squares.items())}


def clip_gradients(model: nn.Module, max_grad_norm: float, runtime: Runtime) -> torch.Tensor:
    """Scales all gradients to a global L2 norm of at most max_grad_norm (0 = never); the norm before, float32 []."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = square_sums(gradients, runtime).sum().sqrt()
    if max_grad_norm > 0:
        # As torch.nn.utils.clip_grads_with_norm_, which takes no mixture of sharded gradients and a whole norm.
        scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_([local_of(gradient) for gradient in gradients], scale)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def square_sums(tensors: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
    """Sum of squares of each tensor, whole or sharded, float32 [len(tensors)]; the same on every process."""
    # In float32 also for bfloat16, which has three digits; one launch on a GPU.
    norms = torch._foreach_norm([local_of(tensor) for tensor in tensors], 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    squares = torch.stack(norms).square()
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return squares
    # Each shard is there once in every replica.
    mesh = next(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    return runtime.sum_over_processes(squares) / (mesh.size(0) if mesh.ndim == 2 else 1)
