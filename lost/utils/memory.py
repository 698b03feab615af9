"""Peak memory of this process."""

import resource
import sys
from pathlib import Path

import torch

_PROC_STATUS = Path("/proc/self/status")


def peak_memory_gib() -> float:
    """Most memory used so far, in GiB.

    In a process that uses CUDA: the maximum allocated by tensors on its current GPU. Elsewhere: the process's largest
    resident size.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_bytes() / 2**30


def peak_resident_bytes() -> int:
    """Largest resident size of this process (VmHWM on Linux, ru_maxrss elsewhere)."""
    if _PROC_STATUS.is_file():
        for line in _PROC_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Bytes on macOS, KiB on other systems. On Linux it would also count the launching process, hence VmHWM first.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
