"""What of the model is trained: everything, or adapters beside frozen weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lost.config.finetune import FullMethodConfig, LoraMethodConfig, LostAdapterMethodConfig, MethodConfig
from lost.model.adapter import add_lost_adapters
from lost.model.lora import add_lora


def apply_method(
    model: PreTrainedModel,
    method: MethodConfig,
    head: list[str],
    seed: int,
    stored: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model with the parameters that the method trains asking for gradients, and no others.

    Args:
        head: names of modules that are new and trained by every method.
        seed: of new weights.
        stored: trained tensors of a checkpoint; values that the adapter would start from are then not made.
    Raises:
        LostError: the method does not fit the model.
    """
    if isinstance(method, FullMethodConfig):
        return model.requires_grad_(True)
    if isinstance(method, LoraMethodConfig):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return add_lora(model, method, head)
    assert isinstance(method, LostAdapterMethodConfig), method
    model.requires_grad_(False)
    add_lost_adapters(model, method, seed, stored)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    return model
