"""Tasks of lm-eval (EleutherAI's evaluation harness): questions with known answers, of its own or from your files."""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lost.config.section import nearest
from lost.evaluation.errors import Estimate
from lost.utils.errors import ConfigError, DataError, LostError, first_line
from lost.utils.hub import is_hub_id, require_hub
from lost.utils.logging import get_logger

log = get_logger(__name__)
YAML_ENDINGS = (".yaml", ".yml")
DATASET_PATH = re.compile(r"^dataset_path: *[\"']?([^\s\"'#]+)", re.MULTILINE)
LOCAL_FORMATS = ("json", "csv", "text", "parquet", "arrow", "pandas")


@dataclass(frozen=True)
class Measure:
    """One number of a task.

    Attributes:
        value: mean over the questions, or whatever the task aggregates to.
        standard_error: lm-eval's; nan where it has none.
        is_higher_better: None where the task does not say.
        scores: of each question, by its number; empty where `value` is not their mean.
    """

    value: float
    standard_error: float
    is_higher_better: bool | None = None
    scores: dict[int, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class TaskResult:
    """What a task found: its measures by name (and filter, where the task has some).

    Attributes:
        num_fewshot: None: no task of lm-eval but labelled texts.
    """

    num_fewshot: int | None
    num_documents: int
    measures: dict[str, Measure]


class Tasks:
    """Tasks by name, glob pattern or file, with their questions read.

    Args:
        names: tasks, groups or tags of lm-eval, YAML files, or names from `folders`.
        folders: searched for task files.
        num_fewshot: examples before each question; -1: as the task says.
        limit: questions of each task; 0: all.
        apply_chat_template: put questions into the tokenizer's chat template.
    Raises:
        LostError: lm-eval is not installed.
        ConfigError: an unknown task, or a folder or file that is not there.
        DataError: the questions cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        folders: Sequence[str] = (),
        *,
        num_fewshot: int = -1,
        limit: int = 0,
        apply_chat_template: bool = False,
    ):
        self.names = [str(Path(name).expanduser()) if is_file_name(name) else name for name in names]
        self.num_fewshot, self.limit, self.apply_chat_template = num_fewshot, limit, apply_chat_template
        require_harness()
        refuse_missing_files(self.names, folders)
        with quiet_harness():
            self._manager = self._find(folders)
            self._load()

    def _find(self, folders: Sequence[str]) -> Any:
        """lm-eval's index of tasks; its own thousands of files are read only where they are needed."""
        from lm_eval.tasks import TaskManager

        paths: Any = [Path(folder).expanduser() for folder in folders]
        own = TaskManager(include_path=paths, include_defaults=False)
        is_own = all(is_file_name(name) or own.match_tasks([name]) for name in self.names)
        manager = own if is_own else TaskManager(include_path=paths)
        unknown = [name for name in self.names if not is_file_name(name) and not manager.match_tasks([name])]
        if unknown:
            raise ConfigError(
                [
                    f"tasks: {name} is no task of lm-eval{nearest(name, manager.all_tasks)} and no file"
                    for name in unknown
                ]
            )
        return manager

    def _load(self) -> None:
        """Reads the questions once, so that what is wrong with them shows before a model is loaded."""
        hub_problem = None
        if self._may_need_hub():
            try:
                require_hub(
                    f"tasks = {', '.join(self.names)} read their questions from it", "name a YAML file of yours"
                )
            except DataError as error:
                hub_problem = error
                work_offline()
        try:
            self._manager.load(self._specs())
        except Exception as error:
            # lm-eval runs what a task file says: any kind of error may come out of it.
            if hub_problem is not None:
                raise hub_problem from error
            raise DataError(
                f"tasks = {', '.join(self.names)} cannot be loaded: {type(error).__name__}: {first_line(error)}."
                " Paths in a task file count from the folder in which `lost` runs"
            ) from error

    def _may_need_hub(self) -> bool:
        """Whether a task, or a member of a group or tag, may name a data set of the hub."""
        for name in self._specs():
            entry = self._manager.task_index.get(name)
            path = Path(name) if is_file_name(name) else entry.yaml_path if entry else None
            if path is None or names_hub_data(path):
                return True
        return False

    def _specs(self) -> list[str]:
        return [
            spec
            for name in self.names
            for spec in ([name] if is_file_name(name) else self._manager.match_tasks([name]))
        ]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        micro_batch_size: int,
        autocast: torch.dtype | None = None,
    ) -> dict[str, TaskResult]:
        """The results of every task by its name, and of every group.

        Raises:
            ConfigError: a chat template is asked for and the tokenizer has none.
            LostError: lm-eval cannot ask this model these questions.
        """
        if self.apply_chat_template and not tokenizer.chat_template:
            raise ConfigError("apply_chat_template = true: the model's tokenizer has no chat template; leave it out")
        from lm_eval import evaluator

        evaluate: Any = evaluator.simple_evaluate
        with quiet_harness():
            try:
                found = evaluate(
                    harness_model(model, tokenizer, micro_batch_size, autocast),
                    tasks=self._specs(),
                    num_fewshot=None if self.num_fewshot < 0 else self.num_fewshot,
                    limit=self.limit or None,
                    apply_chat_template=self.apply_chat_template,
                    task_manager=self._manager,
                )
            except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
                raise LostError(f"tasks = {', '.join(self.names)}: lm-eval stopped: {first_line(error)}") from error
        results = read_results(found)
        for name, result in results.items():
            if self.num_fewshot >= 0 and result.num_fewshot != self.num_fewshot:
                log.warning("%s always has %d examples: num_fewshot is not used", name, result.num_fewshot)
        return results


def harness_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, micro_batch_size: int, autocast: torch.dtype | None
) -> Any:
    """The model as lm-eval asks it."""
    from lm_eval.models.huggingface import HFLM

    harness: Any = HFLM
    # A tokenizer that ends every text with EOS would put it between a question and its answer.
    is_ended = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
    return harness(
        model,
        backend="causal",
        tokenizer=tokenizer,
        batch_size=micro_batch_size,
        mixed_precision_dtype=autocast,
        add_bos_token=False if is_ended else None,
    )


def read_results(found: Any) -> dict[str, TaskResult]:
    """lm-eval's results in our words."""
    samples = found.get("samples", {})
    results = {}
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        measures = {
            metric: measure
            for metric, measure in measures_of(values, found["higher_is_better"].get(name, {}), samples.get(name, []))
        }
        counts = found["n-samples"].get(name, {})
        if measures:
            results[name] = TaskResult(found["n-shot"].get(name, 0) or 0, counts.get("effective", 0), measures)
    return results


def measures_of(values: Any, higher_is_better: Any, samples: list[Any]) -> Iterator[tuple[str, Measure]]:
    """(name, measure) of the `metric,filter` keys of one task."""
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        scores = {
            sample["doc_id"]: float(sample[metric])
            for sample in samples
            if sample.get("filter", "none") == filter_name and isinstance(sample.get(metric), int | float)
        }
        is_mean = scores and math.isclose(sum(scores.values()) / len(scores), value, rel_tol=1e-9, abs_tol=1e-12)
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        standard_error = float(error) if isinstance(error, int | float) else math.nan
        is_higher_better = (higher_is_better or {}).get(metric)
        yield name, Measure(float(value), standard_error, is_higher_better, scores if is_mean else {})


def measure_difference(measure: Measure, base: Measure) -> tuple[Estimate, bool]:
    """The measure less that of `base`, and whether it is paired question by question.

    Unpaired, the standard error is that of independent samples: too wide for the same questions.
    """
    value = measure.value - base.value
    if len(base.scores) > 1 and measure.scores.keys() == base.scores.keys():
        differences = [measure.scores[key] - base.scores[key] for key in base.scores]
        squares = sum((difference - value) ** 2 for difference in differences)
        count = len(differences)
        return Estimate(value, math.sqrt(squares / (count - 1) / count)), True
    return Estimate(value, math.hypot(measure.standard_error, base.standard_error)), False


def names_hub_data(path: Path) -> bool:
    """Whether a task file names no data set, or one that is neither a format of local files nor a path."""
    found = DATASET_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
    return found is None or (found[1] not in LOCAL_FORMATS and is_hub_id(found[1]))


def is_file_name(name: str) -> bool:
    return name.endswith(YAML_ENDINGS)


def require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise LostError(
            "tasks need lm-eval, which is not installed: pip install 'lost-pretraining[evaluation]', or leave tasks out"
        ) from error


def refuse_missing_files(names: Sequence[str], folders: Sequence[str]) -> None:
    problems = [f"tasks: there is no file {name}" for name in names if is_file_name(name) and not Path(name).is_file()]
    problems += [f"task_folders: {folder} is no folder" for folder in folders if not Path(folder).expanduser().is_dir()]
    if problems:
        raise ConfigError(problems)


def work_offline() -> None:
    """Makes the libraries read their caches at once instead of asking a hub that does not answer, again and again."""
    import datasets.config
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without lm-eval's and datasets' chatter on standard error."""
    from datasets.utils import disable_progress_bars, enable_progress_bars

    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        enable_progress_bars()
