"""Forms of a linear layer, one file each, found by the class of their config section.

A new one: a file here with the three functions of `Parameterization`, a line in PARAMETERIZATIONS, and its costs in
lost/accounting/costs.py.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lost.config.model import DenseConfig, LostConfig, ParameterizationConfig
from lost.model.lost_init import FreshWeight
from lost.model.parameterizations.dense import Dense
from lost.model.parameterizations.lost import Lost


class Parameterization(Protocol):
    """What the model families and `build_model` need of a form of the linear layers."""

    def swap(self, module: nn.Module, config: Any) -> None:
        """Replaces the chosen nn.Linear inside `module`, which is on the meta device, by layers without values.

        Raises:
            ConfigError: `config` does not fit the layers of `module`.
        """
        ...

    def is_layer(self, module: nn.Module) -> bool:
        """Whether `module` is a layer that `swap` made."""
        ...

    def initial_values(
        self, layer: Any, dense_weight: FreshWeight, config: Any, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Initial value of every parameter and buffer of a layer by name, from the dense weight W0 it stands for.

        A form that needs no W0 does not draw it. Full tensors, whatever part of them this process keeps; of the layer
        only sizes are read.
        """
        ...


PARAMETERIZATIONS: dict[type[ParameterizationConfig], Parameterization] = {DenseConfig: Dense(), LostConfig: Lost()}


def parameterization_of(config: ParameterizationConfig) -> Parameterization:
    return PARAMETERIZATIONS[type(config)]
