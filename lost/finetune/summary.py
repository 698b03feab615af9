"""What a person reads before and after a fine-tuning run."""

from pathlib import Path
from typing import Any

from rich.console import Console

from lost.assemble.summary import key_value_table, training_and_evaluation
from lost.checkpoint.io import read_json
from lost.config.finetune import FinetuneConfig
from lost.config.section import to_dict
from lost.data import Mixture, Prepared
from lost.train.runtime import Runtime
from lost.train.state import TrainState


def print_start(config: FinetuneConfig, runtime: Runtime, prepared: Prepared, state: TrainState) -> None:
    """What was picked and derived, before step 1."""
    train, rows = config.train, prepared.train
    assert isinstance(rows, Mixture)
    optimizer, schedule, method = to_dict(config.optimizer), to_dict(config.schedule), to_dict(config.method)
    table = key_value_table(f"finetune: {config.task}, {method['name']}")
    table.add_row("starts from", config.source)
    table.add_row("runs on", runtime.describe())
    counts = ", ".join(f"{len(part):,} {name}" for name, part in prepared.validation.items())
    table.add_row("data", f"{len(rows):,} rows to train on, {rows.num_tokens:,} tokens; {counts}")
    epochs = train.num_steps * train.global_batch_size / len(rows)
    table.add_row("the run", f"{train.num_steps:,} steps of {train.global_batch_size} rows, {epochs:.2f} epochs")
    table.add_row("optimizer", f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}, {schedule['name']}")
    table.add_row("run_dir", f"{config.run_dir}" + (f" (goes on after step {state.step})" if state.step else ""))
    Console().print(table)


def print_summary(run_dir: Path) -> None:
    """What came out and where it is."""
    steps, evaluations = training_and_evaluation(run_dir)
    result: dict[str, Any] = read_json(run_dir / "result.json")
    key, table = result["metric"], key_value_table(f"Finished: {run_dir}")
    if steps:
        table.add_row("steps", f"{steps[-1]['step']:,}; final/ has the weights of step {result['kept_step']:,}")
    if evaluations:
        values = {line["step"]: line[key] for line in evaluations if key in line}
        before, kept = values.get(0), values.get(result["kept_step"])
        words = [f"{value:.4f} {when}" for value, when in ((before, "before"), (kept, "after")) if value is not None]
        table.add_row(f"validation {key.removeprefix('eval/')}", ", ".join(words))
    for name, metrics in result["test"].items():
        words = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        table.add_row(name, words)
    table.add_row("model", f"{run_dir / 'final'}")
    table.add_row("metrics, plots", f"{run_dir / 'metrics.jsonl'}, {run_dir / 'plots'}")
    Console().print(table)
