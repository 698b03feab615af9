"""Parameters, FLOPs and bytes of a model from its config alone: pure Python, nothing is allocated."""

from lost.accounting.flops import Flops, flops_per_token, forward_flops
from lost.accounting.parameters import count_parameters

__all__ = ["Flops", "count_parameters", "flops_per_token", "forward_flops"]
