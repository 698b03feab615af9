"""Settings of `lost finetune`: what of the model is trained, on which examples, for how long."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lost.config.data import TextFilesDataConfig
from lost.config.model import Activation
from lost.config.runtime import CheckpointConfig, LoggingConfig, RuntimeConfig
from lost.config.section import CrossRule, Section, setting
from lost.config.training import OptimizerConfig, ScheduleConfig, TrainConfig

Task = Literal["text", "instruction", "classification"]
GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Section):
    """What of the model is trained."""


@dataclass(frozen=True, kw_only=True)
class FullMethodConfig(MethodConfig):
    """Every parameter."""

    name: Literal["full"] = setting("every parameter", "full", is_fixed_on_resume=True)


@dataclass(frozen=True, kw_only=True)
class AdapterMethodConfig(MethodConfig):
    """A frozen model and small trained matrices beside its layers, saved as a folder of their own."""

    rank: int = setting("rank r of the trained matrices", 8, at_least=1, is_fixed_on_resume=True)
    alpha: float = setting("what they add is multiplied by alpha / rank", 16.0, above=0, is_fixed_on_resume=True)
    target_modules: list[str] = setting(
        "patterns of the names of linear layers ('*' wildcards match the end of the dotted name); empty: all of the"
        " model's blocks",
        [],
        is_fixed_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class LoraMethodConfig(AdapterMethodConfig):
    """LoRA by the library peft: W x + (alpha / r) B A x."""

    name: Literal["lora"] = setting("LoRA (peft)", "lora", is_fixed_on_resume=True)
    dropout: float = setting("of the input of A", 0.0, at_least=0, below=1, is_fixed_on_resume=True)


@dataclass(frozen=True, kw_only=True)
class LostAdapterMethodConfig(AdapterMethodConfig):
    """A LOST layer beside the frozen one: W x + (alpha / r) (gamma * act(x A^T) B^T + (1 - gamma) * x[:, I] W_s^T)."""

    name: Literal["lost_adapter"] = setting("LOST (arXiv 2508.02668)", "lost_adapter", is_fixed_on_resume=True)
    init: Literal["zero", "svd"] = setting(
        "both begin with the function of the model; zero: B and W_s are zero; svd: A, B and W_s from the SVD of the"
        " dense W, and what they make is taken off W",
        "zero",
        is_fixed_on_resume=True,
    )
    density: float = setting(
        "fraction of input channels kept by the sparse block; 0 = none",
        0.01,
        at_least=0,
        at_most=1,
        is_fixed_on_resume=True,
    )
    gamma: float = setting(
        "weight of the low-rank part, 1 - gamma that of the sparse part",
        0.7,
        above=0,
        at_most=1,
        is_fixed_on_resume=True,
    )
    activation: Activation = setting(
        "function between the factors; only with identity can the adapter be merged into W",
        "identity",
        is_fixed_on_resume=True,
    )

    def cross_rules(self) -> list[CrossRule]:
        return [*super().cross_rules(), ("init", self._init_problems)]

    def _init_problems(self) -> list[str]:
        if self.init == "zero" or self.activation == "identity":
            return []
        return [
            f"init = svd with activation = {self.activation}: what the adapter makes at the start can only be taken off"
            " W where it is linear; use init=zero or activation=identity"
        ]


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(Section):
    """Local .jsonl, .jsonl.gz, .parquet (and for text .txt) files, or a task of GLUE."""

    train_files: list[str] = setting("files or glob patterns to train on", [], is_fixed_on_resume=True)
    validation_files: list[str] = setting(
        "files or glob patterns that decide which checkpoint is kept; empty: split from train_files",
        [],
        is_fixed_on_resume=True,
    )
    test_files: list[str] = setting(
        "classification: files or glob patterns that the kept model is measured on once, at the end",
        [],
        is_fixed_on_resume=True,
    )
    validation_fraction: float = setting(
        "fraction of the examples held out, by a hash of their content, where validation_files is empty",
        0.1,
        above=0,
        below=1,
        is_fixed_on_resume=True,
    )
    text_field: str = setting("text, classification: field that holds the text", "text", is_fixed_on_resume=True)
    pair_field: str = setting(
        "classification: field of a second text; empty: there is none", "", is_fixed_on_resume=True
    )
    label_field: str = setting("classification: field of the label", "label", is_fixed_on_resume=True)
    num_labels: int = setting(
        "classification: labels are 0 to num_labels - 1; 0: as many as the training examples have, which may also be"
        " words",
        0,
        at_least=0,
        is_fixed_on_resume=True,
    )
    glue: Literal["", "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] = setting(
        "classification: a task of GLUE in place of files", "", is_fixed_on_resume=True
    )
    glue_dataset: str = setting(
        "hub id of GLUE, or a folder with <task>/<split>-*.parquet", "nyu-mll/glue", is_fixed_on_resume=True
    )
    messages_field: str = setting(
        "instruction: field of the list of messages, each with role and content", "messages", is_fixed_on_resume=True
    )
    chat_template: str = setting(
        "instruction: file of a Jinja chat template; empty: the tokenizer's own, or where it has none a plain one",
        "",
        is_fixed_on_resume=True,
    )
    row_maker: Literal["packed", "padded"] = setting(
        "text, instruction: packed: several documents or conversations a row; padded: one a row",
        "packed",
        is_fixed_on_resume=True,
    )
    isolate_documents: bool = setting(
        "text with packed rows: attention and positions restart at every document (in instruction rows they always do)",
        False,
        is_fixed_on_resume=True,
    )
    cache_dir: str = setting("folder of prepared rows; empty: the user's cache folder", "")
    num_processes: int = setting(
        "text: processes that tokenise while rows are made; 0: one a core, 16 at most", 0, at_least=0
    )
    num_workers: int = setting("processes that read rows ahead of the training loop", 0, at_least=0)

    def cross_rules(self) -> list[CrossRule]:
        return [("train_files", self._source_problems), ("glue_dataset", self._glue_dataset_problems)]

    def _source_problems(self) -> list[str]:
        named = [key for key in ("train_files", "validation_files", "test_files") if getattr(self, key)]
        if self.glue and named:
            return [f"glue = {self.glue} with {' and '.join(named)}: take the one or the other"]
        if not self.glue and not self.train_files:
            return ["train_files is empty: name what to train on, data.train_files=[path]"]
        return []

    def _glue_dataset_problems(self) -> list[str]:
        if self.glue or self.glue_dataset == default_of(self, "glue_dataset"):
            return []
        return [f"glue_dataset = {self.glue_dataset} without glue: name a task, data.glue=sst2"]


# Which tasks read a key of FinetuneDataConfig; the others all do.
READ_BY: dict[str, tuple[Task, ...]] = {
    "test_files": ("classification",),
    "text_field": ("text", "classification"),
    "pair_field": ("classification",),
    "label_field": ("classification",),
    "num_labels": ("classification",),
    "glue": ("classification",),
    "glue_dataset": ("classification",),
    "messages_field": ("instruction",),
    "chat_template": ("instruction",),
    "row_maker": ("text", "instruction"),
    "isolate_documents": ("text",),
    "num_processes": ("text",),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainConfig(TrainConfig):
    """How long and on how much at a time."""

    num_epochs: float = setting(
        "passes over the training rows; 0 (also where max_steps or max_tokens are typed): given by those",
        3.0,
        at_least=0,
    )

    def _length_problems(self) -> list[str]:
        if self.num_epochs or self.max_steps or self.max_tokens:
            return []
        return ["num_epochs = 0, max_steps = 0 and max_tokens = 0: set one of them, for instance train.num_epochs=3"]


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluationConfig(Section):
    """Validation, the choice of the checkpoint that is kept, and the early end."""

    every_steps: int = setting(
        "evaluate every so many steps, and before and after; 0: only before and after", 100, at_least=0, unit="steps"
    )
    micro_batch_size: int = setting("rows per device per forward", 16, at_least=1, unit="rows")
    metric: Literal["auto", "loss", "accuracy", "f1", "matthews", "pearson", "spearman"] = setting(
        "what the best checkpoint is chosen by; auto: GLUE's own, else accuracy, and loss for text and instruction",
        "auto",
        is_fixed_on_resume=True,
    )
    keep: Literal["best", "last"] = setting(
        "final/ holds the weights of the best evaluation, or of the last step", "best", is_fixed_on_resume=True
    )
    patience: int = setting(
        "stop after so many evaluations in a row that are no better; 0: never", 0, at_least=0, unit="evaluations"
    )

    def cross_rules(self) -> list[CrossRule]:
        return [("patience", self._patience_problems)]

    def _patience_problems(self) -> list[str]:
        if not self.patience or self.every_steps:
            return []
        return [f"patience = {self.patience} with every_steps = 0: there is no evaluation on the way to stop at"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Section):
    """Everything of `lost finetune`."""

    source: str = setting(
        "run directory, checkpoint, export, converted model, hub id or local model to start from",
        is_fixed_on_resume=True,
    )
    task: Task = setting(
        "text: more text; instruction: conversations, loss on the answers; classification: a label a text (or pair)",
        is_fixed_on_resume=True,
    )
    method: MethodConfig = setting("what is trained")
    data: FinetuneDataConfig = setting("examples")
    train: FinetuneTrainConfig = setting("length and batch")
    optimizer: OptimizerConfig = setting("optimizer")
    schedule: ScheduleConfig = setting("learning rate over the steps")
    runtime: RuntimeConfig = setting("processes, device, precision")
    checkpoint: CheckpointConfig = setting("saving and resuming")
    evaluation: FinetuneEvaluationConfig = setting("validation, best checkpoint, early end")
    logging: LoggingConfig = setting("wandb and metrics")
    seed: int = setting("seed of new weights, dropout and row order", 0, at_least=0, is_fixed_on_resume=True)
    run_dir: str = setting("folder of everything this run writes")

    def cross_rules(self) -> list[CrossRule]:
        return [
            *[("data", partial(self._key_problems, key)) for key in READ_BY],
            ("evaluation", self._metric_problems),
        ]

    def _key_problems(self, key: str) -> list[str]:
        tasks = READ_BY[key]
        value = getattr(self.data, key)
        if self.task in tasks or value == default_of(self.data, key):
            return []
        return [f"data.{key} = {value} with task = {self.task}: only {' and '.join(tasks)} uses it; leave it out"]

    def _metric_problems(self) -> list[str]:
        metric = self.evaluation.metric
        if metric in ("auto", "loss") or self.task == "classification":
            return []
        return [f"evaluation.metric = {metric} with task = {self.task}: it is measured by loss; leave it out"]


def default_of(section: Section, key: str) -> Any:
    field = type(section).__dataclass_fields__[key]
    return field.default_factory() if callable(field.default_factory) else field.default


def as_text_files(data: FinetuneDataConfig) -> TextFilesDataConfig:
    """The section of pre-training's data that task=text reads by; the tokenizer is the model's own."""
    shared = ("train_files", "validation_files", "validation_fraction", "text_field", "row_maker", "isolate_documents")
    values = {key: getattr(data, key) for key in (*shared, "cache_dir", "num_processes", "num_workers")}
    return TextFilesDataConfig(name="text_files", train_weights=[], tokenizer="train", **values)
