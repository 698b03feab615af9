"""Weight and gradient norms by group of parameters, and the global norm that clipping uses."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

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
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return norms_by_group(weights, gradients, lambda tensors: square_sums(tensors, runtime))


def norms_by_group(
    weights: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    square_sums: Callable[[list[torch.Tensor]], torch.Tensor],
) -> dict[str, float]:
    """'weight_norm/<group>' and 'grad_norm/<group>' of tensors by parameter name.

    Args:
        square_sums: sum of squares of each tensor over all that the processes hold of it.
    """
    kinds = {"weight_norm": weights, "grad_norm": gradients}
    tensors = [(f"{kind}/{group_of(name)}", tensor) for kind, named in kinds.items() for name, tensor in named.items()]
    squares: dict[str, float] = defaultdict(float)
    sums = square_sums([tensor for _, tensor in tensors]).tolist()
    for (group, _), square in zip(tensors, sums, strict=True):
        squares[group] += square
    return {key: math.sqrt(value) for key, value in sorted(squares.items())}


def clip_gradients(model: nn.Module, max_grad_norm: float, runtime: Runtime) -> torch.Tensor:
    """Scales all gradients to a global L2 norm of at most max_grad_norm (0 = never); the norm before, float32 []."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = square_sums(gradients, runtime).sum().sqrt()
    scale_to_norm([local_of(gradient) for gradient in gradients], norm, max_grad_norm)
    return norm


def scale_to_norm(gradients: list[torch.Tensor], norm: torch.Tensor, max_grad_norm: float) -> None:
    """Scales gradients of the global L2 norm `norm`, of which these are parts, to at most max_grad_norm (0 = never)."""
    if max_grad_norm > 0:
        # As torch.nn.utils.clip_grads_with_norm_, which takes no mixture of sharded gradients and a whole norm.
        scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]


def square_sums(tensors: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
    """Sum of squares of each tensor, whole or sharded, float32 [len(tensors)]; the same on every process."""
    squares = local_square_sums([local_of(tensor) for tensor in tensors])
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return squares
    # Each shard is there once in every replica.
    mesh = next(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    return runtime.sum_over_processes(squares) / (mesh.size(0) if mesh.ndim == 2 else 1)


def local_square_sums(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of each tensor, float32 [len(tensors)]."""
    # In float32 also for bfloat16, which has three digits; one launch on a GPU.
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square()
