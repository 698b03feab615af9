"""Settings of length, batch, optimizer and learning rate."""

from dataclasses import dataclass
from typing import Literal

from lost.config.section import CountOrFraction, CrossRule, Section, count_or_fraction_problem, setting


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How long and on how much at a time."""

    seq_len: int = setting("length of a training row", 256, at_least=2, unit="tokens", is_fixed_on_resume=True)
    global_batch_size: int = setting(
        "rows per optimizer step over all devices", 16, at_least=1, unit="rows", is_fixed_on_resume=True
    )
    micro_batch_size: int = setting("rows per device per forward", 8, at_least=1, unit="rows")
    max_steps: int = setting("optimizer steps; 0: given by max_tokens", 0, at_least=0, unit="steps")
    max_tokens: int = setting(
        "tokens (rows x seq_len) to train on; 0: given by max_steps; with both the earlier ends the run",
        0,
        at_least=0,
        unit="tokens",
    )
    max_grad_norm: float = setting("global gradient norm is clipped to this; 0 = off", 1.0, at_least=0)
    max_hours: float = setting("wall-clock limit: save and stop after it; 0 = none", 0.0, at_least=0, unit="hours")
    max_skipped_steps: int = setting(
        "after this many skipped steps in a row the run has diverged", 10, at_least=1, unit="steps"
    )
    loss_spike_factor: float = setting(
        "a loss above so many times the median of the last 50 good ones is skipped, as one that is not finite always"
        " is; 0 = off",
        0.0,
        at_least=0,
    )
    on_divergence: Literal["stop", "rollback"] = setting(
        "stop with a diagnosis, or go back to the last checkpoint before and leave the rows of the skipped steps out",
        "stop",
    )
    max_rollbacks: int = setting("a run that has gone back so often stops", 3, at_least=1)

    def cross_rules(self) -> list[CrossRule]:
        # A micro-batch can be changed more freely than a batch, so that it is the one to blame.
        return [
            ("max_steps", self._length_problems),
            ("micro_batch_size", self._batch_problems),
            ("loss_spike_factor", self._spike_problems),
        ]

    def _spike_problems(self) -> list[str]:
        if self.loss_spike_factor == 0 or self.loss_spike_factor > 1:
            return []
        return [
            f"loss_spike_factor = {self.loss_spike_factor:g} would skip losses below the median of the last ones: give"
            " a number above 1, for instance train.loss_spike_factor=2, or 0 for off"
        ]

    def _length_problems(self) -> list[str]:
        if self.max_steps or self.max_tokens:
            return []
        return ["max_steps = 0 and max_tokens = 0: set one of them, for instance train.max_steps=200"]

    def _batch_problems(self) -> list[str]:
        if self.global_batch_size % self.micro_batch_size == 0:
            return []
        return [
            f"global_batch_size = {self.global_batch_size} is not divisible by"
            f" micro_batch_size = {self.micro_batch_size}: choose a divisor"
        ]

    @property
    def global_batch_tokens(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, from max_steps and max_tokens."""
        by_tokens = -(-self.max_tokens // self.global_batch_tokens) if self.max_tokens else 0
        return min(limit for limit in (self.max_steps, by_tokens) if limit > 0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """What turns gradients into updates."""

    learning_rate: float = setting("peak learning rate", 3e-3, at_least=0)
    weight_decay: float = setting("decoupled decay of the matrices (norms and biases have none)", 0.01, at_least=0)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """torch.optim.AdamW, fused where the device has it."""

    name: Literal["adamw"] = setting("AdamW", "adamw", is_fixed_on_resume=True)
    beta1: float = setting("decay of the first moment", 0.9, at_least=0, below=1)
    beta2: float = setting("decay of the second moment", 0.999, at_least=0, below=1)
    epsilon: float = setting("added to the root of the second moment", 1e-8, above=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up from step 1, then what `name` says."""

    warmup_steps: CountOrFraction = setting("linear warm-up; a fraction is of the whole run", 0.1, unit="steps")

    def cross_rules(self) -> list[CrossRule]:
        return [("warmup_steps", self._warmup_problems)]

    def _warmup_problems(self) -> list[str]:
        if isinstance(self.warmup_steps, float) and self.warmup_steps == 0:
            return []
        return count_or_fraction_problem("warmup_steps", self.warmup_steps, "the run's steps", minimum=0)


@dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig(ScheduleConfig):
    """Half a cosine from the peak to final_fraction of it, reached at the last step."""

    name: Literal["cosine"] = setting("half a cosine", "cosine")
    final_fraction: float = setting("learning rate at the last step over the peak", 0.1, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class LinearScheduleConfig(ScheduleConfig):
    """A straight line from the peak to final_fraction of it, reached at the last step."""

    name: Literal["linear"] = setting("a straight line", "linear")
    final_fraction: float = setting("learning rate at the last step over the peak", 0.1, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class WsdScheduleConfig(ScheduleConfig):
    """Warm-up, stable at the peak, then a straight line down over the last decay_steps."""

    name: Literal["wsd"] = setting("warm-up, stable, decay", "wsd")
    decay_steps: CountOrFraction = setting("length of the decay; a fraction is of the whole run", 0.2, unit="steps")
    final_fraction: float = setting("learning rate at the last step over the peak", 0.0, at_least=0, at_most=1)

    def cross_rules(self) -> list[CrossRule]:
        def decay_problems() -> list[str]:
            return count_or_fraction_problem("decay_steps", self.decay_steps, "the run's steps")

        return [*super().cross_rules(), ("decay_steps", decay_problems)]


@dataclass(frozen=True, kw_only=True)
class ConstantScheduleConfig(ScheduleConfig):
    """The peak for ever after the warm-up."""

    name: Literal["constant"] = setting("the peak for ever", "constant")
