"""Parameters, FLOPs and bytes of a model from its config alone: pure Python, nothing is allocated."""

from lost.accounting.flops import Flops, flops_per_token, forward_flops
from lost.accounting.memory import GIB, Memory, activation_bytes_per_token, memory_per_device, state_bytes
from lost.accounting.parameters import count_parameters

__all__ = [
    "GIB",
    "Flops",
    "Memory",
    "activation_bytes_per_token",
    "count_parameters",
    "flops_per_token",
    "forward_flops",
    "memory_per_device",
    "state_bytes",
]
