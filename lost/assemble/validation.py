"""Evaluation during training: the model as it is, on every validation set."""

import math

import torch

from lost.config.runtime import EvaluationConfig
from lost.data import Prepared, TokenRows
from lost.evaluation import PerplexityResult, perplexity
from lost.train.trainer import Run

EvaluationLine = dict[str, float | int | str]


def evaluation_line(run: Run, evaluation: EvaluationConfig, prepared: Prepared) -> EvaluationLine:
    """The eval/ fields of metrics.jsonl; with several sets also those of each, eval/<set>/..."""
    results = {name: validate(run, evaluation, rows) for name, rows in prepared.validation.items()}
    if len(results) == 1:
        return fields_of(next(iter(results.values())), "eval/")
    num_tokens = sum(result.num_tokens for result in results.values())
    loss = sum(result.loss * result.num_tokens for result in results.values()) / num_tokens
    line: EvaluationLine = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/tokens": num_tokens}
    for name, result in results.items():
        line |= fields_of(result, f"eval/{name}/")
    return line


def validate(run: Run, evaluation: EvaluationConfig, rows: TokenRows) -> PerplexityResult:
    """Perplexity on one validation set, with the work split over the processes."""
    runtime = run.runtime
    # Compiled blocks would be compiled once more for these shapes without gradients: minutes on a CPU.
    with torch.compiler.set_stance("force_eager"):
        return perplexity(
            run.engine.model,
            rows,
            micro_batch_size=evaluation.micro_batch_size,
            device=runtime.device,
            max_tokens=evaluation.max_tokens,
            autocast=runtime.autocast_dtype,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
            gather=runtime.accelerator.gather,  # pyright: ignore[reportArgumentType]
        )


def fields_of(result: PerplexityResult, prefix: str) -> EvaluationLine:
    return {
        f"{prefix}loss": result.loss,
        f"{prefix}perplexity": result.perplexity,
        f"{prefix}perplexity_lineage": result.perplexity_lineage,
        f"{prefix}perplexity_lineage_note": result.lineage_note,
        f"{prefix}tokens": result.num_tokens,
    }
