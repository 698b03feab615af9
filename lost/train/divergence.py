"""Steps that would harm the weights: which ones are skipped, and what is said when there are too many in a row."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

# Losses of good steps that a new one is compared with, and how many there must be: at the start they fall fast.
WINDOW_STEPS = 50
MIN_STEPS = 10


@dataclass(frozen=True)
class StepFacts:
    """What a diagnosis shows of one step.

    Attributes:
        fault: why it was skipped; empty: it was not.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    fault: str


def loss_limit(recent_losses: Sequence[float], spike_factor: float) -> float:
    """`spike_factor` times the median of the last good losses: a higher one is a spike; infinite where it is off (0)
    or while there are too few losses."""
    if not spike_factor or len(recent_losses) < MIN_STEPS:
        return math.inf
    return spike_factor * statistics.median(recent_losses)


def fault_of(loss: float, grad_norm: float, limit: float) -> str:
    """Why an update with these numbers is left out; empty: it is not."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "not finite"
    return f"loss above {limit:.4g}" if loss > limit else ""


def merged(ranges: Iterable[Sequence[int]]) -> list[list[int]]:
    """The same whole numbers as ranges [first, last] in order that neither overlap nor touch."""
    result: list[list[int]] = []
    for first, last in sorted(list(pair) for pair in ranges):
        if result and first <= result[-1][1] + 1:
            result[-1][1] = max(result[-1][1], last)
        else:
            result.append([first, last])
    return result


def data_step(step: int, left_out: Iterable[Sequence[int]]) -> int:
    """Whose rows, in the order of an undisturbed run, step `step` reads: the step-th that is not left out.

    Args:
        left_out: steps of the undisturbed order as `merged` ranges.
    """
    for first, last in left_out:
        if step < first:
            break
        step += last - first + 1
    return step


def diagnosis(steps: Sequence[StepFacts], num_bad: int, limit: int) -> str:
    """Many words about a run that does not recover by itself."""
    head = "  step        loss   grad norm  learning rate"
    lines = [
        f"  {s.step:>4}  {s.loss:>10.4g}  {s.grad_norm:>10.4g}  {s.learning_rate:>13.3g}  {s.fault}" for s in steps
    ]
    return (
        f"step {steps[-1].step}: {num_bad} steps in a row were skipped (train.max_skipped_steps = {limit}),"
        f" and the weights are as they were before them\n{head}\n" + "\n".join(line.rstrip() for line in lines)
    )


def advice(steps: Sequence[StepFacts], learning_rate: float, precision: str) -> str:
    """What to try first, from the last good steps before the bad ones."""
    good = [facts for facts in steps if not facts.fault]
    tips = []
    if len(good) >= 2 and good[-1].loss > 1.2 * min(facts.loss for facts in good):
        tips.append(f"the loss rose before: lower optimizer.learning_rate = {learning_rate:g} or warm up longer")
    elif good:
        tips.append("the loss was falling before, which speaks for bad rows: look at them")
    else:
        tips.append(f"no good step is known: lower optimizer.learning_rate = {learning_rate:g} or warm up longer")
    if precision != "fp32":
        tips.append("try runtime.precision=fp32")
    return "; ".join(tips)


def as_json(facts: StepFacts) -> dict[str, float | int | str | None]:
    """Plain values; numbers that are not finite become null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(facts).items()}
