"""Carries out a run, whatever it trains: what pre-training and fine-tuning share around the training loop."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import yaml
from torch import nn

from lost.assemble.resume import RunConfig, check_checkpoint, find_checkpoint, log_changes, restore
from lost.assemble.rollback import go_back_with
from lost.assemble.validation import EvaluationLine
from lost.checkpoint import (
    CheckpointManager,
    read_status,
    truncate_metrics,
    write_json_atomically,
    write_status,
    write_text_atomically,
)
from lost.checkpoint.run_dir import RunState
from lost.config.section import to_dict
from lost.data import Batch, Prepared, train_batches
from lost.train.divergence import data_step
from lost.train.engine import build_engine, trained_names
from lost.train.metrics import MetricsLogger, Progress
from lost.train.objective import NextToken, Objective
from lost.train.profile import StepProfiler
from lost.train.runtime import Runtime
from lost.train.selection import Selection
from lost.train.state import TrainState, snapshot
from lost.train.stop import StopRequest
from lost.train.trainer import Run, fit
from lost.train.watch import Watch
from lost.utils.errors import LostError, LostProcessError, TrainingError
from lost.utils.logging import get_logger
from lost.utils.versions import versions

log = get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Job:
    """What a run trains, on what, and what it does with the result.

    Attributes:
        config: its settings.
        prepared: the rows to train on, what identifies them, and the tokenizer.
        title: of pictures.
        flops_per_token: (model): of forward and backward, for MFU; the model before the runtime wraps it.
        make_model: (checkpoint): the model before the runtime wraps it; on the meta device if `fill` gives it memory.
        fill: (model, checkpoint): memory, if it has none, and the weights of a checkpoint, or with None of step 0.
        evaluate: the eval/ fields of metrics.jsonl; called on every process.
        save_final: writes what the run is for, once it is done; called on every process.
        print_start, print_summary: what a person reads before and after.
    """

    config: RunConfig
    prepared: Prepared
    title: str
    flops_per_token: Callable[[nn.Module], float]
    make_model: Callable[[Path | None], nn.Module]
    fill: Callable[[nn.Module, Path | None], None]
    evaluate: Callable[[Run], EvaluationLine]
    save_final: Callable[[Run, TrainState, CheckpointManager], None]
    print_start: Callable[[TrainState], None]
    print_summary: Callable[[], None]
    objective: Objective = NextToken()
    selection: Selection | None = None


def carry_out(config: RunConfig, make_job: Callable[[], Job], runtime: Runtime, stack: ExitStack) -> int:
    """Trains until the run is finished or asked to stop.

    Args:
        make_job: called once it is clear that run_dir can be gone on with or begun.
        stack: closed by the caller when this has returned or raised.
    Returns:
        0: finished, or stopped by train.max_hours; 1: stopped by a signal (status.json says preempted).
    Raises:
        LostError: a mistake found before training.
        TrainingError: a failure after that (status.json says failed).
    """
    run_dir = Path(config.run_dir)
    manager = CheckpointManager(run_dir / "checkpoints", config.checkpoint.keep, runtime.checkpoint_group)
    checkpoint = find_checkpoint(config, manager, runtime)
    job = make_job()
    prepared = job.prepared
    facts = check_checkpoint(checkpoint, config, prepared, runtime) if checkpoint else {}
    model = job.make_model(checkpoint)
    flops_per_token = job.flops_per_token(model)
    engine = build_engine(model, config.runtime, config.optimizer, runtime, lambda net: job.fill(net, checkpoint))
    state = restore(checkpoint, facts, engine, runtime) if checkpoint else TrainState()
    with status_of_failures(run_dir, runtime, state), watching(config, runtime, state) as watch:
        if runtime.is_main:
            if checkpoint:
                log_changes(checkpoint, facts, config)
            open_run_dir(config, prepared, manager, state, is_resumed=checkpoint is not None)
            job.print_start(state)
        runtime.accelerator.wait_for_everyone()
        metrics = MetricsLogger(run_dir, config.logging, runtime.is_main, to_dict(config))
        stack.callback(metrics.close)
        batches = batches_of(config, prepared, runtime, state)
        stack.callback(lambda: end_batches(run))
        run = Run(
            config=config,
            runtime=runtime,
            engine=engine,
            batches=batches,
            metrics=metrics,
            progress=Progress(config.train.num_steps, state.step, is_main=runtime.is_main),
            stop=stack.enter_context(StopRequest(config.train.max_hours, runtime.is_main)),
            profiler=StepProfiler(config.runtime.profile_steps, run_dir / "profile", runtime.process_index),
            flops_per_token=flops_per_token,
            peak_flops=runtime.peak_tflops(config.runtime.peak_tflops) * 1e12,
            objective=job.objective,
            selection=job.selection,
        )
        reached_the_end = train(job, run, state, manager, watch)
    return close_run(job, run, state, reached_the_end)


def train(job: Job, run: Run, state: TrainState, manager: CheckpointManager, watch: Watch | None) -> bool:
    """fit() with its callables; failures from here on are no mistakes of the settings."""

    def evaluate() -> EvaluationLine:
        if watch:
            watch.touch()
        return job.evaluate(run)

    def restart_batches(state: TrainState) -> None:
        end_batches(run)
        run.batches = batches_of(job.config, job.prepared, run.runtime, state)

    try:
        reached_the_end = fit(
            run,
            state,
            evaluate=evaluate,
            save=save_with(job, run, manager),
            save_final=lambda: job.save_final(run, state, manager),
            go_back=go_back_with(run, job.prepared, manager, restart_batches),
        )
        manager.finish()
    except Exception as error:
        # Its files are gone or whole then: on a full disk there is room again to say why the run ended.
        manager.settle()
        if isinstance(error, LostError):
            raise TrainingError(str(error)) from error
        raise
    return reached_the_end


@contextmanager
def watching(config: RunConfig, runtime: Runtime, state: TrainState) -> Iterator[Watch | None]:
    """Names the silent process where the others wait for it in vain; nothing for a process alone."""
    if runtime.num_processes == 1:
        yield None
        return

    def on_stuck(message: str) -> None:
        log.error("%s", message)
        # After its time-out NCCL ends the process without a word to Python.
        if runtime.device.type == "cuda":
            write_status(config.run_dir, "failed", state.step, message)

    with Watch(state, runtime.process_index, config.runtime.timeout_seconds, on_stuck) as watch, watch.naming():
        yield watch


def save_with(job: Job, run: Run, manager: CheckpointManager) -> Callable[[TrainState], None]:
    """The function that saves everything a resume needs; called on every process."""
    save_to = manager.save_in_background if run.config.checkpoint.background else manager.save

    def save(state: TrainState) -> None:
        tensors, facts = snapshot(run.engine, state, run.runtime)
        facts |= {
            "config": to_dict(job.config),
            "precision": run.runtime.precision,
            "data_fingerprint": job.prepared.fingerprint,
        }
        if run.runtime.is_main:
            run.metrics.sync()
            write_status(run.config.run_dir, "running", state.step)
        save_to(state.step, tensors, facts, also_keep=best_kept(run, state))

    return save


def best_kept(run: Run, state: TrainState) -> int | None:
    """Step of the best checkpoint of a run that keeps it."""
    return state.best_step or None if run.selection and run.selection.is_best_kept else None


def whole_model(run: Run, make_model: Callable[[], Model]) -> Model | None:
    """The trained model as one process has it that trains alone; None on every process but the first.

    Args:
        make_model: the model, of which nothing but what is not trained needs its values.
    """
    if run.runtime.name in ("single", "ddp"):
        return cast(Model, run.engine.model) if run.runtime.is_main else None
    weights = run.engine.whole_tensors()
    if not run.runtime.is_main:
        return None
    whole = make_model()
    keys = whole.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys and not trained_names(whole) & set(keys.missing_keys), keys  # noqa: PT018
    return whole


def close_run(job: Job, run: Run, state: TrainState, reached_the_end: bool) -> int:
    """status.json first, because a stopped run may be killed soon; then wandb, pictures and the summary."""
    run_dir, stop = Path(run.config.run_dir), run.stop
    status: RunState = "finished" if reached_the_end else "preempted"
    if run.runtime.is_main:
        write_status(run_dir, status, state.step, reason_of_end(run, state) if reached_the_end else stop.reason)
    run.metrics.close()
    if run.runtime.is_main:
        # matplotlib takes seconds to import, and only the end of a run needs it.
        from lost.utils.plots import plot_run

        plot_run(run_dir, job.title)
    if not reached_the_end:
        how = "the same command" if job.config.checkpoint.resume in ("auto", "must") else "checkpoint.resume=auto"
        log.info("Stopped at step %d: %s. To go on from here: %s.", state.step, stop.reason, how)
        return 1 if stop.is_by_signal else 0
    if run.runtime.is_main:
        job.print_summary()
    run.runtime.accelerator.end_training()
    return 0


def reason_of_end(run: Run, state: TrainState) -> str:
    """Why a finished run ended before its last step; empty: it did not."""
    if state.step >= run.config.train.num_steps or run.selection is None:
        return ""
    return f"{run.selection.patience} evaluations without a better {run.selection.key} than at step {state.best_step}"


@contextmanager
def status_of_failures(run_dir: Path, runtime: Runtime, state: TrainState) -> Iterator[None]:
    """Writes `failed` with the reason where the block raises, and lets the error pass."""
    try:
        yield
    except BaseException as error:
        try:
            if runtime.is_main or (isinstance(error, LostProcessError) and not has_failed(run_dir)):
                reason = str(error) if isinstance(error, LostError) else f"{type(error).__name__}: {error}"
                write_status(run_dir, "failed", state.step, reason)
        except LostError as second:
            log.error("%s", second)
        raise


def has_failed(run_dir: Path) -> bool:
    """Whether the first process could say itself why the run failed: it is not always the one that was lost."""
    return (read_status(run_dir) or {}).get("state") == "failed"


def batches_of(
    config: RunConfig, prepared: Prepared, runtime: Runtime, state: TrainState
) -> Generator[list[Batch], None, None]:
    """This process's micro-batches from the next step on, without the steps of the order that roll-backs left out."""
    # Read now: `state` goes on before the first batch is asked for.
    return batches_between(config, prepared, runtime, data_step(state.step + 1, state.left_out), state.left_out)


def batches_between(
    config: RunConfig, prepared: Prepared, runtime: Runtime, step: int, left_out: list[list[int]]
) -> Generator[list[Batch], None, None]:
    """Micro-batches of the undisturbed order from `step` on, without the steps `left_out`."""
    while True:
        gap = next(((first, last) for first, last in left_out if first > step), None)
        batches = train_batches(
            prepared.train,
            seed=config.seed,
            first_step=step,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
            num_workers=config.data.num_workers,
            pin_memory=runtime.device.type == "cuda",
        )
        with closing(batches):
            yield from islice(batches, gap[0] - step if gap else None)
        assert gap, "batches end at a gap only"
        step = gap[1] + 1


def end_batches(run: Run) -> None:
    """Ends the reading processes, which do not listen to signals."""
    assert isinstance(run.batches, Generator)
    run.batches.close()


def open_run_dir(
    config: RunConfig, prepared: Prepared, manager: CheckpointManager, state: TrainState, *, is_resumed: bool
) -> None:
    """Writes what describes the run and removes from metrics.jsonl what is trained again."""
    run_dir = Path(config.run_dir)
    write_text_atomically(run_dir / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    write_json_atomically(run_dir / "versions.json", versions())
    sets = {name: counts.to_dict() for name, counts in prepared.report.sets.items()}
    write_json_atomically(run_dir / "data.json", {"fingerprint": prepared.fingerprint, "sets": sets})
    prepared.tokenizer.save_pretrained(run_dir / "tokenizer")
    truncate_metrics(run_dir / "metrics.jsonl", state.step if is_resumed else -1)
    manager.set_aside_after(state.step)
    write_status(run_dir, "running", state.step)
