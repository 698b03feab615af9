"""Which layers of a dense checkpoint become LOST layers, at which rank, and the config of the model that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lost.accounting.targets import is_match
from lost.config.convert import ConvertConfig
from lost.config.model import LostConfig
from lost.config.section import to_dict
from lost.convert.dense import DenseCheckpoint, meta_model
from lost.convert.ranks import LayerSize, ranks_by_budget, ranks_by_energy, saving_problems
from lost.model import inject
from lost.model.other_families import PREFIX
from lost.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer.

    Attributes:
        layers: those that are converted, in the model's order.
        ranks: of each of them.
        left_dense: names of targets that a rank would not make smaller.
        lost: the `parameterization` of the converted model.
        num_dense: parameters of the dense model.
    """

    layers: tuple[LayerSize, ...]
    ranks: Mapping[str, int]
    left_dense: tuple[str, ...]
    lost: LostConfig
    num_dense: int

    @property
    def num_parameters(self) -> int:
        """Of the converted model."""
        saved = sum(layer.num_dense - layer.num_parameters(self.ranks[layer.name]) for layer in self.layers)
        return self.num_dense - saved


@dataclass(frozen=True)
class Targets:
    """The layers that are asked for.

    Attributes:
        ranks: those that the settings give: of every layer with lost_rank, else of rank_overrides.
    """

    layers: tuple[LayerSize, ...]
    ranks: Mapping[str, int]
    lost: LostConfig
    num_dense: int


def targets_of(checkpoint: DenseCheckpoint, config: ConvertConfig) -> Targets:
    """The layers that the settings name, by the shapes alone.

    Raises:
        ConfigError: a pattern matches nothing, a rank is too high or saves nothing, a weight is tied.
        CheckpointError: a layer's weight is no floating-point matrix.
    """
    lost = lost_config(config)
    report = inject(meta_model(checkpoint.config, checkpoint.place), lost)
    num_more = 1 if config.gamma_mode == "learnable" else 0
    layers = tuple(
        LayerSize(layer.name, layer.out_features, layer.in_features, layer.num_kept, num_more)
        for layer in report.layers
    )
    is_given = {
        layer.name: config.lost_rank != 0 or any(is_match(layer.name, pattern) for pattern in config.rank_overrides)
        for layer in report.layers
    }
    ranks = {layer.name: layer.lost_rank for layer in report.layers if is_given[layer.name]}
    fixed = [layer for layer in layers if layer.name in ranks]
    if config.require_saving and (problems := saving_problems(fixed, ranks)):
        raise ConfigError(problems)
    refuse_integers(checkpoint, layers)
    return Targets(layers, ranks, lost, report.num_parameters_before)


def refuse_integers(checkpoint: DenseCheckpoint, layers: Sequence[LayerSize]) -> None:
    for layer in layers:
        dtype = checkpoint.stored[f"{layer.name}.weight"].dtype
        if not dtype.startswith(("F", "BF")):
            raise CheckpointError(
                f"source = {checkpoint.place.name}: {layer.name}.weight is stored as {dtype}: a quantised model cannot"
                " be converted; give it in fp32, bf16 or fp16"
            )


def lost_config(config: ConvertConfig) -> LostConfig:
    """The `parameterization` that the settings ask for; rank 1 where spectra decide."""
    return LostConfig(
        lost_rank=config.lost_rank or 1,
        density=config.density,
        gamma=config.gamma,
        gamma_mode=config.gamma_mode,
        activation=config.activation,
        sparse_values="complement",
        target_modules=config.target_modules,
        rank_overrides=config.rank_overrides,
        density_overrides=config.density_overrides,
    )


def plan_of(targets: Targets, config: ConvertConfig, squares: Mapping[str, Tensor]) -> Plan:
    """The ranks by the settings.

    Args:
        squares: squared singular values of the layers whose rank is not given.
    Raises:
        ConfigError: a budget below what rank 1 costs, or nothing left to convert.
    """
    free = [layer for layer in targets.layers if layer.name not in targets.ranks]
    if not free:
        return Plan(targets.layers, targets.ranks, (), targets.lost, targets.num_dense)
    if config.energy:
        found = ranks_by_energy(free, squares, config.energy, require_saving=config.require_saving)
    else:
        given = config.parameters
        budget = given if isinstance(given, int) else int(given * targets.num_dense)
        others = [layer for layer in targets.layers if layer.name in targets.ranks]
        beside = sum(layer.num_parameters(targets.ranks[layer.name]) - layer.num_dense for layer in others)
        num_other = targets.num_dense - sum(layer.num_dense for layer in free) + beside
        found = ranks_by_budget(free, squares, budget, num_other=num_other, require_saving=config.require_saving)
    ranks = {**targets.ranks, **found}
    layers = tuple(layer for layer in targets.layers if layer.name in ranks)
    left_dense = tuple(layer.name for layer in targets.layers if layer.name not in ranks)
    if not layers:
        raise ConfigError(
            f"energy = {config.energy:g}: every layer needs a rank for it at which it gets no smaller; lower energy,"
            " or give parameters or lost_rank"
        )
    return Plan(layers, ranks, left_dense, named(targets.lost, layers, ranks), targets.num_dense)


def named(lost: LostConfig, layers: Sequence[LayerSize], ranks: Mapping[str, int]) -> LostConfig:
    """`lost` with exactly these layers and ranks."""
    names = [layer.name for layer in layers]
    return replace(
        lost,
        lost_rank=min(ranks.values()),
        target_modules=names,
        rank_overrides={name: ranks[name] for name in names},
        density_overrides={
            pattern: density
            for pattern, density in lost.density_overrides.items()
            if any(is_match(name, pattern) for name in names)
        },
    )


def converted_model(checkpoint: DenseCheckpoint, lost: LostConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The converted model on the meta device: its config, and the names and shapes of its tensors."""
    keys: dict[str, Any] = checkpoint.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map"):
        keys.pop(key, None)
    config_class = CONFIG_MAPPING[f"{PREFIX}{checkpoint.config.model_type}"]
    config: Any = config_class.from_dict(keys | {"parameterization": to_dict(lost)})
    if dtype is not None:
        config.dtype = dtype
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    config.architectures = [model_class.__name__]
    with torch.device("meta"):
        return model_class(config)
