"""DeepSpeed as accelerate starts it, and its settings."""

import logging
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils.dataclasses import KwargsHandler

from lost.utils.errors import ConfigError

# Elements exchanged at once; DeepSpeed holds a buffer of so many: 0.2 GB in float32.
BUCKET_SIZE = 50_000_000
# zero3 keeps parameters of fewer elements whole on every process: DeepSpeed's own default.
WHOLE_BELOW = 100_000


def require_deepspeed(name: str, precision: str, device: torch.device) -> None:
    """Raises ConfigError where DeepSpeed is not installed, or does not work with the device or precision."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"runtime = {name} needs DeepSpeed, which is not installed: pip install deepspeed, or use runtime=fsdp2,"
            " which shards with PyTorch alone"
        )
    if precision == "pure_bf16":
        raise ConfigError(f"runtime.precision = pure_bf16 with runtime={name}: use runtime.precision=bf16")
    if device.type != ("cuda" if torch.cuda.is_available() else "cpu"):
        raise ConfigError(
            f"runtime = {name} on {device.type}: DeepSpeed takes the GPU of a machine that has one, else the CPU; use"
            " runtime=fsdp2"
        )


def zero_accelerator(name: str, precision: str, device: torch.device) -> Accelerator:
    """An Accelerator whose engine is DeepSpeed, for the runtimes zero1, zero2 and zero3 in a group of processes."""
    # Where no launcher says which device is this process's.
    os.environ.setdefault("LOCAL_RANK", "0")
    prepare_deepspeed()
    plugin = DeepSpeedPlugin(hf_ds_config=settings(int(name[-1]), precision), zero3_init_flag=False)
    # On a CPU accelerate finds no backend by itself, and every process would take itself for the only one.
    backend: list[KwargsHandler] = [InitProcessGroupKwargs(backend="gloo")] if device.type == "cpu" else []
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=backend)
    forget_in_transformers()
    return accelerator


def prepare_deepspeed() -> None:
    """Without this, DeepSpeed compiles a C++ extension for the CPU, for minutes, and warns of what we report."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that PyTorch 2.13 has replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def forget_in_transformers() -> None:
    """transformers, told of DeepSpeed by accelerate, would let `generate` wait for processes that do not call it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def settings(stage: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Accumulating, clipping, skipping and the learning rate are the training loop's."""
    return {
        # DeepSpeed would only count with them.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # Gradients are added up and exchanged in float32 also where weights are bfloat16.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_SIZE,
            "allgather_bucket_size": BUCKET_SIZE,
            "stage3_param_persistence_threshold": WHOLE_BELOW,
        },
    }
