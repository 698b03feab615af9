"""`lost evaluate`: models side by side, by perplexity on the validation sets of a data section, tasks of lm-eval, or
labelled texts."""

import dataclasses

from lost.assemble.evaluate import ModelResult, evaluate_model
from lost.assemble.report import as_json, print_results
from lost.checkpoint import write_json_atomically
from lost.cli.run_defaults import defaults_of
from lost.cli.target import target_file
from lost.config.runtime import RuntimeConfig
from lost.config.section import to_dict
from lost.config.use import EvaluateConfig
from lost.evaluation.tasks import Tasks
from lost.finetune.evaluate import evaluate_classifier
from lost.train.runtime import start_runtime
from lost.utils.errors import ConfigError
from lost.utils.logging import get_logger, setup

log = get_logger(__name__)


def run(config: EvaluateConfig) -> int:
    """Evaluates every model, prints a table and writes JSON to `to`. Perplexity and labels work under torchrun."""
    runtime = start_runtime(RuntimeConfig(**to_dict(config.runtime)))
    setup(runtime.is_main)
    target = target_file(config.to, "JSON file")
    if config.tasks and runtime.num_processes > 1:
        raise ConfigError("tasks with several processes: lm-eval runs in one; start `lost evaluate` without torchrun")
    tasks = tasks_of(config)
    sources = [config.source, *config.compare_with]
    if config.labelled.files:
        config = dataclasses.replace(config, perplexity=False)
        for source in sources:
            check_inputs(source, config, is_shown=runtime.is_main)
    results: list[ModelResult] = []
    for source in sources:
        if config.labelled.files:
            results.append(evaluate_classifier(source, config, runtime))
        else:
            results.append(evaluate_model(source, config, runtime, tasks))
    if runtime.is_main:
        print_results(results, config)
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(target, as_json(results, config))
    return 0


def check_inputs(source: str, config: EvaluateConfig, *, is_shown: bool) -> None:
    """Compares how the texts are read with how the run of `source`, if that is known, has read its own.

    Raises:
        ConfigError: single texts for a classifier of pairs, or pairs for one of single texts.
    """
    found = defaults_of("evaluate", source)
    if "labelled" not in found:
        return
    wants_pairs, has_pairs = (bool(fields) for fields in (found["labelled"]["pair_field"], config.labelled.pair_field))
    if wants_pairs != has_pairs:
        kinds = ("pairs of texts", "single texts")
        wanted, given = kinds if wants_pairs else kinds[::-1]
        raise ConfigError(
            f"labelled.pair_field = {config.labelled.pair_field or 'empty'}: source = {source} was trained on {wanted},"
            f" and would be measured on {given}: set labelled.pair_field, or measure it by itself"
        )
    if found["seq_len"] != config.seq_len and is_shown:
        log.warning(
            "%s was trained with seq_len = %d, and is measured with %d", source, found["seq_len"], config.seq_len
        )


def tasks_of(config: EvaluateConfig) -> Tasks | None:
    if not config.tasks:
        return None
    return Tasks(
        config.tasks,
        config.task_folders,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
    )
