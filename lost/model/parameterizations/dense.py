"""Plain nn.Linear: nothing is replaced, so transformers' own classes are used as they are."""

import torch
from torch import Tensor, nn

from lost.config.schema import DenseConfig


class Dense:
    def swap(self, module: nn.Module, config: DenseConfig) -> None:
        """Leaves every nn.Linear in place."""

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @torch.no_grad()
    def fill(
        self,
        layer: nn.Linear,
        dense_weight: Tensor,
        config: DenseConfig,  # noqa: ARG002
        generator: torch.Generator | None,  # noqa: ARG002
    ) -> None:
        layer.weight.copy_(dense_weight)
        if layer.bias is not None:
            layer.bias.zero_()
