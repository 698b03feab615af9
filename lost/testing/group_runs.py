"""`lost` commands carried out one after the other by a group of forked processes, for tests of what runs on several."""

import os

import torch.distributed as dist
from accelerate.state import AcceleratorState

from lost.testing.runs import lost_here


def carry_out(index: int, commands: list[list[str]]) -> list[int]:
    """Exit status of each command, which every process of the group calls as under a launcher."""
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": dist.get_world_size()}
    # FORK_LAUNCHED keeps accelerate from ending the group, which the next command needs, after a run.
    os.environ |= {name: str(value) for name, value in names.items()} | {"FORK_LAUNCHED": "1", "HF_HUB_OFFLINE": "1"}
    return [_carry_out_anew(command) for command in commands]


def _carry_out_anew(command: list[str]) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return lost_here(*command)
