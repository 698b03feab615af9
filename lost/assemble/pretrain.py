"""Builds a pre-training run from its config and carries it out: config -> data -> model -> train -> final."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list, set_seed
from transformers import PreTrainedModel

from lost.accounting import flops_per_token
from lost.assemble.facts import card_facts
from lost.assemble.sample import sample_text
from lost.assemble.source import Start, start_of
from lost.assemble.summary import print_start, print_summary
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
from lost.config.schema import PretrainConfig
from lost.config.section import to_dict
from lost.data import Prepared, prepare, train_batches
from lost.data.progress import PreparationBar
from lost.evaluation import PerplexityResult, perplexity
from lost.export import save_final
from lost.train.metrics import MetricsLogger, Progress
from lost.train.optim import build_optimizer
from lost.train.profile import StepProfiler
from lost.train.runtime import Runtime, start_runtime
from lost.train.state import TrainState, restore, snapshot
from lost.train.stop import StopRequest
from lost.train.trainer import Run, fit
from lost.train.wrap import wrap_model
from lost.utils.errors import CheckpointError, LostError, TrainingError
from lost.utils.logging import get_logger, setup
from lost.utils.versions import versions

log = get_logger(__name__)


def pretrain(config: PretrainConfig) -> int:
    """`lost pretrain`: trains, or goes on, until the run is finished or asked to stop.

    Returns:
        0: finished, or stopped by train.max_hours; 1: stopped by a signal (status.json says preempted).
    Raises:
        LostError: a mistake found before step 1.
        TrainingError: a failure after it (status.json says failed).
    """
    runtime = start_runtime(config.runtime)
    setup(runtime.is_main)
    with ExitStack() as stack:
        if runtime.is_main:
            stack.enter_context(RunLock(config.run_dir))
        start = start_of(config)
        config = start.config
        run_dir = Path(config.run_dir)
        refuse_other_run(config, run_dir)
        if is_finished(config, run_dir):
            if runtime.is_main:
                print_summary(config, run_dir)
            return 0
        return carry_out(config, start, runtime, stack)


def carry_out(config: PretrainConfig, start: Start, runtime: Runtime, stack: ExitStack) -> int:
    """Everything after it is clear that there is something to do."""
    run_dir = Path(config.run_dir)
    manager = CheckpointManager(run_dir / "checkpoints", keep=config.checkpoint.keep)
    # Weights and row order have generators of their own; this is for whatever else draws a number.
    set_seed(config.seed)
    checkpoint = find_checkpoint(config, manager, runtime)
    prepared = prepare_data(config, start, runtime)
    model = start.make_model(runtime.param_dtype, prepared.tokenizer)
    wrapped = wrap_model(model, config.runtime, runtime)
    optimizer = build_optimizer(model, config.optimizer, runtime.device)
    state = TrainState()
    if checkpoint:
        state = load_checkpoint(checkpoint, manager, config, prepared, model, optimizer, runtime)
    if runtime.is_main:
        open_run_dir(config, run_dir, prepared, manager, state, is_resumed=checkpoint is not None)
        print_start(config, runtime, prepared, state)
    runtime.accelerator.wait_for_everyone()
    num_steps = config.train.num_steps
    stop = stack.enter_context(StopRequest(config.train.max_hours))
    metrics = MetricsLogger(run_dir, config.logging, runtime.is_main, to_dict(config))
    stack.callback(metrics.close)
    run = Run(
        config=config,
        runtime=runtime,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        batches=train_batches(
            prepared.train,
            seed=config.seed,
            first_step=state.step + 1,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
            num_workers=config.data.num_workers,
            pin_memory=runtime.device.type == "cuda",
        ),
        metrics=metrics,
        progress=Progress(num_steps, state.step, is_main=runtime.is_main),
        stop=stop,
        profiler=StepProfiler(config.runtime.profile_steps, run_dir / "profile", runtime.process_index),
        flops_per_token=flops_per_token(config.model, config.parameterization, config.train.seq_len),
        peak_flops=runtime.peak_tflops(config.runtime.peak_tflops) * 1e12,
    )
    return train_and_report(run, state, prepared, manager, run_dir)


def train_and_report(run: Run, state: TrainState, prepared: Prepared, manager: CheckpointManager, run_dir: Path) -> int:
    """fit() with its callables, then status.json, plots and the summary."""
    config, runtime, model = run.config, run.runtime, run.model
    is_main = runtime.is_main

    def evaluate() -> dict[str, float | int | str]:
        return evaluation_line({name: validate(run, rows) for name, rows in prepared.validation.items()})

    def save(state: TrainState) -> None:
        tensors, facts = snapshot(model, run.optimizer, state, runtime)
        if is_main:
            run.metrics.sync()
            facts |= {"config": to_dict(config), "data_fingerprint": prepared.fingerprint}
            manager.save(state.step, tensors, facts)
            write_status(run_dir, "running", state.step)
        runtime.accelerator.wait_for_everyone()

    def save_final_model() -> None:
        if is_main:
            assert isinstance(model, PreTrainedModel)
            first_set = next(iter(prepared.validation.values()))
            text = sample_text(model, prepared.tokenizer, first_set, config.seed)
            write_text_atomically(run_dir / "sample.txt", text)
            save_final(
                model, prepared.tokenizer, run_dir / "final", card_facts(config, run_dir, state.step, state.tokens_seen)
            )

    def record(status: str, reason: str = "") -> None:
        if is_main:
            write_status(run_dir, status, state.step, reason)  # pyright: ignore[reportArgumentType]

    try:
        is_finished = fit(run, state, evaluate=evaluate, save=save, save_final=save_final_model)
    except LostError as error:
        record("failed", str(error))
        raise TrainingError(str(error)) from error
    except BaseException as error:
        record("failed", f"{type(error).__name__}: {error}")
        raise
    run.metrics.close()
    if is_main:
        # matplotlib takes seconds to import, and only the end of a run needs it.
        from lost.utils.plots import plot_run

        plot_run(run_dir, f"{config.model.name}, {config.experiment}")
    if not is_finished:
        record("preempted", run.stop.reason)
        log.info("Stopped at step %d: %s. The same command goes on from here.", state.step, run.stop.reason)
        return 1 if run.stop.is_by_signal else 0
    record("finished")
    if is_main:
        print_summary(config, run_dir)
    return 0


def validate(run: Run, rows: Any) -> PerplexityResult:
    """Perplexity of the model as it is on one validation set, with the work split over the processes."""
    runtime, evaluation = run.runtime, run.config.evaluation
    # Compiled blocks would be compiled once more for these shapes without gradients: minutes on a CPU.
    with torch.compiler.set_stance("force_eager"):
        return perplexity(
            run.model,
            rows,
            micro_batch_size=evaluation.micro_batch_size,
            device=runtime.device,
            max_tokens=evaluation.max_tokens,
            autocast=runtime.autocast_dtype,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
            gather=runtime.accelerator.gather,  # pyright: ignore[reportArgumentType]
        )


def evaluation_line(results: dict[str, PerplexityResult]) -> dict[str, float | int | str]:
    """The eval/ fields of metrics.jsonl; several sets also have their own fields, eval/<set>/..."""
    line: dict[str, float | int | str] = {}
    if len(results) > 1:
        for name, result in results.items():
            line |= evaluation_fields(result, f"eval/{name}/")
        num_tokens = sum(result.num_tokens for result in results.values())
        loss = sum(result.loss * result.num_tokens for result in results.values()) / num_tokens
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/tokens": num_tokens} | line
    return evaluation_fields(next(iter(results.values())), "eval/")


def evaluation_fields(result: PerplexityResult, prefix: str) -> dict[str, float | int | str]:
    return {
        f"{prefix}loss": result.loss,
        f"{prefix}perplexity": result.perplexity,
        f"{prefix}perplexity_lineage": result.perplexity_lineage,
        f"{prefix}perplexity_lineage_note": result.lineage_note,
        f"{prefix}tokens": result.num_tokens,
    }


def refuse_other_run(config: PretrainConfig, run_dir: Path) -> None:
    """Raises where run_dir holds checkpoints or a model of a run with settings that may not change.

    Raises:
        CheckpointError: lists every difference.
    """
    path = run_dir / "config.yaml"
    has_results = (run_dir / "final").is_dir() or CheckpointManager(run_dir / "checkpoints").complete()
    if path.is_file() and has_results:
        check_same(yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(config), fixed_keys(config), run_dir)


def is_finished(config: PretrainConfig, run_dir: Path) -> bool:
    """Whether run_dir holds this run, done to the last step asked for now."""
    status = read_status(run_dir)
    is_done = status is not None and status["state"] == "finished" and status["step"] == config.train.num_steps
    return is_done and config.checkpoint.resume in ("auto", "must") and (run_dir / "final").is_dir()


def find_checkpoint(config: PretrainConfig, manager: CheckpointManager, runtime: Runtime) -> Path | None:
    """The checkpoint to go on from, the same on every process."""
    found: list[Path | None] = [None]
    if runtime.is_main:
        manager.clean()
        found = [manager.resolve(config.checkpoint.resume)]
    return broadcast_object_list(found)[0]


def prepare_data(config: PretrainConfig, start: Start, runtime: Runtime) -> Prepared:
    """Rows on disk; one process makes them (a file lock decides which) and the others find them there."""
    with PreparationBar(is_main=runtime.is_main) as bar:
        return prepare(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_len=config.train.seq_len,
            tokenizer=start.tokenizer if config.data.tokenizer == "train" else None,
            progress=bar.show,
        )


def load_checkpoint(
    path: Path,
    manager: CheckpointManager,
    config: PretrainConfig,
    prepared: Prepared,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
) -> TrainState:
    """Model, optimizer, random generators and counters of a checkpoint, put in place.

    Raises:
        CheckpointError: it was made with other settings or other data.
    """
    tensors, facts = manager.load(path)
    check_same(facts["config"], to_dict(config), fixed_keys(config), path)
    if facts["data_fingerprint"] != prepared.fingerprint:
        raise CheckpointError(
            f"{path} was trained on other data: its rows have the fingerprint {facts['data_fingerprint']}, those of"
            f" data={config.data.name} now {prepared.fingerprint}. Bring the old data (or Python version, for stdlib)"  # pyright: ignore[reportAttributeAccessIssue]
            " back, or start a new run from its weights: source=<run_dir> run_dir=<new folder>"
        )
    return restore(model, optimizer, runtime, tensors, facts)


def open_run_dir(
    config: PretrainConfig,
    run_dir: Path,
    prepared: Prepared,
    manager: CheckpointManager,
    state: TrainState,
    *,
    is_resumed: bool,
) -> None:
    """Writes what describes the run and removes from metrics.jsonl what is trained again."""
    write_text_atomically(run_dir / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    write_json_atomically(run_dir / "versions.json", versions())
    write_json_atomically(
        run_dir / "data.json",
        {"fingerprint": prepared.fingerprint, "sets": {n: s.to_dict() for n, s in prepared.report.sets.items()}},
    )
    prepared.tokenizer.save_pretrained(run_dir / "tokenizer")
    truncate_metrics(run_dir / "metrics.jsonl", state.step if is_resumed else -1)
    manager.set_aside_after(state.step)
    write_status(run_dir, "running", state.step)
