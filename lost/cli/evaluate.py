"""`lost evaluate`: perplexity of a model on the validation sets of a data section."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lost.assemble.load import Loaded, load_model
from lost.assemble.rows import validation_rows
from lost.checkpoint import write_json_atomically
from lost.config.runtime import RuntimeConfig
from lost.config.schema import EvaluateConfig
from lost.config.section import to_dict
from lost.evaluation import PerplexityResult, perplexity
from lost.train.runtime import Runtime, start_runtime
from lost.utils.errors import ConfigError
from lost.utils.logging import setup
from lost.utils.progress import progress_bar


def run(config: EvaluateConfig) -> int:
    """Evaluates every validation set, prints a table and writes JSON to `to`. Works under torchrun."""
    runtime = start_runtime(RuntimeConfig(**to_dict(config.runtime)))
    setup(runtime.is_main)
    target = Path(config.to).expanduser() if config.to else None
    if target and target.is_dir():
        raise ConfigError(f"to = {config.to} is a folder: give the name of a JSON file")
    loaded = load_model(config.source, runtime.device, runtime.param_dtype)
    sets = validation_rows(loaded, config.data, config.seq_len)
    results = {name: evaluate_set(loaded, rows, name, config, runtime) for name, rows in sets.items()}
    if runtime.is_main:
        print_results(results, loaded, config)
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(target, as_json(results, loaded, config))
    return 0


def evaluate_set(loaded: Loaded, rows: Any, name: str, config: EvaluateConfig, runtime: Runtime) -> PerplexityResult:
    with progress_bar(f"evaluating {name}", "rows", is_shown=runtime.is_main) as progress:
        return perplexity(
            loaded.model,
            rows,
            micro_batch_size=config.evaluation.micro_batch_size,
            max_tokens=config.evaluation.max_tokens,
            device=runtime.device,
            autocast=runtime.autocast_dtype,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
            gather=runtime.accelerator.gather,  # pyright: ignore[reportArgumentType]
            progress=progress,
        )


def print_results(results: dict[str, PerplexityResult], loaded: Loaded, config: EvaluateConfig) -> None:
    """A table on standard output and the notes of the papers' formula under it."""
    data = to_dict(config.data)
    title = f"{loaded.origin} on data={data['name']}, {data['row_maker']} rows of {config.seq_len} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("set", "tokens", "loss", "perplexity", "perplexity (papers' formula)"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, result in results.items():
        numbers = (f"{result.loss:.4f}", f"{result.perplexity:.3f}", f"{result.perplexity_lineage:.3f}")
        table.add_row(name, f"{result.num_tokens:,}", *numbers)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for name, result in results.items():
        console.print(f"{name}: {result.lineage_note}.", markup=False)


def as_json(results: dict[str, PerplexityResult], loaded: Loaded, config: EvaluateConfig) -> dict[str, Any]:
    """Everything that the numbers depend on; a number that is not finite is null."""
    sets = {name: dataclasses.asdict(result) for name, result in results.items()}
    for values in sets.values():
        values |= {k: None for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {"source": config.source, "origin": loaded.origin, **to_dict(config), "sets": sets}
