"""LOST: low-rank factors with an activation, plus a block of kept channels."""

import torch
from torch import Tensor, nn

from lost.config.model import LostConfig
from lost.model.inject import inject
from lost.model.lost_init import FreshWeight
from lost.model.lost_linear import LostLinear


class Lost:
    def swap(self, module: nn.Module, config: LostConfig) -> None:
        inject(module, config)

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, LostLinear)

    def initial_values(
        self, layer: LostLinear, dense_weight: FreshWeight, config: LostConfig, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        bias = {} if layer.bias is None else {"bias": torch.zeros(layer.out_features)}
        return layer.initial_values(dense_weight, config, generator) | bias
