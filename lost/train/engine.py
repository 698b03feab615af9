"""What trains: a model as its runtime wraps it, with its optimizer. The training loop knows nothing else of either."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lost.config.runtime import RuntimeConfig
from lost.config.training import OptimizerConfig
from lost.train.norms import clip_gradients, group_norms
from lost.train.optim import build_optimizer, empty_optimizer_tensors, load_optimizer_tensors, optimizer_tensors
from lost.train.runtime import Runtime
from lost.train.shard import shard_model
from lost.train.wrap import blocks, set_kernels, set_recompute
from lost.utils.tensors import whole_of

# Gives a model without values (on the meta device, maybe sharded) its memory and its values.
Fill = Callable[[nn.Module], None]
# Fills tensors, whole or sharded, in place with what a checkpoint has under their names.
Read = Callable[[Mapping[str, torch.Tensor]], None]


class Engine(ABC):
    """A model and its optimizer, wrapped for training.

    Attributes:
        model: the model under its own parameter names; a runtime that shards it keeps shards in them.
        wrapped: what the forward of training goes through.
    """

    runtime: Runtime
    model: nn.Module
    wrapped: nn.Module

    @abstractmethod
    def set_learning_rate(self, learning_rate: float) -> None: ...

    @abstractmethod
    def accumulating(self, *, is_last: bool) -> AbstractContextManager:
        """Context of forward and backward of one micro-step; `is_last`: the update follows."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss`, averaged over the processes."""

    @abstractmethod
    def group_norms(self) -> dict[str, float]:
        """'weight_norm/<group>' and 'grad_norm/<group>'."""

    @abstractmethod
    def clip_gradients(self, max_grad_norm: float) -> float:
        """Scales all gradients to a global L2 norm of at most max_grad_norm (0 = never); the norm before."""

    @abstractmethod
    def step(self) -> None:
        """Updates the weights."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drops the gradients. Without a `step` before it, weights and optimizer state stay as they were."""

    @abstractmethod
    def model_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the model (`trained_names`) by name; sharded ones as DTensors. Called on every
        process."""

    @abstractmethod
    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Optimizer state by '<parameter name>/<state key>', sharded like the model's. Called on every process."""

    @abstractmethod
    def load_model(self, read: Read) -> None:
        """What `model_tensors` gave, from a checkpoint, into a model that is being trained.

        Args:
            read: fills tensors in place.
        """

    @abstractmethod
    def load_optimizer(self, read: Read, names: set[str]) -> None:
        """Optimizer state from a checkpoint.

        Args:
            read: fills tensors in place.
            names: '<parameter name>/<state key>' of all that the checkpoint has.
        Raises:
            CheckpointError: state for a parameter that the model does not have.
        """

    def whole_tensors(self) -> dict[str, torch.Tensor]:
        """`model_tensors` gathered on process 0's CPU, one at a time; empty on the others. Called on every process."""
        whole = {}
        for name, tensor in self.model_tensors().items():
            full = whole_of(tensor)
            if self.runtime.is_main:
                whole[name] = full.cpu()
        return whole


def trained_names(model: nn.Module) -> set[str]:
    """Names in the state dict that training may change or that belong to what it changes.

    All of them where nothing is frozen; else the trained parameters and the buffers beside them.
    """
    names = set(model.state_dict(keep_vars=True))
    if all(parameter.requires_grad for parameter in model.parameters()):
        return names
    found = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            found |= {f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)}
    return found & names


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `trained_names`, in the order of the state dict."""
    names = trained_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def build_engine(
    model: nn.Module, config: RuntimeConfig, optimizer: OptimizerConfig, runtime: Runtime, fill: Fill
) -> Engine:
    """The engine of the runtime.

    Args:
        model: on the meta device, unless `fill` leaves it as it is.
        fill: called once, when the model is sharded if the runtime shards it.
    """
    set_up_blocks(model, config, runtime)
    if runtime.zero_stage:
        # DeepSpeed takes seconds to import.
        from lost.train.zero import ZeroEngine

        return ZeroEngine(model, optimizer, runtime, fill)
    return TorchEngine(model, config, optimizer, runtime, fill)


def set_up_blocks(model: nn.Module, config: RuntimeConfig, runtime: Runtime) -> None:
    """Kernels, recomputation and compilation of the blocks of `model`, before it is sharded."""
    set_kernels(model, runtime.kernels)
    set_recompute(model, config.recompute, is_traced=config.compile)
    if config.compile:
        for block in blocks(model):
            block.compile()


class TorchEngine(Engine):
    """The runtimes single, ddp and fsdp2, which shards parameters as DTensors."""

    def __init__(
        self, model: nn.Module, config: RuntimeConfig, optimizer: OptimizerConfig, runtime: Runtime, fill: Fill
    ):
        self.runtime = runtime
        if runtime.name == "fsdp2":
            shard_model(model, runtime, config.replicas)
        fill(model)
        self.model = model.train()
        # DDP would send process 0's values to the others; they all have them, from `fill`.
        self.wrapped = runtime.accelerator.prepare_model(model) if runtime.name == "ddp" else model
        self.optimizer = build_optimizer(model, optimizer, runtime.device)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def accumulating(self, *, is_last: bool) -> AbstractContextManager:
        # ddp exchanges gradients in the last micro-step only; fsdp2 in each, since whole gradients would need the
        # memory that sharding saves.
        is_exchanged = is_last or self.runtime.name != "ddp"
        return nullcontext() if is_exchanged else self.runtime.accelerator.no_sync(self.wrapped)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def group_norms(self) -> dict[str, float]:
        return group_norms(self.model, self.runtime)

    def clip_gradients(self, max_grad_norm: float) -> float:
        return clip_gradients(self.model, max_grad_norm, self.runtime).item()

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def model_tensors(self) -> dict[str, torch.Tensor]:
        return trained_tensors(self.model)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return optimizer_tensors(self.model, self.optimizer)

    def load_model(self, read: Read) -> None:
        read(trained_tensors(self.model))

    def load_optimizer(self, read: Read, names: set[str]) -> None:
        tensors = empty_optimizer_tensors(self.model, names)
        read(tensors)
        load_optimizer_tensors(self.model, self.optimizer, tensors)
