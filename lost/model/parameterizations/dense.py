"""Plain nn.Linear: nothing is replaced, so transformers' own classes are used as they are."""

import torch
from torch import Tensor, nn

from lost.config.model import DenseConfig
from lost.model.lost_init import FreshWeight


class Dense:
    def swap(self, module: nn.Module, config: DenseConfig) -> None:
        """Leaves every nn.Linear in place."""

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def initial_values(
        self,
        layer: nn.Linear,
        dense_weight: FreshWeight,
        config: DenseConfig,  # noqa: ARG002
        generator: torch.Generator | None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        bias = {} if layer.bias is None else {"bias": torch.zeros(layer.out_features)}
        return {"weight": dense_weight.draw(), **bias}
