"""Settings of the commands, typed, documented, with units and rules; those that use a finished model are in use.py.

A base section with subclasses (parameterization, data, optimizer, ...) is a choice: one YAML folder in configs/,
one subclass a choice, so that a key which the chosen one does not have is an error and never silently ignored.
"""

from dataclasses import dataclass
from typing import Literal

from lost.config.data import DataConfig
from lost.config.model import LostConfig, ModelConfig, ParameterizationConfig
from lost.config.runtime import (
    CheckpointConfig,
    DeviceConfig,
    LoggingConfig,
    RuntimeConfig,
    TrainEvaluationConfig,
)
from lost.config.section import CountOrFraction, CrossRule, Section, setting
from lost.config.training import OptimizerConfig, ScheduleConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Section):
    """Everything of `lost pretrain`; also read by `lost prepare`."""

    experiment: str = setting("name of the experiment, used in run_dir", "custom")
    model: ModelConfig = setting("architecture")
    parameterization: ParameterizationConfig = setting("form of the linear layers")
    data: DataConfig = setting("documents and rows")
    train: TrainConfig = setting("length and batch")
    optimizer: OptimizerConfig = setting("optimizer")
    schedule: ScheduleConfig = setting("learning rate over the steps")
    runtime: RuntimeConfig = setting("processes, device, precision")
    checkpoint: CheckpointConfig = setting("saving and resuming")
    evaluation: TrainEvaluationConfig = setting("validation")
    logging: LoggingConfig = setting("wandb and metrics")
    seed: int = setting("seed of initial weights and row order", 0, at_least=0, is_fixed_on_resume=True)
    source: str = setting(
        "go on from the weights of an export, a run directory or a hub id, with a fresh optimizer; empty: from init",
        "",
        is_fixed_on_resume=True,
    )
    run_dir: str = setting("folder of everything this run writes")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """Everything of `lost plan`: a run of `lost pretrain`, and the device that it should fit on."""

    device_memory_gib: float = setting(
        "memory of one device; with it the table says which sizes fit; 0 = unknown", 0.0, at_least=0, unit="GiB"
    )
    num_devices: int = setting("devices of the run; above 1 the plan compares the runtimes on them", 1, at_least=1)

    def cross_rules(self) -> list[CrossRule]:
        return [*super().cross_rules(), ("num_devices", self._device_problems)]

    def _device_problems(self) -> list[str]:
        if self.num_devices == 1 or self.num_devices % self.runtime.replicas == 0:
            return []
        return [
            f"num_devices = {self.num_devices} is not divisible by runtime.replicas = {self.runtime.replicas}:"
            " choose a divisor"
        ]


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Section):
    """Everything of `lost bench`: times and memory, all arms interleaved in one run."""

    model: ModelConfig = setting("architecture; what=layer has its own sizes")
    parameterization: LostConfig = setting("the LOST arm")
    runtime: DeviceConfig = setting("device and precision")
    what: Literal["layer", "block", "step", "memory", "loop", "checkpoint", "generate"] = setting(
        "layer: one linear layer; block: one block of a model; step: forward, backward and update of a model; memory:"
        " the peak of a step at every level of recomputation; loop: what the training loop adds; checkpoint: saving and"
        " resuming; generate: decoding with a KV cache",
        "layer",
    )
    arms: list[str] = setting("arms of layer, block, step and memory, besides the first; empty: the usual ones", [])
    compiled: bool = setting("layer, block, step: every arm also through torch.compile", False)
    recompute: Literal["none", "p0", "p1", "p2", "p3", "block"] = setting(
        "what=step: what dense and LOST make again in the backward pass", "p1"
    )
    in_features: int = setting("input width of what=layer", 1024, at_least=1)
    out_features: int = setting("output width of what=layer", 1024, at_least=1)
    lost_rank: CountOrFraction = setting("rank of what=layer; what=step takes parameterization.lost_rank", 256)
    num_tokens: int = setting("tokens of one call", 2048, at_least=1, unit="tokens")
    seq_len: int = setting(
        "row length of what=block, step, memory, loop and checkpoint; prompt of generate",
        256,
        at_least=2,
        unit="tokens",
    )
    new_tokens: int = setting("tokens that a call of what=generate decodes", 16, at_least=1, unit="tokens")
    num_prompts: int = setting("sequences of what=generate, seq_len tokens long before", 1, at_least=1)
    repeats: int = setting("timed rounds; every round runs each arm once", 15, at_least=3)
    to: str = setting("folder of the JSON result; empty: print only", "")
