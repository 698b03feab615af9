"""Learning rate as a function of the step: warm-up from step 1, then the shape that the config names."""

import math

from lost.config.section import CountOrFraction
from lost.config.training import CosineScheduleConfig, LinearScheduleConfig, ScheduleConfig, WsdScheduleConfig


def resolve_steps(value: CountOrFraction, num_steps: int) -> int:
    """A count as it is, a fraction as that part of the run."""
    return value if isinstance(value, int) else round(value * num_steps)


def learning_rate_at(step: int, peak: float, schedule: ScheduleConfig, num_steps: int) -> float:
    """The learning rate of optimizer step `step`.

    Args:
        step: 1 for the first update, `num_steps` for the last.
        peak: learning rate reached at the end of the warm-up.
        num_steps: optimizer steps of the whole run.
    Returns:
        peak * step / warmup_steps during the warm-up (never 0, unlike the papers' code), the floor at num_steps.
    """
    warmup_steps = resolve_steps(schedule.warmup_steps, num_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if isinstance(schedule, CosineScheduleConfig):
        progress = _progress(step, warmup_steps, num_steps)
        return _between(schedule.final_fraction, 0.5 * (1 + math.cos(math.pi * progress)), peak)
    if isinstance(schedule, LinearScheduleConfig):
        return _between(schedule.final_fraction, 1 - _progress(step, warmup_steps, num_steps), peak)
    if isinstance(schedule, WsdScheduleConfig):
        decay_start = max(warmup_steps, num_steps - resolve_steps(schedule.decay_steps, num_steps))
        remaining = 1 - _progress(step, decay_start, num_steps) if step > decay_start else 1.0
        return _between(schedule.final_fraction, remaining, peak)
    return peak


def _progress(step: int, start: int, end: int) -> float:
    """0 at `start`, 1 at `end` and after."""
    return min(1.0, (step - start) / max(1, end - start))


def _between(floor: float, weight: float, peak: float) -> float:
    return peak * (floor + (1 - floor) * weight)
