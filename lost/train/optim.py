"""Optimizers: which parameters decay, and their state as named tensors."""

from collections.abc import Iterable

import torch
from torch import nn

from lost.config.training import AdamWConfig, OptimizerConfig
from lost.utils.errors import CheckpointError


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over all trained parameters; matrices decay, vectors (norms, biases, gamma) do not."""
    assert isinstance(config, AdamWConfig), config
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if len(shape_of(p)) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=has_fused_adamw(device),
    )


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter; DeepSpeed leaves an empty tensor in the place of one that it has sharded."""
    return getattr(parameter, "ds_shape", parameter.shape)


def has_fused_adamw(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state by '<parameter name>/<state key>', independent of parameter order and grouping."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def empty_optimizer_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors to read the optimizer state `names` of a checkpoint into: moments like their parameter, steps []."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for full_key in names:
        name, key = full_key.rsplit("/", 1)
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state for {name}, which this model does not train")
        tensors[full_key] = torch.zeros(()) if key == "step" else torch.zeros_like(parameters[name].detach())
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Puts the state of `optimizer_tensors` back; the optimizer may keep `tensors` as its own.

    Raises:
        CheckpointError: state for a parameter that the model does not have.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_key, value in tensors.items():
        name, key = full_key.rsplit("/", 1)
        if name not in order:
            raise CheckpointError(f"the checkpoint has optimizer state for {name}, which this model does not train")
        state.setdefault(order.index(name), {})[key] = value
    packed = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})
