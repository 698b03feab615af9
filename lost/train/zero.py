"""ZeRO: training with DeepSpeed's shards of optimizer state, gradients and parameters.

DeepSpeed exchanges gradients, keeps the shards and runs the optimizer on float32 weights. Everything else is done here
on the parts that a process holds: norms, clipping, skipping, and the way to checkpoints. DeepSpeed's own checkpoints
are not used: loading them runs pickled code, and they fit one number of processes and one stage.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, safe_get_local_optimizer_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

from lost.config.training import OptimizerConfig
from lost.train.engine import Engine, Fill, Read
from lost.train.norms import local_square_sums, norms_by_group, scale_to_norm
from lost.train.optim import build_optimizer, shape_of
from lost.train.runtime import Runtime
from lost.train.zero_setup import forget_in_transformers
from lost.utils.errors import CheckpointError
from lost.utils.tensors import whole_of

# The moments of AdamW, which DeepSpeed keeps in the same shards as the weights.
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """The runtimes zero1, zero2 and zero3.

    With precision=bf16 the forward uses bfloat16 weights, and the float32 weights that the optimizer updates are what
    `model_tensors` gives.

    Attributes:
        wrapped: DeepSpeed's engine.
    """

    wrapped: Any

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, runtime: Runtime, fill: Fill):
        self.runtime = runtime
        self.model = model.train()
        fill_in_shards(model, runtime, fill)
        # With bfloat16 weights the shards are kept, for DeepSpeed would make its float32 weights from those.
        shards = take_over(model, runtime)
        self.optimizer = build_optimizer(model, optimizer, runtime.device)
        # accelerate's wrapper of the optimizer does nothing; DeepSpeed steps ours.
        self.wrapped, _ = runtime.accelerator.prepare(model, self.optimizer)
        forget_in_transformers()
        for parameter, shard in shards.items():
            write_own(own_weight(parameter), parameter, shard.full_tensor())
        # Checkpoints are written from the CPU, by gloo.
        self._mesh = init_device_mesh("cpu", (runtime.num_processes,))
        self._has_gradients = False

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def accumulating(self, *, is_last: bool) -> AbstractContextManager:
        self.wrapped.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss, scale_wrt_gas=False)
        self._has_gradients = True

    def group_norms(self) -> dict[str, float]:
        weights = {name: own_weight(parameter) for name, parameter in self.model.named_parameters()}
        return norms_by_group(weights, self._gradients(), self._square_sums)

    def clip_gradients(self, max_grad_norm: float) -> float:
        gradients = list(self._gradients().values())
        norm = self._square_sums(gradients).sum().sqrt()
        scale_to_norm(gradients, norm, max_grad_norm)
        return norm.item()

    def step(self) -> None:
        self.wrapped.step()
        assert self.wrapped.was_step_applied(), "DeepSpeed skipped a step whose gradients are finite"
        self._has_gradients = False

    def zero_grad(self) -> None:
        if not self._has_gradients:
            return
        # DeepSpeed drops gradients and keeps weights and moments where it finds one that is not finite.
        for gradient in self._gradients().values():
            gradient.fill_(torch.nan)
        self.wrapped.step()
        assert not self.wrapped.was_step_applied(), "DeepSpeed stepped with gradients that are not finite"
        self._has_gradients = False

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters as shards on the CPU, gathered one at a time; float32 whatever the precision."""
        shards: dict[nn.Parameter, torch.Tensor] = {}
        tensors = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                tensors[name] = value
                continue
            # Tied weights are the same parameter under two names.
            if value not in shards:
                shards[value] = self._sharded_on_cpu(value, own_weight(value))
            tensors[name] = shards[value]
        return tensors

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Moments as shards on the CPU, gathered one at a time."""
        steps = {float(state["step"]) for state in self.optimizer.state.values()}
        if not steps:
            return {}
        assert len(steps) == 1, steps
        step = torch.tensor(steps.pop())
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"{name}/step"] = step.clone()
            for key in MOMENTS:
                tensors[f"{name}/{key}"] = self._sharded_on_cpu(parameter, self._own_moment(parameter, key))
        return tensors

    @torch.no_grad()
    def load_model(self, read: Read) -> None:
        tensors = self.model_tensors()
        read(tensors)
        for name, parameter in self.model.named_parameters():
            whole = whole_of(tensors[name]).to(self.runtime.device)
            write_own(own_weight(parameter), parameter, whole)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.copy_(whole)

    def load_optimizer(self, read: Read, names: set[str]) -> None:
        parameters = dict(self.model.named_parameters())
        expected = {f"{name}/{key}" for name in parameters for key in ("step", *MOMENTS)}
        if names != expected:
            differing = ", ".join(sorted(names ^ expected)[:5])
            raise CheckpointError(f"the checkpoint's optimizer state does not fit this model: {differing}")
        tensors: dict[str, torch.Tensor] = {}
        for full_key in sorted(names):
            name, key = full_key.rsplit("/", 1)
            shape = shape_of(parameters[name])
            is_step = key == "step"
            tensors[full_key] = (
                torch.zeros(()) if is_step else zeros(shape, device_mesh=self._mesh, placements=[Shard(0)])
            )
        read(tensors)
        steps = {float(value) for full_key, value in tensors.items() if full_key.endswith("/step")}
        if len(steps) > 1:
            raise CheckpointError(
                f"the checkpoint's parameters were updated different numbers of times ({sorted(steps)[:5]}), and"
                " DeepSpeed has one number for all: go on with another runtime"
            )
        self._start_moments(steps.pop())
        for name, parameter in parameters.items():
            for key in MOMENTS:
                shard = tensors[f"{name}/{key}"]
                assert isinstance(shard, DTensor)
                write_own(self._own_moment(parameter, key), parameter, shard.full_tensor())

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This process's part of every gradient, in the memory that the optimizer reads; maybe empty."""
        return {name: own_gradient(parameter) for name, parameter in self.model.named_parameters()}

    def _square_sums(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return self.runtime.sum_over_processes(local_square_sums(parts))

    def _sharded_on_cpu(self, parameter: nn.Parameter, own: torch.Tensor) -> DTensor:
        """The tensor of whose flat elements every process gives its own part, as a shard on the CPU."""
        shape = shape_of(parameter)
        first, size = own_range(parameter)
        whole = torch.zeros(shape.numel(), dtype=own.dtype, device=own.device)
        whole[first : first + size] = own
        whole = self.runtime.sum_over_processes(whole).view(shape).cpu()
        # A shard with memory of its own, that the whole need not stay.
        part = distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None).to_local().clone()
        return DTensor.from_local(part, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=whole.stride())

    def _own_moment(self, parameter: Any, key: str) -> torch.Tensor:
        """This process's part of a moment of AdamW, flat; maybe empty."""
        _, size = own_range(parameter)
        if hasattr(parameter, "ds_id"):
            return safe_get_local_optimizer_state(parameter, key)[:size]
        if not size:
            return torch.zeros(0, device=parameter.device)
        # The parameter's own link to it is missing where there are several groups (DeepSpeed 0.19).
        mapping = parameter._hp_mapping
        moment = self.optimizer.state[self._float32_partitions()[mapping.param_group_index]][key]
        return moment.narrow(0, mapping.hp_fragment_address.start, size)

    def _start_moments(self, num_steps: float) -> None:
        """Optimizer state as after `num_steps` updates, moments zero."""
        for partition in self._float32_partitions():
            moments = {key: torch.zeros_like(partition) for key in MOMENTS}
            self.optimizer.state[partition] = {"step": torch.tensor(num_steps, device=partition.device), **moments}

    def _float32_partitions(self) -> list[torch.Tensor]:
        """The flat float32 weights that this process updates, one or more a parameter group."""
        # Of zero3, of zero1 and zero2, and of zero1 with bf16.
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        zero_optimizer = self.wrapped.optimizer
        return next(getattr(zero_optimizer, name) for name in names if hasattr(zero_optimizer, name))


def fill_in_shards(model: nn.Module, runtime: Runtime, fill: Fill) -> None:
    """Lets `fill` write into shards over the processes (DTensors), so that none ever holds the whole model."""
    mesh = init_device_mesh(runtime.device.type, (runtime.num_processes,))
    replace_parameters(model, lambda parameter: distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
    fill(model)


@torch.no_grad()
def take_over(model: nn.Module, runtime: Runtime) -> dict[nn.Parameter, DTensor]:
    """Makes plain parameters of the shards, in the dtype of the forward; with zero3 each goes to DeepSpeed at once.

    Returns:
        With precision=bf16 the float32 shards of every parameter, else nothing.
    """
    kept: dict[nn.Parameter, DTensor] = {}
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32

    def whole(shard: nn.Parameter) -> nn.Parameter:
        assert isinstance(shard, DTensor)
        parameter = nn.Parameter(shard.full_tensor().to(dtype))
        if runtime.zero_stage == 3:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), dtype=dtype)
        if dtype != shard.dtype:
            kept[parameter] = shard
        return parameter

    replace_parameters(model, whole)
    return kept


def replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Puts `make(parameter)` in the place of every parameter; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                value = make(parameter)
                made[parameter] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            setattr(module, name, made[parameter])


def own_range(parameter: Any) -> tuple[int, int]:
    """(first element, number of elements) of the flattened parameter that this process updates."""
    if hasattr(parameter, "ds_id"):
        size, total = parameter.partition_numel(), parameter.ds_numel
        first = min(total, parameter.ds_zero_partition_rank * size)
        return first, min(size, total - first)
    mapping = parameter._hp_mapping
    address = mapping.lp_fragment_address if mapping else None
    return (address.start, address.numel) if address else (0, 0)


def own_weight(parameter: Any) -> torch.Tensor:
    """This process's part of the float32 weight, flat; maybe empty."""
    _, size = own_range(parameter)
    if hasattr(parameter, "ds_id"):
        # The last part is padded.
        return safe_get_local_fp32_param(parameter).detach()[:size]
    return parameter._hp_mapping.hp_fragment.detach() if size else torch.zeros(0, device=parameter.device)


def own_gradient(parameter: Any) -> torch.Tensor:
    """This process's part of the float32 gradient, in the memory that the optimizer reads; maybe empty."""
    first, size = own_range(parameter)
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter)[:size]
    if not size:
        return torch.zeros(0, device=parameter.device)
    gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    # With zero1 and bf16 DeepSpeed keeps the whole gradient on every process.
    return gradient if gradient.numel() == size else gradient.view(-1)[first : first + size]


def write_own(own: torch.Tensor, parameter: nn.Parameter, whole: torch.Tensor) -> None:
    """Fills this process's part of a tensor of the parameter from the whole tensor."""
    first, size = own_range(parameter)
    own.copy_(whole.flatten()[first : first + size])
