"""Builds a fine-tuning run from its config and carries it out by the loop of pre-training."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from lost.assemble.resume import by_main, check_data, is_finished, stored_config
from lost.assemble.run import Job, carry_out
from lost.assemble.validation import EvaluationLine, evaluation_line
from lost.checkpoint import RunLock, check_same, fixed_keys
from lost.checkpoint.shards import read_into
from lost.config.finetune import FinetuneConfig, as_text_files
from lost.config.runtime import EvaluationConfig
from lost.config.section import to_dict
from lost.config.validate import decay_problems, profile_problems, warmup_and_decay_problems, warmup_problems
from lost.data import Mixture, Prepared, prepare
from lost.data.progress import PreparationBar
from lost.data.report import PrepareReport
from lost.finetune import classification
from lost.finetune.build import ModelMaker
from lost.finetune.final import save_result
from lost.finetune.instruction import prepare_conversations
from lost.finetune.metrics import HIGHER_IS_BETTER, measured
from lost.finetune.start import Head, tokenizer_of
from lost.finetune.summary import print_start, print_summary
from lost.finetune.tokens import NO_LIMIT
from lost.train.engine import trained_tensors
from lost.train.objective import NextToken, Objective
from lost.train.runtime import Runtime, start_runtime
from lost.train.selection import Selection
from lost.train.trainer import Run
from lost.utils.errors import ConfigError
from lost.utils.logging import setup


@dataclass(frozen=True)
class Material:
    """What one task trains on.

    Attributes:
        prepared: rows, tokenizer, fingerprint.
        objective: the loss.
        evaluate: the eval/ fields.
        head: of a classifier; None: a language model.
        largest_id: of all tokens.
        labelled: of classification.
    """

    prepared: Prepared
    objective: Objective
    evaluate: Callable[[Run], EvaluationLine]
    head: Head | None
    largest_id: int
    labelled: classification.LabelledData | None = None


def finetune(config: FinetuneConfig) -> int:
    """`lost finetune`: trains, or goes on, until the run is finished or asked to stop.

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
        tokenizer = tokenizer_of(config)
        material = material_of(config, tokenizer)
        config = with_length(config, material)
        if stored:
            check_same(stored, to_dict(config), fixed_keys(config), run_dir)
            if is_finished(config, run_dir, stored):
                check_data(run_dir, config, material.prepared)
                if runtime.is_main:
                    print_summary(run_dir)
                return 0
        # Dropout differs between processes; new weights have a generator of their own.
        set_seed(config.seed, device_specific=True)
        return carry_out(config, lambda: job_of(config, material, runtime), runtime, stack)


def material_of(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Material:
    """The rows of the task.

    Raises:
        LostError: the data cannot be read, or does not fit the task.
    """
    makers = {"classification": classified, "instruction": instructed, "text": read_text}
    return makers[config.task](config, tokenizer)


def classified(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Material:
    data = classification.prepare_labelled(config, tokenizer)
    check_metric(classification.main_metric(config), data)
    rows: Any = data.train
    validation: Any = data.validation
    report = PrepareReport(sets={}, is_cached=True)
    prepared = Prepared(Mixture([rows]), validation, tokenizer, data.fingerprint, report)

    def evaluate(run: Run) -> EvaluationLine:
        return classification.evaluate_labelled(run, data, config.evaluation.micro_batch_size)

    return Material(prepared, data.objective, evaluate, Head(tuple(data.label_names)), data.largest_id, data)


def check_metric(metric: str, data: classification.LabelledData) -> None:
    """Refuses a metric that the labels do not have.

    Raises:
        ConfigError: says which ones there are.
    """
    known = measured(len(data.label_names))
    if metric not in known:
        kind = f"{len(data.label_names)} labels" if data.label_names else "numbers as labels"
        raise ConfigError(f"evaluation.metric = {metric} with {kind}: must be auto, {', '.join(known)}")


def instructed(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Material:
    data = prepare_conversations(config, tokenizer)
    rows: Any = data.train
    validation: Any = {"validation": data.validation}
    report = PrepareReport(sets={}, is_cached=True)
    prepared = Prepared(Mixture([rows]), validation, tokenizer, data.fingerprint, report)
    return language_material(config, prepared, data.largest_id)


def read_text(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Material:
    # What limits the ids is the model, which is not loaded yet: `check_ids` compares with the largest one.
    with PreparationBar(is_main=True) as bar:
        prepared = prepare(
            as_text_files(config.data),
            vocab_size=NO_LIMIT,
            seq_len=config.train.seq_len,
            tokenizer=tokenizer,
            progress=bar.show,
        )
    return language_material(config, prepared, max(part.max_token_id for part in prepared.report.sets.values()))


def language_material(config: FinetuneConfig, prepared: Prepared, largest_id: int) -> Material:
    """Of a language model, which is measured by the loss of its tokens."""
    settings = EvaluationConfig(max_tokens=0, micro_batch_size=config.evaluation.micro_batch_size)

    def evaluate(run: Run) -> EvaluationLine:
        return evaluation_line(run, settings, prepared)

    return Material(prepared, NextToken(), evaluate, None, largest_id)


def with_length(config: FinetuneConfig, material: Material) -> FinetuneConfig:
    """The config with its number of steps, which train.num_epochs leaves to the data.

    Raises:
        ConfigError: a span of the schedule or the profile is longer than the run.
    """
    train, rows = config.train, material.prepared.train
    assert isinstance(rows, Mixture)
    by_epochs = math.ceil(train.num_epochs * len(rows) / train.global_batch_size) if train.num_epochs else 0
    given = train.num_steps if train.max_steps or train.max_tokens else 0
    steps = min(limit for limit in (by_epochs, given) if limit)
    actual = dataclasses.replace(config, train=dataclasses.replace(train, max_steps=steps))
    problems = warmup_problems(actual.train, actual.schedule) + decay_problems(actual.train, actual.schedule)
    problems += warmup_and_decay_problems(actual.train, actual.schedule)
    problems += profile_problems(actual.runtime, actual.train)
    if problems:
        raise ConfigError(problems)
    return actual


def job_of(config: FinetuneConfig, material: Material, runtime: Runtime) -> Job:
    """The run as the loop of pre-training carries it out."""
    run_dir, tokenizer = Path(config.run_dir), material.prepared.tokenizer
    metric = classification.main_metric(config)
    maker = ModelMaker(config, runtime, tokenizer, material.head, material.largest_id)

    def fill(model: nn.Module, checkpoint: Path | None) -> None:
        model.to(runtime.device)
        if checkpoint:
            read_into(checkpoint, "model", trained_tensors(model))

    return Job(
        config=config,
        prepared=material.prepared,
        title=f"{Path(config.source).name}, {config.task}, {to_dict(config.method)['name']}",
        flops_per_token=flops_per_token,
        make_model=maker.make,
        fill=fill,
        evaluate=material.evaluate,
        save_final=lambda run, state, manager: save_result(run, state, manager, maker, material.labelled, tokenizer),
        print_start=lambda state: print_start(config, runtime, material.prepared, state),
        print_summary=lambda: print_summary(run_dir),
        objective=material.objective,
        selection=Selection(
            f"eval/{metric}",
            HIGHER_IS_BETTER[metric],
            config.evaluation.patience,
            is_best_kept=config.evaluation.keep == "best",
        ),
    )


def flops_per_token(model: nn.Module) -> float:
    """Two a parameter forward, two for the gradient of its input, two for its own if it is trained; no attention."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return float(sum(size * (6 if is_trained else 4) for size, is_trained in sizes))
