"""What a person reads before and after a run, all of it from the config and the run directory."""

from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from lost.accounting import count_parameters
from lost.config.data import StdlibDataConfig
from lost.config.model import DenseConfig
from lost.config.schema import PretrainConfig
from lost.config.section import to_dict
from lost.data import Mixture, Prepared
from lost.train.runtime import Runtime
from lost.train.state import TrainState
from lost.utils.metrics_file import read_metrics


def training_and_evaluation(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluation lines) of metrics.jsonl."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [line for line in lines if "loss" in line], [line for line in lines if "eval/loss" in line]


def parameter_words(config: PretrainConfig) -> str:
    """'3.37 M (dense: 5.26 M)'."""
    own = count_parameters(config.model, config.parameterization)
    dense = count_parameters(config.model, DenseConfig())
    return f"{own / 1e6:.2f} M" + (f" (dense: {dense / 1e6:.2f} M)" if own != dense else "")


def print_start(config: PretrainConfig, runtime: Runtime, prepared: Prepared, state: TrainState) -> None:
    """What was picked and derived, before step 1."""
    train = config.train
    accumulation = train.global_batch_size // (train.micro_batch_size * runtime.num_processes)
    optimizer, schedule = to_dict(config.optimizer), to_dict(config.schedule)
    table = key_value_table(f"{config.experiment}: {config.model.name}, {to_dict(config.parameterization)['name']}")
    table.add_row("parameters", parameter_words(config))
    table.add_row("runs on", runtime.describe())
    table.add_row("data", f"{to_dict(config.data)['name']}: {prepared.train.describe()}")
    table.add_row(
        "a step",
        f"{train.global_batch_size} rows of {train.seq_len} = {train.global_batch_tokens:,} tokens"
        f" ({accumulation} micro-steps of {train.micro_batch_size} rows a process)",
    )
    num_tokens = train.num_steps * train.global_batch_tokens
    table.add_row("the run", f"{train.num_steps:,} steps, {num_tokens:,} tokens{epoch_words(prepared, num_tokens)}")
    table.add_row("optimizer", f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}, {schedule['name']}")
    table.add_row("run_dir", f"{config.run_dir}" + (f" (goes on after step {state.step})" if state.step else ""))
    Console().print(table)


def epoch_words(prepared: Prepared, num_tokens: int) -> str:
    """How many epochs so many tokens are; nothing for a stream, whose length is not known."""
    if not isinstance(prepared.train, Mixture):
        return ""
    return f", {num_tokens / max(1, len(prepared.train) * prepared.train.seq_len):.2f} epochs"


def print_summary(config: PretrainConfig, run_dir: Path) -> None:
    """What came out, where it is and what to try next."""
    steps, evaluations = training_and_evaluation(run_dir)
    table = key_value_table(f"Finished: {run_dir}")
    table.add_row("parameters", parameter_words(config))
    # A run that only took over another one's last checkpoint has no training lines.
    if steps:
        table.add_row("steps", f"{steps[-1]['step']:,} ({steps[-1]['skipped_steps']} skipped)")
        table.add_row("tokens seen", f"{steps[-1]['tokens_seen']:,}")
    if evaluations:
        before, after = (evaluations[i]["eval/perplexity"] for i in (0, -1))
        table.add_row("validation perplexity", f"{before:.1f} before, {after:.2f} after")
    if steps:
        table.add_row("tokens/s", f"{median(line['tokens_per_second'] for line in steps):,.0f} (median of the steps)")
        table.add_row("peak memory", f"{max(line['peak_memory_gib'] for line in steps):.2f} GiB a process")
    table.add_row("model", f"{run_dir / 'final'}")
    table.add_row("metrics, plots", f"{run_dir / 'metrics.jsonl'}, {run_dir / 'plots'}")
    console = Console()
    console.print(table)
    sample = run_dir / "sample.txt"
    if sample.is_file():
        console.rule("a sample (the prompt is the beginning of the validation set)", align="left")
        console.print(sample.read_text(encoding="utf-8"), markup=False, highlight=False)
        console.rule()
    console.print("Try next:", style="bold")
    for command in next_commands(config, run_dir):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def next_commands(config: PretrainConfig, run_dir: Path) -> list[str]:
    is_stdlib = isinstance(config.data, StdlibDataConfig)
    commands = [
        f"lost generate source={run_dir} prompt=" + ('"def read("' if is_stdlib else '"..."'),
        f"lost evaluate source={run_dir}",
        f"lost export source={run_dir} to=my_model",
    ]
    if config.experiment == "quickstart" and is_stdlib:
        other = "lost" if isinstance(config.parameterization, DenseConfig) else "dense"
        commands.append(f"lost pretrain parameterization={other}        # the quickstart with the other kind of layer")
    return [*commands, "lost plan                                 # what the larger models need"]


def key_value_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table
