"""Fully sharded training with torch's fully_shard (FSDP2): parameters, gradients and optimizer state in shards."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lost.train.runtime import Runtime
from lost.train.wrap import blocks
from lost.utils.errors import ConfigError


def shard_model(model: nn.Module, runtime: Runtime, replicas: int) -> None:
    """Shards every block, then the rest, in place: the parameters become DTensors, their names stay.

    Args:
        model: on the meta device, or with values that are the same on every process.
        replicas: groups of processes that each hold all shards (hybrid sharding); 1: one group of all processes.
    Raises:
        ConfigError: the processes do not divide into so many groups, or the parameters are of several dtypes.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1:
        raise ConfigError(
            f"runtime = fsdp2 shards parameters of one dtype, and this model has {', '.join(sorted(map(str, dtypes)))}"
            " (a learnable gamma stays float32): use runtime.precision=bf16, or runtime=ddp"
        )
    mesh = mesh_of(runtime, replicas)
    # Gradients are summed in float32. With bf16 the blocks compute on bfloat16 copies of float32 shards.
    param_dtype = torch.bfloat16 if runtime.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def mesh_of(runtime: Runtime, replicas: int) -> DeviceMesh:
    """All processes as [shard], or as [replicate, shard]."""
    count = runtime.num_processes
    if count % replicas:
        raise ConfigError(
            f"runtime.replicas = {replicas} does not divide the {count} processes: every replica needs as many"
        )
    if replicas == 1:
        return init_device_mesh(runtime.device.type, (count,), mesh_dim_names=("shard",))
    return init_device_mesh(runtime.device.type, (replicas, count // replicas), mesh_dim_names=("replicate", "shard"))
