"""A small sharded model saved and loaded by several processes, for tests: each function runs in every process."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lost.checkpoint import CheckpointManager
from lost.checkpoint.shards import read_into
from lost.utils.tensors import whole_of

# Rows that no number of processes divides, and fewer rows than processes.
SIZES = ((5, 3), (3, 7), (7, 1))


def layer(seed: int = 0) -> nn.Sequential:
    """Linear layers with a buffer that is never sharded."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(columns, rows) for columns, rows in SIZES))
    model.register_buffer("index", torch.randint(100, (4,)))
    return model


def save_and_load_sharded(_: int, folder: str, is_saving: bool) -> dict[str, torch.Tensor]:
    """Saves the sharded `layer()`, or reads it into one of other values; all tensors, gathered."""
    model = layer(seed=0 if is_saving else 1)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    manager = CheckpointManager(Path(folder) / "checkpoints", processes=group)
    if is_saving:
        tensors = {"model": model.state_dict()}
        if dist.get_rank() == 0:
            tensors["rng"] = {"process_0/x": torch.arange(3)}
        manager.save(1, tensors, {"of": "all"})
    else:
        read_into(manager.complete()[-1], "model", model.state_dict())
    return {name: whole_of(tensor) for name, tensor in model.state_dict().items()}
