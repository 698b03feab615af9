"""Settings of processes and device, and of what a run does beside its steps: saving, validation, logging."""

from dataclasses import dataclass
from typing import Literal

from lost.config.section import Section, setting


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """Where tensors live and in what precision they are multiplied."""

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto: cuda, then mps, then cpu", "auto")
    precision: Literal["auto", "fp32", "bf16", "pure_bf16"] = setting(
        "bf16: autocast over fp32 weights; pure_bf16: weights, gradients and optimizer in bf16;"
        " auto: bf16 on a GPU that has it, else fp32",
        "auto",
    )
    num_threads: int = setting(
        "CPU threads a process; 0: torch's choice, but where torchrun has set OMP_NUM_THREADS=1 by itself the node's"
        " cores divided by its processes",
        0,
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(DeviceConfig):
    """Processes, device, precision and how the model is wrapped for training."""

    name: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = setting(
        "auto: ddp when several processes were launched, else single; fsdp2: parameters, gradients and optimizer state"
        " in shards over the processes; with DeepSpeed, zero1: optimizer state in shards, zero2: gradients too, zero3:"
        " parameters too",
        "auto",
    )
    replicas: int = setting("fsdp2: groups of processes that each hold all shards (hybrid sharding)", 1, at_least=1)
    timeout_seconds: int = setting(
        "how long processes wait for each other before they stop with an error", 1800, at_least=1, unit="s"
    )
    compile: bool = setting("torch.compile every block", False)
    kernels: Literal["auto", "reference", "grouped", "triton"] = setting(
        "how LOST layers are computed: reference: autograd of the definition; grouped: operators with a hand-written"
        " backward pass, layers that read one input together; triton: the same with Triton kernels, on CUDA;"
        " auto: triton on CUDA, else grouped (selection_axis = rows: always the reference)",
        "auto",
    )
    recompute: Literal["none", "p0", "p1", "p2", "p3", "block"] = setting(
        "what the backward pass makes again to save memory, from the least to the most: none; p0: inside of norms and"
        " SwiGLU; p1: everything between the matrix products; p2: also gate and up; p3: also q, k, v and attention, so"
        " that low-rank activations and residuals are kept; block: whole blocks",
        "p1",
    )
    profile_steps: int = setting(
        "steps traced with torch's profiler into run_dir/profile, after three steps; 0 = none",
        0,
        at_least=0,
        unit="steps",
    )
    peak_tflops: float = setting(
        "the device's peak for MFU; 0: from a table of GPUs, else measured by one matrix product",
        0.0,
        at_least=0,
        unit="TFLOP/s",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When to save, what to keep, where to go on."""

    every_steps: int = setting("save every so many steps (and at the end); 0: only at the end", 100, at_least=0)
    keep: int = setting("newest checkpoints kept", 2, at_least=1)
    background: bool = setting(
        "training goes on while a checkpoint is written; needs memory for a copy of weights and optimizer state", True
    )
    resume: str = setting(
        "auto: from the newest complete checkpoint of run_dir if there is one; never; must; or a checkpoint's path",
        "auto",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Validation loss and perplexity."""

    max_tokens: int = setting("tokens of each validation set; 0: the whole set", 0, at_least=0, unit="tokens")
    micro_batch_size: int = setting("rows per device per forward", 16, at_least=1, unit="rows")


@dataclass(frozen=True, kw_only=True)
class TrainEvaluationConfig(EvaluationConfig):
    """Validation during training."""

    every_steps: int = setting(
        "evaluate every so many steps, and before and after; 0: only before and after", 100, at_least=0, unit="steps"
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """metrics.jsonl is always written; wandb as `name` says."""

    name: Literal["offline", "wandb", "none"] = setting(
        "offline: wandb files in run_dir, no network; wandb: online; none: no wandb", "offline"
    )
    every_steps: int = setting("steps between training lines", 1, at_least=1, unit="steps")
    project: str = setting("wandb project", "lost")
    group_norms_every_steps: int = setting(
        "steps between weight and gradient norms per parameter group; 0 = never", 50, at_least=0, unit="steps"
    )
