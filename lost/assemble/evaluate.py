"""Everything that `lost evaluate` measures of one model."""

import math
from dataclasses import dataclass, field

from lost.assemble.load import Loaded, load_model
from lost.assemble.rows import validation_rows
from lost.config.use import EvaluateConfig
from lost.data import TokenRows
from lost.evaluation import Estimate, PerplexityResult, RowSums, SlidingWindows, mean_loss, row_sums, summarise
from lost.evaluation.tasks import TaskResult, Tasks
from lost.train.runtime import Runtime
from lost.utils.progress import progress_bar


@dataclass(frozen=True)
class SetResult:
    """Perplexity on one validation set.

    Attributes:
        sums: losses of every row or window.
        rows_per_block: rows that count as one draw in standard errors.
        result: the numbers without their errors.
        loss: nats a token, with its standard error.
        bits_per_byte: of the text, whatever the tokenizer; None where rows cut documents short.
        tokens_id: equal for two models exactly if they read the same tokens.
    """

    sums: RowSums = field(repr=False)
    rows_per_block: int
    result: PerplexityResult
    loss: Estimate
    bits_per_byte: Estimate | None
    tokens_id: str


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model; `source` as typed, `origin` the folder or hub id that was read."""

    source: str
    origin: str
    sets: dict[str, SetResult]
    tasks: dict[str, TaskResult]


def evaluate_model(source: str, config: EvaluateConfig, runtime: Runtime, tasks: Tasks | None) -> ModelResult:
    """Loads a model, measures it and lets it go: one model is in memory at a time.

    Raises:
        LostError: the model or the data cannot be read, or do not fit each other.
    """
    loaded = load_model(source, runtime.device, runtime.param_dtype)
    rows = validation_rows(loaded, config.data, config.seq_len) if config.perplexity else {}
    sets = {name: evaluate_set(loaded, rows[name], name, config, runtime) for name in rows}
    found = {}
    if tasks is not None:
        size = config.evaluation.micro_batch_size
        found = tasks.run(loaded.model, loaded.tokenizer, micro_batch_size=size, autocast=runtime.autocast_dtype)
    return ModelResult(source, loaded.origin, sets, found)


def evaluate_set(loaded: Loaded, rows: TokenRows, name: str, config: EvaluateConfig, runtime: Runtime) -> SetResult:
    """Perplexity of a model on one set, by rows or by sliding windows."""
    windows = SlidingWindows(rows, config.stride) if config.stride else None
    unit = "windows" if windows else "rows"
    with progress_bar(f"evaluating {name}", unit, is_shown=runtime.is_main) as progress:
        sums = row_sums(
            loaded.model,
            windows or rows,
            micro_batch_size=config.evaluation.micro_batch_size,
            max_tokens=config.evaluation.max_tokens,
            device=runtime.device,
            autocast=runtime.autocast_dtype,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
            gather=runtime.accelerator.gather,  # pyright: ignore[reportArgumentType]
            progress=progress,
        )
    rows_per_block = windows.per_block if windows else 1
    result, loss = summarise(sums), mean_loss(sums, rows_per_block)
    return SetResult(sums, rows_per_block, result, loss, bits_per_byte(loss, rows), rows.meta["sha256"])


def bits_per_byte(loss: Estimate, rows: TokenRows) -> Estimate | None:
    """Mean bits a token times the tokens in a byte of the set's text."""
    if rows.meta["truncated_tokens"] or not rows.meta["text_bytes"]:
        return None
    factor = rows.meta["tokens"] / rows.meta["text_bytes"] / math.log(2)
    return Estimate(loss.value * factor, loss.standard_error * factor)
