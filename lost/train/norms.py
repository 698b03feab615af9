"""Weight and gradient norms by group of parameters, and the global norm that clipping uses."""

import math
from collections import defaultdict

import torch
from torch import nn


def group_of(name: str) -> str:
    """The name without the layer's number: attention.q_proj.low_rank_down, mlp.up_proj, norm, embed_tokens, ..."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("model", "layers", "weight")]
    if "norm" in name:
        return "norm"
    return ".".join({"self_attn": "attention"}.get(part, part) for part in parts)


def group_norms(model: nn.Module) -> dict[str, float]:
    """'weight_norm/<group>' and 'grad_norm/<group>', L2 over all layers, in float32."""
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        squares[f"weight_norm/{group_of(name)}"] += parameter.detach().float().norm().item() ** 2
        if parameter.grad is not None:
            squares[f"grad_norm/{group_of(name)}"] += parameter.grad.float().norm().item() ** 2
    return {key: math.sqrt(value) for key, value in sorted(squares.items())}


def clip_gradients(model: nn.Module, max_grad_norm: float) -> torch.Tensor:
    """Scales all gradients to a global L2 norm of at most max_grad_norm (0 = never); the norm before, float32 []."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # In float32 also for bfloat16 gradients, which have three digits; one launch on a GPU.
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm
