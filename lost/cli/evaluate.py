"""`lost evaluate`: models side by side, by perplexity on the validation sets of a data section, tasks of lm-eval, or
labelled texts."""

import dataclasses

from lost.assemble.evaluate import ModelResult, evaluate_model
from lost.assemble.report import as_json, print_results
from lost.checkpoint import write_json_atomically
from lost.cli.target import target_file
from lost.config.runtime import RuntimeConfig
from lost.config.section import to_dict
from lost.config.use import EvaluateConfig
from lost.evaluation.tasks import Tasks
from lost.finetune.evaluate import evaluate_classifier
from lost.train.runtime import start_runtime
from lost.utils.errors import ConfigError
from lost.utils.logging import setup


def run(config: EvaluateConfig) -> int:
    """Evaluates every model, prints a table and writes JSON to `to`. Perplexity and labels work under torchrun."""
    runtime = start_runtime(RuntimeConfig(**to_dict(config.runtime)))
    setup(runtime.is_main)
    target = target_file(config.to, "JSON file")
    if config.tasks and runtime.num_processes > 1:
        raise ConfigError("tasks with several processes: lm-eval runs in one; start `lost evaluate` without torchrun")
    tasks = tasks_of(config)
    if config.labelled.files:
        config = dataclasses.replace(config, perplexity=False)
    results: list[ModelResult] = []
    for source in [config.source, *config.compare_with]:
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
