"""A language model with LOST layers for transformers, in one file that needs nothing else.

Each of the layers that `lost_layers` in config.json names is

    y = gamma * act(x A^T) B^T + (1 - gamma) * x[..., I] W_s^T + bias

(LOST: Low-rank and Sparse Pre-training, arXiv 2508.02668); all the rest is transformers' own model. Load it with
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

Shapes: N out_features, K in_features, R rank, S kept channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ACTIVATIONS = {"silu": F.silu, "identity": lambda h: h, "gelu": F.gelu, "relu": F.relu}


class LostLlamaConfig(LlamaConfig):
    """The dense config and `lost_layers`: by module name rank, num_kept, axis, activation, gamma, bias."""

    model_type = "lost_llama"
    # The dense plan shards nn.Linear.
    base_model_tp_plan = {}  # noqa: RUF012
    lost_layers: dict | None = None


class LostLinear(nn.Module):
    """One LOST layer; gamma is a number, "learnable" (a parameter) or None (multiplied into the weights)."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, num_kept: int, axis: str, activation: str,
        gamma: float | str | None, bias: bool,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.axis, self.activation = axis, activation
        self.low_rank_down = nn.Parameter(torch.empty(rank, in_features))
        self.low_rank_up = nn.Parameter(torch.empty(out_features, rank))
        self.register_parameter("sparse_weight", None)
        self.register_buffer("sparse_index", None)
        if num_kept:
            shape = (out_features, num_kept) if axis == "columns" else (num_kept, in_features)
            self.sparse_weight = nn.Parameter(torch.empty(shape))
            self.sparse_index = torch.arange(num_kept)
        self.bias: Any = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.gamma: Any = nn.Parameter(torch.full((1,), 0.7)) if gamma == "learnable" else gamma
        for weight in (self.low_rank_down, self.low_rank_up, self.sparse_weight):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.low_rank_down)
        # Activation and gamma in float32 or better, rounded once.
        z = ACTIVATIONS[self.activation](h.to(torch.promote_types(h.dtype, torch.float32)))
        z = z if self.gamma is None else z * self.gamma
        y = F.linear(z.to(h.dtype), self.low_rank_up, self.bias)
        if self.sparse_weight is None or self.sparse_index is None:
            return y
        if self.axis == "rows":
            return y.index_add(-1, self.sparse_index, self.scaled(F.linear(x, self.sparse_weight)).to(y.dtype))
        return y + F.linear(self.scaled(x.index_select(-1, self.sparse_index)), self.sparse_weight)

    def scaled(self, values: Tensor) -> Tensor:
        """(1 - gamma) * values."""
        return values if self.gamma is None else (values * (1 - self.gamma)).to(values.dtype)


class LostLlamaForCausalLM(LlamaForCausalLM):
    """The dense model with its projections replaced by LOST layers."""

    config_class = LostLlamaConfig
    # A learnable gamma in bfloat16 would move in steps of 0.4 %.
    _keep_in_fp32_modules_strict = ["gamma"]  # noqa: RUF012
    _tp_plan = {}  # noqa: RUF012

    def __init__(self, config: LostLlamaConfig):
        super().__init__(config)
        for name, facts in (config.lost_layers or {}).items():
            parent, _, child = name.rpartition(".")
            linear: Any = self.get_submodule(name)
            layer = LostLinear(linear.in_features, linear.out_features, **facts)
            setattr(self.get_submodule(parent), child, layer.to(linear.weight.dtype))
