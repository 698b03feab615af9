"""The training loop: `fit` is the run, `train_step` one update. Everything they call does one thing."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lost.config.runtime import CheckpointConfig, LoggingConfig
from lost.config.training import OptimizerConfig, ScheduleConfig, TrainConfig
from lost.train.divergence import StepFacts, diagnosis, fault_of, loss_limit
from lost.train.engine import Engine
from lost.train.metrics import MetricsLogger, Progress
from lost.train.objective import Batch, NextToken, Objective
from lost.train.profile import StepProfiler
from lost.train.runtime import Runtime
from lost.train.schedule import learning_rate_at
from lost.train.selection import Selection
from lost.train.state import TrainState
from lost.train.stop import StopRequest
from lost.utils.errors import TrainingError
from lost.utils.memory import peak_memory_gib

Evaluate = Callable[[], dict[str, float | int | str]]
# Saves everything of the run at this state; called on every process.
SaveCheckpoint = Callable[[TrainState], None]
# Puts the run back before its bad steps, or raises TrainingError; called on every process.
GoBack = Callable[[TrainState], None]
# Steps that a diagnosis shows.
NUM_STEPS_KEPT = 20


class EverySteps(Protocol):
    """Settings of evaluation, as far as the loop reads them."""

    @property
    def every_steps(self) -> int: ...


class RunSettings(Protocol):
    """The sections that the loop reads; those of pre-training and of fine-tuning have them."""

    @property
    def train(self) -> TrainConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def evaluation(self) -> EverySteps: ...
    @property
    def logging(self) -> LoggingConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def run_dir(self) -> str: ...


@dataclass
class Run:
    """All parts of a training run, built by `lost.assemble`.

    Attributes:
        engine: the model as its runtime wraps it, with its optimizer.
        batches: for each step from state.step + 1 on, this process's micro-batches.
        flops_per_token: forward and backward, for MFU.
        peak_flops: of one device, FLOP/s.
        objective: what the model is trained for.
        selection: which evaluation counts as the best and when the run ends for want of a better one; None: neither.
        last_steps: what the last steps of this process came to, for a diagnosis.
    """

    config: RunSettings
    runtime: Runtime
    engine: Engine
    batches: Iterator[list[Batch]]
    metrics: MetricsLogger
    progress: Progress
    stop: StopRequest
    profiler: StepProfiler
    flops_per_token: float
    peak_flops: float
    objective: Objective = field(default_factory=NextToken)
    selection: Selection | None = None
    last_steps: deque[StepFacts] = field(default_factory=lambda: deque(maxlen=NUM_STEPS_KEPT))


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every process.

    Attributes:
        loss: mean loss of the labels of the global batch (tokens, or rows that are classified) before the update.
        grad_norm: global L2 norm before clipping.
        num_tokens: tokens of the global batch, as the objective counts them.
        fault: why the update was left out; empty: it was not.
        should_stop: some process was asked to stop.
        seconds: wall-clock of this process, waiting for data included.
        group_norms: of weights and gradients, where they were due.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    fault: str
    should_stop: bool
    seconds: float
    group_norms: dict[str, float]

    @property
    def is_skipped(self) -> bool:
        return bool(self.fault)


def fit(
    run: Run,
    state: TrainState,
    *,
    evaluate: Evaluate,
    save: SaveCheckpoint,
    save_final: Callable[[], None],
    go_back: GoBack | None = None,
) -> bool:
    """Trains from `state` to the last step, or to where run.selection ends it, evaluating and saving on the way.

    Returns:
        True when that step was reached; False when the run was asked to stop before: the state is saved then.
    Raises:
        TrainingError: too many skipped steps in a row, or no other ones, and no `go_back` or none that it can do.
    """
    num_steps = run.config.train.num_steps
    if state.step == 0 or state.owes_evaluation:
        log_evaluation(run, state, evaluate)
        state.owes_evaluation = False
    with run.progress, run.profiler:
        while state.step < num_steps and not is_over(run, state):
            state.step += 1
            result = train_step(run, state.step, loss_limit(state.recent_losses, run.config.train.loss_spike_factor))
            state.record(result.num_tokens, result.loss, result.is_skipped)
            report(run, state, result)
            run.profiler.step()
            if state.skipped_in_a_row >= min(run.config.train.max_skipped_steps, num_steps):
                if go_back is None:
                    raise TrainingError(diagnosis_of(run, state))
                go_back(state)
                continue
            is_last = state.step == num_steps
            should_stop = result.should_stop and not is_last
            is_evaluation_due = is_last or is_due(state.step, run.config.evaluation.every_steps)
            # Little time is left after a request to stop: the run evaluates when it goes on.
            state.owes_evaluation = is_evaluation_due and should_stop
            is_best = is_evaluation_due and not should_stop and log_evaluation(run, state, evaluate)
            is_last = is_last or is_over(run, state)
            # Skipped steps leave the weights as they were: the checkpoint before them is kept, to go back to.
            is_save_due = is_due(state.step, run.config.checkpoint.every_steps) and not state.skipped_in_a_row
            if is_last or should_stop or is_save_due or is_best:
                save(state)
            if should_stop:
                return False
    save_final()
    return True


def train_step(run: Run, step: int, max_loss: float = math.inf) -> StepResult:
    """One optimizer step on the global batch; the update is left out where the loss or gradient is not finite, or the
    loss above `max_loss`.

    The loss is the sum of the losses of all labels over their global count in the whole step, across
    micro-batches and processes: not a mean of means. DDP averages gradients, hence the factor num_processes.
    """
    started = time.perf_counter()
    learning_rate = learning_rate_at(
        step, run.config.optimizer.learning_rate, run.config.schedule, run.config.train.num_steps
    )
    run.engine.set_learning_rate(learning_rate)
    micro_batches = next(run.batches)
    num_labels, num_tokens, num_stop_requests = count_over_processes(run, micro_batches)
    gradient_scale = run.runtime.num_processes / max(1, num_labels)
    loss_sum = torch.zeros((), device=run.runtime.device)

    for micro_step, batch in enumerate(micro_batches, start=1):
        with run.engine.accumulating(is_last=micro_step == len(micro_batches)):
            micro_loss_sum = forward_loss_sum(run, batch)
            run.engine.backward(micro_loss_sum * gradient_scale)
        loss_sum += micro_loss_sum.detach()

    loss = (run.runtime.sum_over_processes(loss_sum) / max(1, num_labels)).item()
    norms = run.engine.group_norms() if is_due(step, run.config.logging.group_norms_every_steps) else {}
    grad_norm = run.engine.clip_gradients(run.config.train.max_grad_norm)
    # Both numbers are of the whole group, so that every process skips or none does.
    fault = fault_of(loss, grad_norm, max_loss)
    if not fault:
        run.engine.step()
    run.engine.zero_grad()
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=num_tokens,
        fault=fault,
        should_stop=num_stop_requests > 0,
        seconds=time.perf_counter() - started,
        group_norms=norms,
    )


def forward_loss_sum(run: Run, batch: Batch) -> torch.Tensor:
    """Sum of the losses of one micro-batch, []."""
    device = run.runtime.device
    inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    labels = inputs.pop("labels")
    with run.runtime.autocast():
        return run.objective.loss_sum(run.engine.wrapped, run.engine.model, inputs, labels)


def count_over_processes(run: Run, micro_batches: list[Batch]) -> tuple[int, int, int]:
    """(labels and tokens of the global batch, processes asked to stop), in one reduction."""
    num_labels = sum(run.objective.num_labels(batch) for batch in micro_batches)
    num_tokens = sum(run.objective.num_tokens(batch) for batch in micro_batches)
    own = [num_labels, num_tokens, int(run.stop.is_requested), int(run.stop.is_by_signal)]
    counts = torch.tensor(own, device=run.runtime.device)
    *totals, num_stop_requests, run.stop.num_signalled = run.runtime.sum_over_processes(counts).tolist()
    return totals[0], totals[1], num_stop_requests


def log_evaluation(run: Run, state: TrainState, evaluate: Evaluate) -> bool:
    """Evaluates and writes the line; whether it is the best one so far of a run that keeps it.

    That of step 0 does not count: it is what training must better. Nor does one after a skipped step, whose weights
    are those of a step before.
    """
    line = evaluate()
    run.metrics.log({"step": state.step, **line})
    if run.selection is None or state.step == 0 or state.skipped_in_a_row:
        return False
    return run.selection.record(state, line) and run.selection.is_best_kept


def is_over(run: Run, state: TrainState) -> bool:
    return run.selection is not None and run.selection.is_over(state)


def is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def report(run: Run, state: TrainState, result: StepResult) -> None:
    """The training line of metrics.jsonl, the progress bar, and what a diagnosis may need."""
    run.last_steps.append(StepFacts(state.step, result.loss, result.grad_norm, result.learning_rate, result.fault))
    tokens_per_second = result.num_tokens / result.seconds
    flops = run.flops_per_token * tokens_per_second
    line = {
        "step": state.step,
        # Null where loss or gradient are not finite; of a spike the loss is worth seeing.
        "loss": result.loss if math.isfinite(result.grad_norm) else None,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_seen": state.tokens_seen,
        "skipped_steps": state.skipped_steps,
        **result.group_norms,
        "tokens_per_second": tokens_per_second,
        "mfu": flops / (run.peak_flops * run.runtime.num_processes),
        "step_seconds": result.seconds,
        "peak_memory_gib": peak_memory_gib(),
    }
    is_last = state.step == run.config.train.num_steps
    if is_due(state.step, run.config.logging.every_steps) or result.is_skipped or is_last:
        run.metrics.log(line)
    run.progress.update(line)


def diagnosis_of(run: Run, state: TrainState) -> str:
    return diagnosis(list(run.last_steps), state.skipped_in_a_row, run.config.train.max_skipped_steps)
