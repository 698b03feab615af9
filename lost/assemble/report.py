"""What `lost evaluate` found: one table for people, JSON for other programs."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from lost.assemble.evaluate import ModelResult, SetResult
from lost.config.section import to_dict
from lost.config.use import EvaluateConfig
from lost.evaluation import Estimate, loss_difference
from lost.evaluation.tasks import Measure, TaskResult, measure_difference

NOT_KNOWN = Estimate(math.nan, math.nan)
# Of what a standard error or a difference is asked: (what, measure, model, count, value, difference from the first).
Line = tuple[str, str, int, int, Estimate, Estimate | None]
# Columns of text that goes to a file or a pipe.
PIPE_WIDTH = 200
LINEAGE = "perplexity (papers' formula)"


def print_results(results: list[ModelResult], config: EvaluateConfig) -> None:
    """A table of all models side by side on standard output, and notes under it."""
    several = len(results) > 1
    table = Table(title=title_of(results, config), title_justify="left")
    columns = ["what", "measure", *(["model"] if several else []), "n", "value", "s.e."]
    columns += ["- first", "s.e."] if several else []
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 + several else "right", no_wrap=True)
    for what, measure, model, count, value, difference in lines_of(results, config):
        cells = [what, measure, *([str(model + 1)] if several else []), f"{count:,}", *words_of(measure, value)]
        if several:
            cells += ["", ""] if difference is None else [signed(difference.value), number(difference.standard_error)]
        table.add_row(*cells)
    console = Console(soft_wrap=True, highlight=False)
    # A file or a pipe has no width of its own: nothing is cut off there.
    console.width = console.width if console.is_terminal else max(console.width, PIPE_WIDTH)
    console.print(table)
    for note in notes_of(results, config):
        console.print(note, markup=False)


def title_of(results: list[ModelResult], config: EvaluateConfig) -> str:
    parts = []
    if config.perplexity:
        data = to_dict(config.data)
        rows = f"{data['row_maker']} rows of {config.seq_len} tokens"
        windows = f"windows of {config.seq_len} tokens, stride {config.stride}"
        parts.append(f"data={data['name']}, {windows if config.stride else rows}")
    if config.tasks:
        parts.append(f"tasks={', '.join(config.tasks)}")
    if config.labelled.files:
        parts.append(f"labelled.files={', '.join(config.labelled.files)}")
    names = "\n".join(f"{index + 1}: {result.origin}" for index, result in enumerate(results))
    return f"{names if len(results) > 1 else results[0].origin} on {'; '.join(parts)}"


def lines_of(results: list[ModelResult], config: EvaluateConfig) -> Iterator[Line]:
    """One line a set or task, measure and model; models of one measure follow each other."""
    first = results[0]
    for name in first.sets:
        for measure in set_measures(first.sets[name], config):
            for model, result in enumerate(results):
                found = result.sets[name]
                value = set_measures(found, config).get(measure)
                if value is not None:
                    difference = set_difference(found, first.sets[name], measure) if model else None
                    yield name, measure, model, found.result.num_tokens, value, difference
    for name, task in first.tasks.items():
        for measure in task.measures:
            for model, result in enumerate(results):
                other = result.tasks[name].measures.get(measure)
                if other is None:
                    # F1 is one of two labels, and this classifier has more.
                    continue
                difference = measure_difference(other, task.measures[measure])[0] if model else None
                what = name if task.num_fewshot is None else f"{name} ({task.num_fewshot}-shot)"
                value = Estimate(other.value, other.standard_error)
                yield what, measure, model, result.tasks[name].num_documents, value, difference


def set_measures(found: SetResult, config: EvaluateConfig) -> dict[str, Estimate]:
    """The numbers of one set by name."""
    measures = {"loss": found.loss, "perplexity": perplexity_of(found)}
    if not config.stride:
        measures[LINEAGE] = Estimate(found.result.perplexity_lineage, math.nan)
    if found.bits_per_byte is not None:
        measures["bits per byte"] = found.bits_per_byte
    return measures


def perplexity_of(found: SetResult) -> Estimate:
    """exp of the loss; its standard error to first order."""
    return Estimate(found.result.perplexity, found.result.perplexity * found.loss.standard_error)


def set_difference(found: SetResult, base: SetResult, measure: str) -> Estimate | None:
    """Loss paired row by row where the tokens are the same; bits per byte otherwise, as if the texts were others."""
    is_same = found.tokens_id == base.tokens_id and len(found.sums.loss) == len(base.sums.loss)
    if measure == "loss" and is_same:
        return loss_difference(found.sums, base.sums, base.rows_per_block)
    if measure == "bits per byte" and not is_same and found.bits_per_byte and base.bits_per_byte:
        own, other = found.bits_per_byte, base.bits_per_byte
        return Estimate(own.value - other.value, math.hypot(own.standard_error, other.standard_error))
    return None


def words_of(measure: str, value: Estimate) -> list[str]:
    decimals = 3 if measure.startswith("perplexity") else 4
    shown = f"{value.value:.{decimals}f}" if math.isfinite(value.value) else "not finite"
    return [shown, number(value.standard_error)]


def number(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "-"


def signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "-"


def notes_of(results: list[ModelResult], config: EvaluateConfig) -> Iterator[str]:
    for name, found in results[0].sets.items():
        if not config.stride:
            yield f"{name}: {found.result.lineage_note}."
    if len(results) == 1:
        return
    yield "Differences are of means, paired row by row, question by question, text by text."
    for index, result in enumerate(results[1:], start=2):
        others = [name for name, found in result.sets.items() if found.tokens_id != results[0].sets[name].tokens_id]
        if others:
            yield (
                f"Model {index} reads {', '.join(others)} as other tokens: compare bits per byte; their difference is"
                " not paired, its standard error too wide."
            )


def as_json(results: list[ModelResult], config: EvaluateConfig) -> dict[str, Any]:
    """Everything that the numbers depend on; a number that is not finite is null."""
    first, *others = (model_json(result, results[0], config) for result in results)
    return {**to_dict(config), **first, "compared": others}


def model_json(result: ModelResult, base: ModelResult, config: EvaluateConfig) -> dict[str, Any]:
    """One model's numbers, and what they are more than the first model's."""
    sets = {name: set_json(found, config) for name, found in result.sets.items()}
    tasks = {name: task_json(found) for name, found in result.tasks.items()}
    if result is not base:
        for name, found in result.sets.items():
            for key, measure in (("loss", "loss"), ("bits_per_byte", "bits per byte")):
                difference = set_difference(found, base.sets[name], measure)
                if difference is not None:
                    sets[name] |= {f"{key}_difference": estimate_json(difference)}
        for name, found in result.tasks.items():
            for measure in found.measures.keys() & base.tasks[name].measures.keys():
                value = found.measures[measure]
                difference, is_paired = measure_difference(value, base.tasks[name].measures[measure])
                tasks[name]["measures"][measure]["difference"] = {**estimate_json(difference), "is_paired": is_paired}
    return {"source": result.source, "origin": result.origin, "sets": sets, "tasks": tasks}


def set_json(found: SetResult, config: EvaluateConfig) -> dict[str, Any]:
    values = dataclasses.asdict(found.result)
    if config.stride:
        # The papers' formula is one of rows.
        values |= {"perplexity_lineage": None, "lineage_note": "only of rows"}
    bits = found.bits_per_byte or NOT_KNOWN
    values |= {
        "loss_standard_error": found.loss.standard_error,
        "perplexity_standard_error": perplexity_of(found).standard_error,
        "bits_per_byte": bits.value,
        "bits_per_byte_standard_error": bits.standard_error,
    }
    return {key: finite(value) for key, value in values.items()}


def task_json(found: TaskResult) -> dict[str, Any]:
    measures = {name: measure_json(measure) for name, measure in found.measures.items()}
    return {"num_fewshot": found.num_fewshot, "num_documents": found.num_documents, "measures": measures}


def measure_json(measure: Measure) -> dict[str, Any]:
    return {**estimate_json(measure), "is_higher_better": measure.is_higher_better}


def estimate_json(estimate: Estimate | Measure) -> dict[str, Any]:
    return {"value": finite(estimate.value), "standard_error": finite(estimate.standard_error)}


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
