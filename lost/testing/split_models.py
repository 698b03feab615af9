"""What each process of a test of split initialisation does."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lost.config.model import LostConfig, ModelConfig, ParameterizationConfig
from lost.model import inject
from lost.model.build import build_meta_model, initialise, materialise
from lost.model.lost_linear import LostLinear
from lost.model.split import Processes
from lost.utils.errors import LostError

TOKENS = torch.arange(2 * 11).reshape(2, 11) % 7


def group(index: int) -> Processes:
    def broadcast(tensor: Tensor, source: int) -> None:
        dist.broadcast(tensor, src=source)

    return Processes(index, dist.get_world_size(), broadcast)


def fill_models(
    index: int, cases: dict[str, tuple[ModelConfig, ParameterizationConfig, torch.dtype]], mesh_shape: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """For every case: the gathered state, logits of TOKENS, sizes of the local parts, and own factorisations.

    Args:
        index: of this process.
        cases: model, form and dtype by name.
        mesh_shape: (shards,) or (replicas, shards) of `fully_shard`; (): not sharded.
    """
    results = {}
    for name, (model, form, dtype) in cases.items():
        net = build_meta_model(model, form, dtype=dtype)
        if mesh_shape:
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
            for block in net.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)
        materialise(net, form, "cpu")
        num_own = _counting_factorisations(lambda: initialise(net, form, 5, processes=group(index)))  # noqa: B023
        state = net.state_dict()
        is_mixed = len({value.dtype for value in net.parameters()}) > 1
        results[name] = {
            "state": {key: _gathered(value) for key, value in state.items()},
            "buffers": {key: value.clone() for key, value in net.named_buffers()},
            "local_numel": {key: _local(value).numel() for key, value in net.named_parameters()},
            # fully_shard's forward wants parameters of one dtype; filling them does not.
            "logits": None if mesh_shape and is_mixed else net(TOKENS).logits.detach(),
            "num_factorisations": num_own,
        }
    return results


def inject_model(index: int, config: LostConfig) -> dict[str, Any]:
    """The state of a converted module with random weights and biases, shared between the processes."""
    net = dense_module()
    num_own = _counting_factorisations(lambda: inject(net, config, processes=group(index)))
    return {"state": dict(net.state_dict()), "num_factorisations": num_own}


def dense_module() -> nn.Module:
    """Three linears of different sizes with weights that every process draws alike."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 31), nn.ReLU(), nn.Linear(31, 40, bias=False), nn.Linear(40, 9))


def fail_on_one(index: int, model: ModelConfig, form: LostConfig) -> str:
    """What this process is told when process 1 fails at its third layer."""
    net = build_meta_model(model, form)
    materialise(net, form, "cpu")
    initial_values = LostLinear.initial_values

    own_layers = []

    def values_or_failure(layer: LostLinear, *arguments: Any) -> dict[str, Tensor]:
        own_layers.append(layer)
        if index == 1 and len(own_layers) == 3:
            raise LostError("no such spectrum ☃")
        return initial_values(layer, *arguments)

    LostLinear.initial_values = values_or_failure  # pyright: ignore[reportAttributeAccessIssue]
    try:
        initialise(net, form, 0, processes=group(index))
    except LostError as error:
        return str(error)
    finally:
        LostLinear.initial_values = initial_values
    return "no error"


def _counting_factorisations(work: Any) -> int:
    """How many layers `work` factorises in this process."""
    calls = []
    initial_values = LostLinear.initial_values

    def counted(*arguments: Any) -> dict[str, Tensor]:
        calls.append(None)
        return initial_values(*arguments)

    LostLinear.initial_values = counted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        work()
    finally:
        LostLinear.initial_values = initial_values
    return len(calls)


def _gathered(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
