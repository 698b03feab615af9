"""Builds a pre-training run from its config and carries it out: config -> data -> model -> train -> final."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from lost.accounting import flops_per_token
from lost.assemble.facts import card_facts
from lost.assemble.resume import by_main, check_checkpoint, find_checkpoint, is_finished, restore, stored_config
from lost.assemble.rollback import go_back_with
from lost.assemble.sample import sample_text
from lost.assemble.source import Start, start_as_stored, start_of
from lost.assemble.summary import print_start, print_summary
from lost.assemble.validation import evaluation_line
from lost.checkpoint import (
    CheckpointManager,
    RunLock,
    check_same,
    fixed_keys,
    read_status,
    truncate_metrics,
    write_json_atomically,
    write_status,
    write_text_atomically,
)
from lost.checkpoint.run_dir import RunState
from lost.checkpoint.shards import read_into
from lost.config.schema import PretrainConfig
from lost.config.section import to_dict
from lost.data import Batch, Prepared, prepare, train_batches
from lost.data.progress import PreparationBar
from lost.export import save_final
from lost.model.build import materialise
from lost.model.split import Processes
from lost.train.divergence import data_step
from lost.train.engine import build_engine
from lost.train.metrics import MetricsLogger, Progress
from lost.train.profile import StepProfiler
from lost.train.runtime import Runtime, start_runtime
from lost.train.state import TrainState, snapshot
from lost.train.stop import StopRequest
from lost.train.trainer import Run, fit
from lost.train.watch import Watch
from lost.utils.errors import LostError, LostProcessError, TrainingError
from lost.utils.logging import get_logger, setup
from lost.utils.versions import versions

log = get_logger(__name__)


def pretrain(config: PretrainConfig) -> int:
    """`lost pretrain`: trains, or goes on, until the run is finished or asked to stop.

    Returns:
        0: finished, or stopped by train.max_hours; 1: stopped by a signal (status.json says preempted).
    Raises:
        LostError: a mistake found before training.
        TrainingError: a failure after that (status.json says failed).
    """
    runtime = start_runtime(config.runtime)
    setup(runtime.is_main)
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        by_main(runtime, lambda: stack.enter_context(RunLock(run_dir)).path)
        stored = stored_config(run_dir)
        start = start_as_stored(config, stored, run_dir) if stored and config.source else start_of(config)
        if stored:
            check_same(stored, to_dict(start.config), fixed_keys(start.config), run_dir)
            if is_finished(start.config, run_dir, stored):
                if runtime.is_main:
                    print_summary(start.config, run_dir)
                return 0
        return carry_out(start, runtime, stack)


def carry_out(start: Start, runtime: Runtime, stack: ExitStack) -> int:
    """Everything after it is clear that there is something to do."""
    config = start.config
    run_dir = Path(config.run_dir)
    manager = CheckpointManager(run_dir / "checkpoints", config.checkpoint.keep, runtime.checkpoint_group)
    # Weights and row order have generators of their own; this is for whatever else draws a number.
    set_seed(config.seed)
    checkpoint = find_checkpoint(config, manager, runtime)
    prepared = prepare_data(start, runtime)
    facts = check_checkpoint(checkpoint, config, prepared, runtime) if checkpoint else {}
    model = start.make_meta_model(runtime.param_dtype, prepared.tokenizer)
    engine = build_engine(model, config.runtime, config.optimizer, runtime, fill_with(start, runtime, checkpoint))
    state = restore(checkpoint, facts, engine, runtime) if checkpoint else TrainState()
    with status_of_failures(run_dir, runtime, state), watching(config, runtime, state) as watch:
        if runtime.is_main:
            open_run_dir(config, prepared, manager, state, is_resumed=checkpoint is not None)
            print_start(config, runtime, prepared, state)
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
            flops_per_token=flops_per_token(config.model, config.parameterization, config.train.seq_len),
            peak_flops=runtime.peak_tflops(config.runtime.peak_tflops) * 1e12,
        )
        reached_the_end = train(run, start, state, prepared, manager, watch)
    return close_run(run, state, reached_the_end)


def fill_with(start: Start, runtime: Runtime, checkpoint: Path | None) -> Callable[[torch.nn.Module], None]:
    """The function that gives a wrapped model its memory and the weights of the checkpoint, or of step 0."""
    index, count = runtime.process_index, runtime.num_processes
    processes = Processes(index, count, broadcast) if count > 1 else Processes()

    def fill(model: torch.nn.Module) -> None:
        assert isinstance(model, PreTrainedModel)
        materialise(model, start.config.parameterization, runtime.device)
        if checkpoint:
            read_into(checkpoint, "model", model.state_dict())
        else:
            start.fill(model, processes)

    return fill


def broadcast(tensor: torch.Tensor, source: int) -> None:
    """Fills `tensor` on every process with that of process `source`."""
    torch.distributed.broadcast(tensor, source)


def train(
    run: Run, start: Start, state: TrainState, prepared: Prepared, manager: CheckpointManager, watch: Watch | None
) -> bool:
    """fit() with its callables; failures from here on are no mistakes of the settings."""

    def evaluate() -> dict[str, float | int | str]:
        if watch:
            watch.touch()
        return evaluation_line(run, prepared)

    def restart_batches(state: TrainState) -> None:
        end_batches(run)
        run.batches = batches_of(run.config, prepared, run.runtime, state)

    try:
        reached_the_end = fit(
            run,
            state,
            evaluate=evaluate,
            save=save_with(run, prepared, manager),
            save_final=lambda: save_final_model(run, start, state, prepared),
            go_back=go_back_with(run, prepared, manager, restart_batches),
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
def watching(config: PretrainConfig, runtime: Runtime, state: TrainState) -> Iterator[Watch | None]:
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


def save_with(run: Run, prepared: Prepared, manager: CheckpointManager) -> Callable[[TrainState], None]:
    """The function that saves everything a resume needs; called on every process."""
    save_to = manager.save_in_background if run.config.checkpoint.background else manager.save

    def save(state: TrainState) -> None:
        tensors, facts = snapshot(run.engine, state, run.runtime)
        facts |= {
            "config": to_dict(run.config),
            "precision": run.runtime.precision,
            "data_fingerprint": prepared.fingerprint,
        }
        if run.runtime.is_main:
            run.metrics.sync()
            write_status(run.config.run_dir, "running", state.step)
        save_to(state.step, tensors, facts)

    return save


def save_final_model(run: Run, start: Start, state: TrainState, prepared: Prepared) -> None:
    """The Hugging Face folder final/ and a sample of what the model writes."""
    model = whole_model(run, start, prepared)
    if model is None:
        return
    run_dir = Path(run.config.run_dir)
    first_set = next(iter(prepared.validation.values()))
    text = sample_text(model, prepared.tokenizer, first_set, run.config.seed)
    write_text_atomically(run_dir / "sample.txt", text)
    facts = card_facts(run.config, run_dir, state.step, state.tokens_seen)
    save_final(model, prepared.tokenizer, run_dir / "final", facts)


def whole_model(run: Run, start: Start, prepared: Prepared) -> PreTrainedModel | None:
    """The trained model as one process has it that trains alone; None on every process but the first."""
    model = run.engine.model
    assert isinstance(model, PreTrainedModel)
    if run.runtime.name in ("single", "ddp"):
        return model if run.runtime.is_main else None
    weights = run.engine.whole_tensors()
    if not run.runtime.is_main:
        return None
    whole = start.make_meta_model(run.runtime.param_dtype, prepared.tokenizer)
    materialise(whole, start.config.parameterization, "cpu")
    whole.load_state_dict(weights)
    return whole


def close_run(run: Run, state: TrainState, reached_the_end: bool) -> int:
    """status.json first, because a stopped run may be killed soon; then wandb, pictures and the summary."""
    run_dir, stop = Path(run.config.run_dir), run.stop
    status: RunState = "finished" if reached_the_end else "preempted"
    if run.runtime.is_main:
        write_status(run_dir, status, state.step, "" if reached_the_end else stop.reason)
    run.metrics.close()
    if run.runtime.is_main:
        # matplotlib takes seconds to import, and only the end of a run needs it.
        from lost.utils.plots import plot_run

        plot_run(run_dir, f"{run.config.model.name}, {run.config.experiment}")
    if not reached_the_end:
        how = "the same command" if run.config.checkpoint.resume in ("auto", "must") else "checkpoint.resume=auto"
        log.info("Stopped at step %d: %s. To go on from here: %s.", state.step, stop.reason, how)
        return 1 if stop.is_by_signal else 0
    if run.runtime.is_main:
        print_summary(run.config, run_dir)
    run.runtime.accelerator.end_training()
    return 0


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


def prepare_data(start: Start, runtime: Runtime) -> Prepared:
    """Rows on disk; one process makes them (a file lock decides which) and the others find them there."""
    config = start.config
    with PreparationBar(is_main=runtime.is_main) as bar:
        return prepare(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_len=config.train.seq_len,
            tokenizer=start.tokenizer if config.data.tokenizer == "train" else None,
            progress=bar.show,
        )


def batches_of(
    config: PretrainConfig, prepared: Prepared, runtime: Runtime, state: TrainState
) -> Generator[list[Batch], None, None]:
    """This process's micro-batches from the next step on, without the steps of the order that roll-backs left out."""
    # Read now: `state` goes on before the first batch is asked for.
    return batches_between(config, prepared, runtime, data_step(state.step + 1, state.left_out), state.left_out)


def batches_between(
    config: PretrainConfig, prepared: Prepared, runtime: Runtime, step: int, left_out: list[list[int]]
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
    config: PretrainConfig, prepared: Prepared, manager: CheckpointManager, state: TrainState, *, is_resumed: bool
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
