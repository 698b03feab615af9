"""LOST: low-rank factors with an activation, plus a block of kept channels."""

import torch
from torch import Tensor, nn

from lost.config.schema import LostConfig
from lost.model.inject import inject
from lost.model.lost_linear import LostLinear


class Lost:
    def swap(self, module: nn.Module, config: LostConfig) -> None:
        inject(module, config)

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, LostLinear)

    @torch.no_grad()
    def fill(
        self, layer: LostLinear, dense_weight: Tensor, config: LostConfig, generator: torch.Generator | None
    ) -> None:
        layer.initialise(dense_weight, config, generator)
        if layer.bias is not None:
            layer.bias.zero_()
