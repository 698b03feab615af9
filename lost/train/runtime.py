"""Processes, device and precision, decided once and printed before step 1."""

import ctypes
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from lost_kernels.lost_linear import kernels_for
from torch.distributed.rendezvous import rendezvous

from lost.config.runtime import DeviceConfig, RuntimeConfig
from lost.train.zero_setup import require_deepspeed, zero_accelerator
from lost.utils.errors import ConfigError
from lost.utils.launcher import num_own_threads

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Dense bf16 peak without sparsity, TFLOP/s, from the makers' data sheets.
GPU_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "V100": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


@dataclass(frozen=True)
class Runtime:
    """Where and how this process trains."""

    accelerator: Accelerator
    precision: str
    name: str
    # Of gloo, beside the one that training uses: what checkpoints exchange while training goes on.
    checkpoint_group: dist.ProcessGroup | None
    # How LOST layers are computed, and why so.
    kernels: str
    kernels_reason: str

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def zero_stage(self) -> int:
        """What DeepSpeed shards: 1: optimizer state, 2: gradients too, 3: parameters too; 0: DeepSpeed is not used."""
        return int(self.name.removeprefix("zero")) if self.name.startswith("zero") else 0

    @property
    def param_dtype(self) -> torch.dtype:
        """dtype of weights, gradients and optimizer state."""
        return torch.bfloat16 if self.precision == "pure_bf16" else torch.float32

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    def autocast(self) -> torch.autocast:
        """Context of every forward pass: bf16 products over fp32 weights where precision=bf16, else nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum") if self.num_processes > 1 else values  # pyright: ignore[reportReturnType]

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        kind = "process" if self.num_processes == 1 else "processes"
        return (
            f"{self.name}: {self.num_processes} {kind} on {name}, {self.precision},"
            f" {torch.get_num_threads()} CPU threads a process; LOST kernels: {self.kernels} ({self.kernels_reason})"
        )

    def peak_tflops(self, configured: float) -> float:
        """The peak that MFU refers to: configured, from the table, or one measured matrix product."""
        if configured:
            return configured
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            known = next((peak for key, peak in GPU_PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)
            if known:
                return known
        return self._measured_tflops

    @cached_property
    def _measured_tflops(self) -> float:
        return measure_matmul_tflops(self.device, self.autocast_dtype or self.param_dtype)


def pick_device(wanted: str) -> torch.device:
    """The device that `wanted` names, or the best there is for auto.

    Raises:
        ConfigError: the named device is not there.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if has[name])
    if not has[wanted]:
        there = ", ".join(name for name, is_there in has.items() if is_there)
        raise ConfigError(f"runtime.device = {wanted}: this machine has none; choose one of {there} or auto")
    return torch.device(wanted)


def pick_precision(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or pure_bf16; auto is bf16 on a GPU that has it, else fp32."""
    has_gpu_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if has_gpu_bf16 else "fp32"
    if wanted != "fp32" and device.type == "cuda" and not has_gpu_bf16:
        raise ConfigError(f"runtime.precision = {wanted}: this GPU has no bf16; use fp32")
    return wanted


def pick_kernels(wanted: str, device: torch.device) -> tuple[str, str]:
    """reference, grouped or triton, and the reason in words.

    Raises:
        ConfigError: triton without a CUDA device or without its package.
    """
    found = kernels_for(device.type)
    if wanted == "triton" and found != wanted:
        missing = "the package triton is not installed" if device.type == "cuda" else f"the device is {device.type}"
        raise ConfigError(
            f"runtime.kernels = triton: needs a CUDA device and triton, and {missing}; use grouped or auto"
        )
    if wanted != "auto":
        return wanted, "as set"
    if device.type != "cuda":
        return found, f"auto: the device is {device.type}"
    return found, "auto: CUDA and triton are there" if found == "triton" else "auto: the package triton is missing"


def set_up_process(config: DeviceConfig) -> None:
    """Threads as configured, else this process's share of the cores where torchrun would leave it with one thread.

    On Linux freed memory stays with the process: pages that go back come again zeroed, one by one, which was 7 % of
    the processor time of a step of llama_60m and 10 % at llama_350m.
    """
    num_threads = config.num_threads or num_own_threads()
    if num_threads:
        torch.set_num_threads(num_threads)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library other than glibc
            allocator = ctypes.CDLL("libc.so.6")
            allocator.mallopt(M_MMAP_THRESHOLD, 128 * 2**20)
            allocator.mallopt(M_TRIM_THRESHOLD, -1)  # never


def start_runtime(config: RuntimeConfig) -> Runtime:
    """Joins the process group if there is one and picks device and precision.

    Raises:
        ConfigError: runtime=single under a launcher of several processes, or a device or precision that is not there.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    name = config.name if config.name != "auto" else "ddp" if launched > 1 else "single"
    if config.name == "single" and launched > 1:
        raise ConfigError(f"runtime = single, but {launched} processes were launched: use runtime=ddp, fsdp2 or auto")
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    kernels, kernels_reason = pick_kernels(config.kernels, device)
    if device.type == "cpu":
        # accelerate looks at DeepSpeed while saving; told where it is, DeepSpeed does not warn about a missing GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    is_zero = name.startswith("zero")
    if is_zero:
        require_deepspeed(name, precision, device)
    if launched > 1 or name == "fsdp2" or is_zero:
        join_processes(device, launched, timedelta(seconds=config.timeout_seconds))
    if is_zero:
        accelerator = zero_accelerator(name, precision, device)
    else:
        # Autocast is ours (accelerate's would copy all logits to float32), so accelerate is told "no".
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=device.type == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    # After accelerate, which sets its own number on a CPU.
    set_up_process(config)
    checkpoint_group = None
    if launched > 1:
        checkpoint_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_seconds))
        assert isinstance(checkpoint_group, dist.ProcessGroup)
    return Runtime(accelerator, precision, name, checkpoint_group, kernels, kernels_reason)


def join_processes(device: torch.device, launched: int, timeout: timedelta) -> None:
    """The group of all launched processes, or of this one alone: gloo for tensors on the CPU, NCCL on GPUs."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Without a launcher there are no addresses to meet at.
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # pyright: ignore[reportPrivateImportUsage]
    place = alone if launched == 1 else fresh_meeting_point(timeout)
    dist.init_process_group(backend, timeout=timeout, **place)


def fresh_meeting_point(timeout: timedelta) -> dict[str, Any]:
    """Arguments of init_process_group under a launcher; empty: as the environment says.

    torchrun keeps one store for all its restarts (torch 2.13), where a process would find the address of a dead one and
    fail to connect. A prefix for each restart helps on one node; on several their counts of restarts differ, and there
    torchrun is told by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 to make a new store (docs/clusters.md).
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, index, count = next(rendezvous("env://", timeout=timeout))
    prefixed = dist.PrefixStore(f"restart_{restarts}", store)  # pyright: ignore[reportPrivateImportUsage]
    return {"store": prefixed, "rank": index, "world_size": count}


def measure_matmul_tflops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """TFLOP/s of square matrix products, the best of several: what MFU is relative to on an unlisted device."""
    # An own generator: measuring must not move the run's random state, which a resume restores.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
