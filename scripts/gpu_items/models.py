"""Models with random weights on the device, in the form that an arm names."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gpu_items.plan import SIZES
from gpu_items.worker import Place
from lost.bench.peers import PEERS, padded, swap_linears
from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.model.build import empty_model
from lost.model.lost_linear import LostLinear
from lost.train.wrap import set_kernels, set_recompute


def model_config(size: str, **changes: Any) -> ModelConfig:
    return replace(ModelConfig(name=size, **SIZES[size]), **changes)


def lost_config(model: ModelConfig) -> LostConfig:
    """Drawn factors where values are needed: the cost of a step does not depend on them."""
    return LostConfig(lost_rank=model.lineage_rank, factor_init="cola", score="random")


def padded_config(model: ModelConfig) -> ModelConfig:
    """The dense model at the width that LOST pads to inside."""
    width = model.intermediate_size
    # What the study compares with is a multiple of 128 at llama_1b: 5504.
    return replace(model, intermediate_size=width if width == padded(width) else width + -width % 128)


def random_model(form: str, model: ModelConfig, place: Place) -> PreTrainedModel:
    """`dense`, `lost` or one of PEERS in bfloat16; drawn on the device, for billions take minutes on the host."""
    config = lost_config(model) if form == "lost" else DenseConfig()
    net = empty_model(model, config, device=place.device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    if form in PEERS:
        swap_linears(net, form, model.lineage_rank)
    draw(net)
    return net.train()


@torch.no_grad()
def draw(net: nn.Module) -> None:
    """Matrices of an ordinary scale; kept channels at random places."""
    for name, parameter in net.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(std=0.02)
        elif parameter.dim() > 1:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    for module in net.modules():
        if isinstance(module, LostLinear) and module.sparse_index is not None:
            index = torch.randperm(module.in_features)[: module.num_kept].sort().values
            module.sparse_index.copy_(index)


def with_arm(net: PreTrainedModel, kernels: str, level: str) -> PreTrainedModel:
    """Backend and level of recomputation of every block."""
    set_kernels(net, kernels)
    set_recompute(net, level)
    return net


def compile_blocks(net: PreTrainedModel, place: Place) -> None:
    # Inductor's C++ takes minutes on a small CPU: a trial stops before code is generated.
    for block in net.model.layers:
        block.compile(backend="aot_eager" if place.is_tiny else "inductor", dynamic=False)
