"""Builds a pre-training run from its config and carries it out: config -> data -> model -> train -> final."""

from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from lost.accounting import flops_per_token
from lost.assemble.facts import card_facts
from lost.assemble.resume import by_main, is_finished, stored_config
from lost.assemble.run import Job, carry_out, whole_model
from lost.assemble.sample import sample_text
from lost.assemble.source import Start, start_as_stored, start_of
from lost.assemble.summary import print_start, print_summary
from lost.assemble.validation import evaluation_line
from lost.checkpoint import RunLock, check_same, fixed_keys, write_text_atomically
from lost.checkpoint.shards import read_into
from lost.config.schema import PretrainConfig
from lost.config.section import to_dict
from lost.data import Prepared, prepare
from lost.data.progress import PreparationBar
from lost.export import save_final
from lost.model.build import materialise
from lost.model.split import Processes
from lost.train.runtime import Runtime, start_runtime
from lost.train.state import TrainState
from lost.train.trainer import Run
from lost.utils.logging import setup


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
        return carry_out(start.config, lambda: job_of(start, runtime), runtime, stack)


def job_of(start: Start, runtime: Runtime) -> Job:
    """A language model from its first weights, or from those of another one."""
    config = start.config
    # Weights and row order have generators of their own; this is for whatever else draws a number.
    set_seed(config.seed)
    prepared = prepare_data(start, runtime)
    return Job(
        config=config,
        prepared=prepared,
        title=f"{config.model.name}, {config.experiment}",
        flops_per_token=lambda _: flops_per_token(config.model, config.parameterization, config.train.seq_len),
        make_model=lambda _: start.make_meta_model(runtime.param_dtype, prepared.tokenizer),
        fill=lambda model, checkpoint: fill(model, start, runtime, checkpoint),
        evaluate=lambda run: evaluation_line(run, config.evaluation, prepared),
        save_final=lambda run, state, _: save_final_model(run, start, state, prepared),
        print_start=lambda state: print_start(config, runtime, prepared, state),
        print_summary=lambda: print_summary(config, Path(config.run_dir)),
    )


def fill(model: torch.nn.Module, start: Start, runtime: Runtime, checkpoint: Path | None) -> None:
    """Gives a wrapped model its memory and the weights of the checkpoint, or of step 0."""
    assert isinstance(model, PreTrainedModel)
    index, count = runtime.process_index, runtime.num_processes
    materialise(model, start.config.parameterization, runtime.device)
    if checkpoint:
        read_into(checkpoint, "model", model.state_dict())
    else:
        start.fill(model, Processes(index, count, broadcast) if count > 1 else Processes())


def broadcast(tensor: torch.Tensor, source: int) -> None:
    """Fills `tensor` on every process with that of process `source`."""
    torch.distributed.broadcast(tensor, source)


def save_final_model(run: Run, start: Start, state: TrainState, prepared: Prepared) -> None:
    """The Hugging Face folder final/ and a sample of what the model writes."""
    model = whole_model(run, lambda: empty_model(start, prepared, run.runtime.param_dtype))
    if model is None:
        return
    run_dir = Path(start.config.run_dir)
    first_set = next(iter(prepared.validation.values()))
    text = sample_text(model, prepared.tokenizer, first_set, start.config.seed)
    write_text_atomically(run_dir / "sample.txt", text)
    facts = card_facts(start.config, run_dir, state.step, state.tokens_seen)
    save_final(model, prepared.tokenizer, run_dir / "final", facts)


def empty_model(start: Start, prepared: Prepared, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU; its values are anything."""
    model = start.make_meta_model(dtype, prepared.tokenizer)
    materialise(model, start.config.parameterization, "cpu")
    return model


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
